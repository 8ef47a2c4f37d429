"""The values and pure state machines everything else speaks in; no input or output."""

from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.need import Need, Resources

__all__ = ["Job", "JobSpec", "JobState", "Need", "Resources"]
