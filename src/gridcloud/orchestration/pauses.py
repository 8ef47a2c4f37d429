"""How long a job that is refused again and again, for reasons that do not pass, is left alone."""

from __future__ import annotations

from collections import Counter

#: So many places may refuse a job before it has to pause.
_AT_ONCE = 3
_FIRST_SECONDS, _LONGEST_SECONDS = 10.0, 300.0


class Pauses:
    """Counts refusals that would come again, and says which jobs are not to be placed yet.

    Times are of any clock that only grows, in seconds.
    """

    def __init__(self) -> None:
        self._refusals: Counter[str] = Counter()
        self._until: dict[str, float] = {}
        self._told: dict[str, str] = {}

    def refused(self, job_id: str, now: float) -> float:
        """Count a refusal; return for how many seconds the job is left alone, 0 at first."""
        self._refusals[job_id] += 1
        doublings = self._refusals[job_id] - _AT_ONCE
        if doublings < 0:
            return 0.0
        pause = min(_FIRST_SECONDS * 2.0 ** min(doublings, 10), _LONGEST_SECONDS)
        self._until[job_id] = now + pause
        return pause

    def over(self, job_id: str, now: float) -> bool:
        """Whether a job may be placed."""
        return self._until.get(job_id, now) <= now

    def news(self, job_id: str, text: str) -> bool:
        """Whether this is something else than what the job's owner was told last."""
        if self._told.get(job_id) == text:
            return False
        self._told[job_id] = text
        return True

    def forget(self, job_id: str) -> None:
        """Begin anew: the job has a place, or has ended."""
        self._refusals.pop(job_id, None)
        self._until.pop(job_id, None)
        self._told.pop(job_id, None)
