"""Decisions: which offer, which job next, what to mend after a crash."""
