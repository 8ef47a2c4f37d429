"""How a job runs on what is leased."""
