"""A launch as a state machine: what happened and when in, what to do next out. No I/O.

The order is image → shape → place → network → volumes → create → reachable → ready → setup. Each
step is idempotent by the lease, so a launch that was cut off begins anew and goes on from what is
there. What an error means:

- `NoCapacity` (and a machine that the cloud could not build): clear away, then the next place;
- `Unavailable`, `Throttled`, `TimedOut`: the step again, after growing pauses, until its time is
  over. After a create without a clear answer, look first whether the machine is there, several
  times, since a cloud may show late what it made; then go on from the network, with the same token;
- anything else: no other attempt can succeed.

Before it gives up, what was made is cleared away. Instants are seconds of one clock that never
goes back.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gridcloud.errors import GridcloudError, NoCapacity, Throttled, TimedOut, Unavailable
from gridcloud.model.machine import LaunchStep
from gridcloud.model.quantities import format_duration
from gridcloud.providers.cloud.section import Patience

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0
#: While only the machine is waited for, nobody is helped by long pauses.
_LONGEST_WAITING_PAUSE_SECONDS = 1.0
_WAITING = frozenset({LaunchStep.REACHABLE, LaunchStep.READY})
#: How long to wait before each look for a machine that may have been made.
_LOOKS_AFTER_SECONDS = (0.5, 2.0, 4.0)
_STEPS = tuple(LaunchStep)
#: What is done anew in each place.
_IN_A_PLACE = frozenset(
    {LaunchStep.NETWORK, LaunchStep.VOLUMES, LaunchStep.CREATE, LaunchStep.REACHABLE}
)
_BEFORE_CREATE = frozenset({LaunchStep.NETWORK, LaunchStep.VOLUMES})
#: From here on something may be there that has to be removed.
_MAKING_FROM = _STEPS.index(LaunchStep.NETWORK)
_WORDS = {
    LaunchStep.IMAGE: "Finding the image",
    LaunchStep.SHAPE: "Choosing the shape",
    LaunchStep.PLACE: "Finding a place",
    LaunchStep.NETWORK: "Preparing the network",
    LaunchStep.VOLUMES: "Preparing the volumes",
    LaunchStep.CREATE: "Creating the machine",
    LaunchStep.REACHABLE: "Waiting until the machine can be reached",
    LaunchStep.READY: "Waiting until the machine is ready",
    LaunchStep.SETUP: "Setting up the machine",
}


@dataclass(frozen=True)
class Do:
    """Carry out ``step`` (in ``place``, from the network on), in at most ``within_seconds``."""

    step: LaunchStep
    place: str
    within_seconds: float


@dataclass(frozen=True)
class Look:
    """Ask whether the machine is there, since a create ended without a clear answer."""

    within_seconds: float


@dataclass(frozen=True)
class Pause:
    """Do nothing for so long; ``because`` is for people, and empty where it is not worth a word."""

    seconds: float
    because: str = ""


@dataclass(frozen=True)
class Clear:
    """Remove all that was made for the lease."""


@dataclass(frozen=True)
class GiveUp:
    """Nothing more can be done; ``step`` is where it went wrong."""

    error: GridcloudError
    step: LaunchStep


@dataclass(frozen=True)
class Finished:
    """The machine is there, and ready."""


Decision = Do | Look | Pause | Clear | GiveUp | Finished


@dataclass(frozen=True)
class Launching:
    """Where a launch is. Every event gives a new one; `decide` says what comes next."""

    patience: Patience
    #: Makes the pauses of launches that run at the same time differ.
    seed: str
    step: LaunchStep = LaunchStep.IMAGE
    places: tuple[str, ...] = ("",)
    place_index: int = 0
    #: When each step was first begun, in this place where it is done in each.
    began: Mapping[LaunchStep, float] = field(default_factory=dict)
    failures: int = 0
    not_before: float = 0.0
    because: str = ""
    looks_left: int = 0
    begun_making: bool = False
    clearing: bool = False
    error: GridcloudError | None = None
    refusals: tuple[str, ...] = ()
    finished: bool = False

    @property
    def place(self) -> str:
        """Where the machine is to be."""
        return self.places[self.place_index]

    @classmethod
    def begin(cls, patience: Patience, seed: str, now: float) -> Launching:
        """Return a launch of which nothing was done yet."""
        return cls(patience, seed, began={LaunchStep.IMAGE: now})

    def decide(self, now: float) -> Decision:
        """Return what comes next; it stays the same until an event, but for pauses that end."""
        if self.clearing:
            return Clear()
        if self.error:
            return GiveUp(self.error, self.step)
        if self.finished:
            return Finished()
        if now < self.not_before:
            return Pause(self.not_before - now, self.because)
        left = max(0.0, self._deadline() - now)
        if self.looks_left:
            return Look(left)
        place = self.place if _STEPS.index(self.step) >= _MAKING_FROM else ""
        return Do(self.step, place, left)

    def succeeded(self, now: float) -> Launching:
        """Return the state after the step in hand was done."""
        if self.step is LaunchStep.SETUP:
            return replace(self, finished=True)
        return self._at(_STEPS[_STEPS.index(self.step) + 1], now)

    def placed(
        self, places: tuple[str, ...], now: float, *, there: bool, broken: bool = False
    ) -> Launching:
        """Return the state once the places are known, and what an earlier attempt left.

        ``there`` is a machine that only has to be waited for; a ``broken`` one is cleared away.
        """
        if not places:
            return self.failed(NoCapacity("There is no place for this shape."), now)
        known = replace(self, places=places, place_index=0)
        if broken:
            return replace(known._at(LaunchStep.NETWORK, now), clearing=True)
        if there:
            return known._at(LaunchStep.REACHABLE, now)
        return known._at(LaunchStep.NETWORK, now)

    def looked(self, now: float, *, there: bool) -> Launching:
        """Return the state after a look for a machine that may have been made."""
        if there:
            return self._at(LaunchStep.REACHABLE, now)
        if left := self.looks_left - 1:
            return self._looking(left, now)
        if now >= self._deadline():
            return self._given_up(self._too_late(TimedOut(self.because)))
        # The network may have gone with the last other machine in it, so it is asked for again;
        # the time for the creating goes on.
        kept = {step: at for step, at in self.began.items() if step not in _BEFORE_CREATE}
        return replace(self, began=kept)._at(LaunchStep.NETWORK, now)

    def cleared(self, now: float) -> Launching:
        """Return the state after all that was made was removed."""
        clean = replace(self, clearing=False, begun_making=False)
        if self.error:
            return clean
        kept = {step: at for step, at in self.began.items() if step not in _IN_A_PLACE}
        return replace(clean, began=kept, looks_left=0)._at(LaunchStep.NETWORK, now)

    def failed(self, error: GridcloudError, now: float) -> Launching:
        """Return the state after the step in hand, a look, or the clearing failed with an error."""
        if self.clearing:
            return replace(self, clearing=False, error=_not_all_removed(self.error, error))
        if isinstance(error, NoCapacity):
            return self._refused(error)
        if not isinstance(error, Unavailable | TimedOut):
            return self._given_up(error)
        again = now + self._pause_seconds(error)
        if again >= self._deadline():
            return self._given_up(self._too_late(error))
        if self.looks_left:  # a look that failed is no look
            return replace(self, failures=self.failures + 1, not_before=again, because=str(error))
        if self.step is LaunchStep.CREATE and not isinstance(error, Throttled):
            return replace(self, because=error.message)._looking(len(_LOOKS_AFTER_SECONDS), now)
        return replace(self, failures=self.failures + 1, not_before=again, because=error.message)

    def _at(self, step: LaunchStep, now: float) -> Launching:
        return replace(
            self,
            step=step,
            began={**self.began, step: self.began.get(step, now)},
            failures=0,
            not_before=0.0,
            because="",
            looks_left=0,
            begun_making=self.begun_making or _STEPS.index(step) >= _MAKING_FROM,
        )

    def _deadline(self) -> float:
        return self.began[self.step] + self.patience.limit(self.step).total_seconds()

    def _looking(self, left: int, now: float) -> Launching:
        pause = _LOOKS_AFTER_SECONDS[len(_LOOKS_AFTER_SECONDS) - left]
        return replace(self, looks_left=left, not_before=now + pause)

    def _pause_seconds(self, error: GridcloudError) -> float:
        waiting = self.step in _WAITING
        longest = _LONGEST_WAITING_PAUSE_SECONDS if waiting else _LONGEST_PAUSE_SECONDS
        grown = min(longest, _FIRST_PAUSE_SECONDS * 2.0 ** min(self.failures, 10))
        chance = random.Random(f"{self.seed} {self.step} {self.failures}")  # noqa: S311 - spreads
        pause = grown * (0.5 + chance.random() / 2)
        return max(pause, error.after_seconds) if isinstance(error, Throttled) else pause

    def _refused(self, error: NoCapacity) -> Launching:
        if self.step not in _IN_A_PLACE:
            return self._given_up(error)
        refusals = self.refusals
        refusals += (f"{self.place}: {error.message}" if self.place else error.message,)
        if self.place_index + 1 < len(self.places):
            moved = replace(self, refusals=refusals, place_index=self.place_index + 1)
            return replace(moved, clearing=True, step=LaunchStep.NETWORK, looks_left=0)
        if len(refusals) > 1:
            tried = " ".join(refusals)
            error = NoCapacity(f"No place has room for the machine. {tried}", hint=error.hint)
        return self._given_up(error)

    def _given_up(self, error: GridcloudError) -> Launching:
        return replace(self, error=error, clearing=self.begun_making, looks_left=0)

    def _too_late(self, error: GridcloudError) -> GridcloudError:
        """Return the last error as that of a step that took too long; one of the same kind."""
        kind = TimedOut if isinstance(error, TimedOut) else Unavailable
        limit = format_duration(self.patience.limit(self.step))
        message = f"{_WORDS[self.step]} did not succeed within {limit}: {error.message}"
        return kind(message, hint=error.hint)


def _not_all_removed(first: GridcloudError | None, error: GridcloudError) -> GridcloudError:
    """Return the error of a launch after which something may have stayed, for `made` to list."""
    left = f"Not all that was made is removed yet, and it is tried again: {error.message}"
    if first is None:
        return Unavailable(left, hint=error.hint)
    first.hint = f"{first.hint} {left}".strip()
    return first
