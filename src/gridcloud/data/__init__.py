"""Staging files to and from where a job runs."""
