"""The place a job holds: how long it lasts, and what says that it is lost. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from gridcloud.errors import Forbidden, GridcloudError, NotFound
from gridcloud.model.job import JobState, Outcome
from gridcloud.model.lease import Lease, LeaseRole
from gridcloud.model.offer import offer_key

#: How long after a lease's end its machine is still asked for the result.
AFTER_THE_END = timedelta(seconds=30)
#: A renewal is asked for this long before the end, but no earlier than the last fifth.
_RENEW_BEFORE = timedelta(minutes=10)
#: By how much an own lease is lengthened at a time; what a machine costs should this site vanish.
_OWN_STEP = timedelta(hours=1)
#: For so long one without an end of its own is lengthened for results that cannot be brought back.
_HELD_FOR = timedelta(hours=24)
#: What a supervisor says of a command that was cut off by its machine, not by itself.
_CUT_OFF = frozenset({"lost", "terminated"})


class Holding:
    """A lease as it changes while its job runs: it may be renewed, recalled, or end."""

    def __init__(self, lease: Lease, now: Callable[[], datetime]) -> None:
        self.lease = lease
        self._now = now
        self._length = lease.ends_at - lease.created_at if lease.ends_at else timedelta(0)
        if lease.role is LeaseRole.OWN:
            self._length = min(self._length, _OWN_STEP)
        self._silent_since: datetime | None = None
        #: Why its owner ends it early; empty if it does not. A recall that came before a restart
        #: stands in the lease.
        self.recalled = lease.reason
        self._gone = False
        self._results_held_since: datetime | None = None

    @property
    def source(self) -> str:
        """Which offer it came from, as `Offer.key`."""
        lease = self.lease
        return offer_key(
            lease.peer, lease.provider, lease.region, lease.shape, spot=lease.order.spot
        )

    def bars(self, *, silent: bool) -> tuple[str, ...]:
        """Return what the job does not go to again once this is lost, as `Offer.key`.

        Nothing where a machine was made for it alone: the next would be another one, unless this
        one went ``silent``, when it may be where it was that is cut off.
        """
        return (self.source,) if silent or not self.lease.shape else ()

    @property
    def elsewhere(self) -> bool:
        """Whether it can be lost while this site goes on: it is on another machine."""
        machine = self.lease.machine
        return self.lease.role is LeaseRole.BORROWED or bool(machine and machine.endpoint)

    @property
    def takes_results(self) -> bool:
        """Whether what a job left there is gone with it: it is a loan, or was made for the job."""
        machine = self.lease.machine
        made = machine is not None and (machine.certified or machine.sandbox)
        return made or self.lease.role is LeaseRole.BORROWED

    def held_by(self, error: GridcloudError) -> bool:
        """Take note that results could not be brought back; return whether to keep the place for
        them, as long as it lasts."""
        if not self.takes_results:
            return False
        if not error.retryable and self.lease.role is LeaseRole.BORROWED:
            return False  # what its owner says for good stays so
        self._results_held_since = self._results_held_since or self._now()
        return True

    def seconds_left(self, state: JobState) -> float | None:
        """For how long the machine is worth asking; None without end, negative once it is over.

        One that ends as agreed is asked a little longer, for how the job ended; a job whose place
        is recalled begins elsewhere at once.
        """
        end = self.lease.ends_at
        if end is None:
            return None
        if not (self.recalled and state in (JobState.STAGE_IN, JobState.ACTIVE)):
            end += AFTER_THE_END
        return (end - self._now()).total_seconds()

    def over(self, state: JobState) -> bool:
        """Whether the machine is not worth asking any more."""
        left = self.seconds_left(state)
        return left is not None and left <= 0

    def recall(self, until: datetime, reason: str) -> None:
        """Take note that the owner ends it early."""
        end = self.lease.ends_at
        until = min(until, end) if end else until
        self.recalled = reason or "its owner needs it"
        self.lease = self.lease.model_copy(update={"ends_at": until})

    def lose(self, reason: str) -> None:
        """Take note that what it gave is there no more."""
        self._gone = True
        self.recall(self._now(), reason)

    def renewed(self, lease: Lease) -> bool:
        """Take note of a later end; return whether it is one."""
        before, after = self.lease.ends_at, lease.ends_at
        if self.recalled or before is None or after is None or after <= before:
            return False
        self.lease = lease
        return True

    def renewal(self) -> tuple[float, datetime] | None:
        """Return in how many seconds to ask for a later end, and for which; None if never."""
        end, lease = self.lease.ends_at, self.lease
        renewable = lease.role is LeaseRole.BORROWED or bool(lease.shape)
        since = self._results_held_since
        if since is not None and self._now() - since >= _HELD_FOR:
            return None
        if end is None or self.recalled or not renewable:
            return None
        ask_at = end - min(_RENEW_BEFORE, self._length / 5)
        return (ask_at - self._now()).total_seconds(), end + self._length

    def in_touch(self) -> None:
        """Take note that the machine answers."""
        self._silent_since = None

    def silent_for(self) -> timedelta:
        """Take note that the machine does not answer; return for how long by now."""
        self._silent_since = self._silent_since or self._now()
        return self._now() - self._silent_since

    def lost_by(self, error: GridcloudError, state: JobState) -> str:
        """Return why an error in this state means that the place is lost; empty if it does not.

        A lease that ended as agreed is not lost, nor what happened after the command ended.
        """
        if not self.elsewhere or state not in (JobState.STAGE_IN, JobState.ACTIVE):
            return ""
        gone = isinstance(error, NotFound | Forbidden) and self.lease.role is LeaseRole.BORROWED
        cut_off = gone and state is JobState.ACTIVE  # a little early, where clocks differ
        if self.recalled and (cut_off or self.over(state)):
            return self._taken()
        if self._ends_anyway():
            return ""
        if state is JobState.ACTIVE:
            return str(error) if gone else ""
        return str(error) if error.retryable else ""

    def lost_by_outcome(self, outcome: Outcome) -> str:
        """Return why an outcome means that the place was lost under the command; else empty."""
        if self.recalled and outcome.reason in (*_CUT_OFF, "lease-end"):
            return self._taken()
        if not self.elsewhere or outcome.reason not in _CUT_OFF or self._ends_anyway():
            return ""
        return outcome.message or "The machine ended the job."

    def as_recalled(self, outcome: Outcome, stays: str) -> Outcome:
        """Return an outcome with the recall as its reason, if that is what cut the command off.

        ``stays`` is why the job does not go elsewhere.
        """
        away = self._ends_anyway() and outcome.reason in ("stage-in-failed", "active-failed")
        if not self.recalled or not (away or outcome.reason in (*_CUT_OFF, "lease-end")):
            return outcome
        who, reason = "Its owner recalled the machine", "recalled"
        if self._gone:
            who, reason = "The machine was lost", "lost"
        told = f"{who} before the job was done: {self.recalled}"
        told = ". ".join([told.rstrip("."), *([f"Not placed anew: {stays}"] if stays else [])])
        return outcome.model_copy(update={"reason": reason, "message": f"{told}."})

    def _taken(self) -> str:
        why = f"{self.recalled.rstrip('.')}."
        return why if self._gone else f"its owner recalled it: {why}"

    def _ends_anyway(self) -> bool:
        """Whether the lease ends as agreed, by now or, as clocks differ, in a moment."""
        return self.lease.expired(self._now() + AFTER_THE_END)
