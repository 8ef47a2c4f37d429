"""Who is there: the pure state machine that decides whom to probe, and what a silence means.

After SWIM (Das, Gupta, Motivala 2002), with one change that a grid without a centre needs:
**nobody is believed about others.** A peer's state follows from what it said itself: to us, or
signed by it a moment ago, whoever brought that. What others say of it is a *hint*, and makes us
look ourselves, within bounds. A site that may be thought dead says, signed, that it is there; so
sites that start together, or find together again, need not all dial one another for that.

Events and the time go in (seconds, of any clock that only grows), actions come out. Every `Probe`
is to be answered by `answered` or `failed`, every `ProbeVia` by `vouched` or `unvouched`.

State is kept only of peers that something is known of, so that a large grid costs little. Its
events all touch the same few tables, and so stand in one module of over 400 lines.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gridcloud.grid.rates import TokenBucket

#: Up to so many peers are looked at twice a second and met soon; more of them only in turn.
SMALL = 50
#: How many probes are under way at once.
IN_FLIGHT = 16
#: Through how many others a silent peer is tried.
HELPERS = 3
#: How many peers are told of news at a time, how soon, and how often. More seldom in large grids.
TOLD = 4
_TELL_AFTER, _TELL_EVERY = 0.05, 0.2
#: So many new peers are met at once. The rest only so long after one of these has answered: their
#: word may come before, and while such words come, there is still time, up to an end.
_MET_FIRST, _REST_AFTER, _WORD_ADDS, _REST_AT_LAST = 3, 1.0, 0.5, 4.0
#: How often at most a site says anew that it is there; more seldom in large grids.
_SPEAK_EVERY = 10.0
_SHORTEST_WAIT, _LONGEST_WAIT = 0.5, 1.0
#: To a peer of which nothing is known, and to one that only its word, or nothing, came from.
_FIRST_WAIT, _AGAIN_WAIT = 4.0, 1.5
_WAIT_VIA = 1.0
_SUSPICION, _HINTED_SUSPICION = 1.2, 0.8
_HINT_COUNTS_FOR = 10.0
_SAME_HINT_AGAIN = 3.0
_HINTS_KEPT = 1024
_REDIAL = 0.5
#: A dead peer is tried again after so long: at first, and once it has been dead for a while.
_REDIAL_FRESH, _REDIAL_OLD, _OLD = 1.0, 5.0, 300.0


class PeerState(StrEnum):
    """What is thought of a peer: not met yet, there, silent lately, or silent for too long."""

    UNKNOWN = "unknown"
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


@dataclass(frozen=True)
class Probe:
    """Ask the peer itself, and wait so many seconds."""

    key: str
    timeout: float


@dataclass(frozen=True)
class ProbeVia:
    """Ask helpers for the peer's signed word."""

    key: str
    helpers: tuple[str, ...]
    timeout: float


@dataclass(frozen=True)
class Changed:
    """Have it told, with the next news, what is thought of a peer."""

    key: str
    state: PeerState


@dataclass(frozen=True)
class Tell:
    """Exchange news with peers now."""

    to: tuple[str, ...]


@dataclass(frozen=True)
class Speak:
    """Say anew, signed, that this site is there: others may think that it is not."""


Action = Probe | ProbeVia | Changed | Tell | Speak


@dataclass(slots=True)
class Seen:
    """What is known of one peer; times in seconds.

    ``latency`` is a moving average of what probes take, None before the first; making a link
    counts only there.
    ``direct`` is false where we tried it ourselves, in vain, the last time it was heard of;
    ``met`` tells whether it said something to us since it was last silent.
    """

    state: PeerState = PeerState.UNKNOWN
    since: float = 0.0
    heard_at: float | None = None
    latency: float | None = None
    direct: bool = True
    met: bool = False
    probed_at: float | None = None
    hinted_at: float | None = None
    redial_at: float = 0.0
    once_more: bool = False


@dataclass
class Swim:
    """The machine. ``chance`` decides all that is random."""

    chance: random.Random
    #: Grows with every change of a state, and of what is reached by ourselves.
    changes: int = 0
    #: How many times longer this site waits for all: 1 while its host lets it run when it wants to.
    slowness: float = 1.0
    _count: int = 0
    _rota: list[str] = field(default_factory=list)
    _turn: int = 0
    _gone: set[str] = field(default_factory=set)
    _seen: dict[str, Seen] = field(default_factory=dict)
    _alive: dict[str, int] = field(default_factory=dict)
    _alive_list: list[str] = field(default_factory=list)
    _probing: set[str] = field(default_factory=set)
    _urgent: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _unmet: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _first: set[str] = field(default_factory=set)
    _meet_rest_at: float = math.inf
    _meet_rest_by: float = math.inf
    _tell_at: float | None = None
    _told_at: float = -math.inf
    _speak_from: float = -math.inf
    _suspects: dict[str, list[float]] = field(default_factory=dict)
    _dead: deque[str] = field(default_factory=deque)
    _next_turn: float = 0.0
    _next_redial: float = 0.0
    _hints: OrderedDict[tuple[str, str], float] = field(default_factory=OrderedDict)
    _hint_rate: TokenBucket = field(default_factory=lambda: TokenBucket(4, 16, 0.0))
    _urgent_rate: TokenBucket = field(default_factory=lambda: TokenBucket(32, 32, 0.0))

    # What it knows

    def seen(self, key: str) -> Seen:
        """Return what is known of a peer; not to be changed."""
        return self._seen.get(key) or Seen()

    def alive(self) -> Sequence[str]:
        """Return the peers thought to be there, in no order that means anything."""
        return self._alive_list

    @property
    def period(self) -> float:
        """Seconds between two probes of peers in turn, by how many there are."""
        return min(1.0, max(0.5, 2.0 / max(1, self._count))) if self._count <= SMALL else 1.0

    @property
    def _in_flight(self) -> int:
        return max(1, int(IN_FLIGHT / self.slowness))

    def pick(self, most: int, besides: Sequence[str] = ()) -> tuple[str, ...]:
        """Return up to ``most`` different peers that are there, at random."""
        there = self._alive_list
        picked = self.chance.sample(there, min(len(there), most + len(besides)))
        return tuple(key for key in picked if key not in besides)[:most]

    def wake_at(self, now: float) -> float:
        """Return when `tick` has something to do next."""
        times = [self._next_turn]
        times += [due[-1] for due in self._suspects.values()]
        if self._dead:
            times.append(max(self._next_redial, self._first_redial(now)))
        if self._tell_at is not None:
            times.append(self._tell_at)
        if self._urgent and len(self._probing) < self._in_flight:
            times.append(now + 0.05)
        if self._unmet and len(self._probing) < self._in_flight:
            rest = min(self._meet_rest_at, self._meet_rest_by) if self._first else now
            times.append(max(now + 0.05, rest))
        return max(now, min(times))

    # Events

    def add(self, key: str) -> None:
        """Begin to look at a peer; it is met soon while they are few."""
        self._count += 1
        if key in self._gone:  # still in the round, though it was removed
            self._gone.discard(key)
        else:
            self._rota.insert(self.chance.randint(self._turn, len(self._rota)), key)
        if self._count <= SMALL:
            self._unmet[key] = None
            self._unmet.move_to_end(key, last=self.chance.random() < 0.5)

    def remove(self, key: str) -> None:
        """Forget a peer that was added."""
        self._count -= 1
        self._gone.add(key)
        self._urgent.pop(key, None)
        self._unmet.pop(key, None)
        self._probing.discard(key)
        seen = self._seen.pop(key, None)
        if seen is not None:
            self._leave(key, seen.state)
            self.changes += 1

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        actions: list[Action] = []
        for key, due in list(self._suspects.items()):
            if due[-1] > now:
                continue
            due.pop()
            if due:
                self._probe(key, now, actions)
            elif key in self._probing:
                due.append(now + 0.1)  # its last chance is under way
            else:
                self._become(key, PeerState.DEAD, now, actions)
        if now >= self._next_turn:
            wait = self.period * self.slowness * self.chance.uniform(0.9, 1.1)
            if (turn := self._in_turn()) is not None:
                wait *= 1 if self.seen(turn).met else 2  # there may be no link to it yet
                self._probe(turn, now, actions)
            self._next_turn = now + wait
        if self._dead and now >= self._next_redial:
            self._next_redial = now + _REDIAL * self.slowness
            self._redial(now, actions)
        while self._urgent and len(self._probing) < self._in_flight:
            if not self._urgent_rate.try_take(1, now):
                break
            first, _ = self._urgent.popitem(last=False)
            self._probe(first, now, actions)
        self._meet(now, actions)
        if self._tell_at is not None and now >= self._tell_at:
            self._tell_at, self._told_at = None, now
            # Those to whom there is a link, if there are: that costs least.
            some = self.pick(SMALL)
            linked = tuple(key for key in some if self._seen[key].met)
            if some:
                actions.append(Tell((linked or some)[:TOLD]))
        return actions

    def news(self, now: float) -> None:
        """Take note that there is something to tell: some are told soon, all of it together."""
        if self._tell_at is None:
            seldom = self.slowness * self._spread_out
            self._tell_at = max(
                now + _TELL_AFTER * self.slowness, self._told_at + _TELL_EVERY * seldom
            )

    def heard(self, key: str, now: float) -> list[Action]:
        """Take note that the peer itself asked us something."""
        return self._met(key, now)

    def spoke(self, key: str, now: float) -> list[Action]:
        """Take note of the peer's signed word of a moment ago, whoever brought it."""
        seen = self._of(key)
        if seen.state is PeerState.ALIVE:
            return []
        seen.met = False
        self._reached(seen, directly=seen.state is PeerState.UNKNOWN)
        self._meet_rest_at = max(self._meet_rest_at, now + _WORD_ADDS * self.slowness)
        return self._lives(key, now)

    def _doubted(self, now: float) -> list[Action]:
        """Take note that others may think that this site is not there."""
        if now < self._speak_from:
            return []
        self._speak_from = now + _SPEAK_EVERY * self._spread_out
        return [Speak()]

    def answered(self, key: str, now: float, took: float) -> list[Action]:
        """Take note of the peer's own answer, after so many seconds."""
        if key not in self._probing:
            return []
        self._probing.discard(key)
        seen = self._of(key)
        if seen.latency is None:
            seen.latency = took
        elif seen.state is PeerState.ALIVE and seen.direct:
            seen.latency = 0.75 * seen.latency + 0.25 * took
        self._reached(seen, directly=True)
        return self._met(key, now)

    def failed(self, key: str, now: float) -> list[Action]:
        """Take note that the peer could not be reached, or did not answer."""
        if key not in self._probing:
            return []
        seen = self._of(key)
        undecided = seen.state in (PeerState.ALIVE, PeerState.UNKNOWN)
        if undecided and not self._heard_meanwhile(seen):
            if helpers := self._helpers(key, seen, now):
                return [ProbeVia(key, helpers, _WAIT_VIA * self.slowness)]
            return self.unvouched(key, now)
        self._probing.discard(key)
        if seen.state is PeerState.DEAD:
            wait = _REDIAL_FRESH if now - seen.since < _OLD else _REDIAL_OLD
            seen.redial_at = now + wait * self.chance.uniform(0.8, 1.2)
            if seen.once_more:
                seen.once_more = False
                self._unmet[key] = None
        return []

    def vouched(self, key: str, now: float) -> list[Action]:
        """Take note of the peer's signed word, that a helper brought."""
        if key not in self._probing:
            return []
        self._probing.discard(key)
        seen = self._of(key)
        seen.met = False
        self._reached(seen, directly=False)
        return self._lives(key, now)

    def unvouched(self, key: str, now: float) -> list[Action]:
        """Take note that helpers could not bring the peer's word either."""
        actions: list[Action] = []
        if key not in self._probing:
            return actions
        self._probing.discard(key)
        seen = self._of(key)
        if self._heard_meanwhile(seen):
            return actions
        if seen.state is PeerState.ALIVE:
            self._become(key, PeerState.SUSPECT, now, actions)
        elif seen.state is PeerState.UNKNOWN:
            self._become(key, PeerState.DEAD, now, actions)
        return actions

    def hint(self, teller: str, key: str, state: PeerState, now: float) -> None:
        """Take note of what one peer says of another: a reason to look, within bounds."""
        mine = self.seen(key).state
        if key in self._gone or key in self._probing:
            return
        if (state is PeerState.ALIVE) == (mine is PeerState.ALIVE) or mine is PeerState.SUSPECT:
            return
        last = self._hints.get((teller, key))
        if last is not None and now - last < _SAME_HINT_AGAIN:
            return
        if not self._hint_rate.try_take(1, now):
            return
        self._hints[teller, key] = now
        self._hints.move_to_end((teller, key))
        if len(self._hints) > _HINTS_KEPT:
            self._hints.popitem(last=False)
        if state is not PeerState.ALIVE:
            self._of(key).hinted_at = now
        self._urgent[key] = None
        self._urgent.move_to_end(key, last=False)

    def look(self, key: str) -> None:
        """Have a peer probed as soon as may be: it was out of reach for something else."""
        if key not in self._gone and key not in self._probing:
            self._urgent[key] = None

    # Inside

    def _of(self, key: str) -> Seen:
        return self._seen.setdefault(key, Seen())

    def _reached(self, seen: Seen, *, directly: bool) -> None:
        self.changes += seen.direct is not directly
        seen.direct = directly

    @property
    def _spread_out(self) -> float:
        """How many times more seldom than in a small grid to do what reaches all."""
        return max(1.0, self._count / SMALL)

    @staticmethod
    def _heard_meanwhile(seen: Seen) -> bool:
        """Whether it asked us something after we began to ask it."""
        heard, probed = seen.heard_at, seen.probed_at
        return heard is not None and probed is not None and heard >= probed

    def _helpers(self, key: str, seen: Seen, now: float) -> tuple[str, ...]:
        return () if self._hinted(seen, now) else self.pick(HELPERS, besides=(key,))

    @staticmethod
    def _hinted(seen: Seen, now: float) -> bool:
        return seen.hinted_at is not None and now - seen.hinted_at < _HINT_COUNTS_FOR

    def _meet(self, now: float, actions: list[Action]) -> None:
        """Meet a few peers, and the rest of them once they had time to say that they are there."""
        most = len(self._unmet)
        if not most:
            self._first.clear()
            self._meet_rest_at = self._meet_rest_by = math.inf
            return
        if not self._first:
            most = _MET_FIRST
            self._meet_rest_by = now + _REST_AT_LAST * self.slowness
        elif self._meet_rest_at == math.inf and not self._first <= self._probing:
            self._meet_rest_at = now + _REST_AFTER * self.slowness
        if self._first and now < min(self._meet_rest_at, self._meet_rest_by):
            return
        for _ in range(min(most, len(self._unmet), self._in_flight - len(self._probing))):
            if not self._urgent_rate.try_take(1, now):
                break
            next_one, _none = self._unmet.popitem(last=False)
            self._first.add(next_one)
            self._probe(next_one, now, actions)

    def _met(self, key: str, now: float) -> list[Action]:
        """Take note of what the peer said to us; one that we thought dead may have thought so."""
        seen = self._of(key)
        seen.met, parted = True, seen.state is PeerState.DEAD
        return self._lives(key, now) + (self._doubted(now) if parted else [])

    def _lives(self, key: str, now: float) -> list[Action]:
        actions: list[Action] = []
        seen = self._of(key)
        seen.heard_at = now
        seen.hinted_at = None
        if seen.state is not PeerState.ALIVE:
            was = seen.state
            self._become(key, PeerState.ALIVE, now, actions)
            self._urgent.pop(key, None)
            self._unmet.pop(key, None)
            if was is PeerState.DEAD:
                # What parted us from it may have parted us from others: try them all.
                for dead in self._dead:
                    if dead in self._probing:
                        self._seen[dead].once_more = True
                    else:
                        self._unmet[dead] = None
        return actions

    def _become(self, key: str, state: PeerState, now: float, actions: list[Action]) -> None:
        seen = self._of(key)
        was, hinted = seen.state, seen.hinted_at is not None
        self._leave(key, was)
        seen.state, seen.since = state, now
        self.changes += 1
        if state is PeerState.ALIVE:
            self._alive[key] = len(self._alive_list)
            self._alive_list.append(key)
        elif state is PeerState.SUSPECT:
            wait = (_HINTED_SUSPICION if hinted else _SUSPICION) * self.slowness
            self._suspects[key] = [now + wait, now + wait / 2, now]
        elif state is PeerState.DEAD:
            self._dead.append(key)
            seen.redial_at = now + _REDIAL
        quiet = was is PeerState.UNKNOWN or (was, state) == (PeerState.SUSPECT, PeerState.ALIVE)
        if not quiet:
            actions.append(Changed(key, state))
            self.news(now)

    def _leave(self, key: str, state: PeerState) -> None:
        if state is PeerState.ALIVE:
            place, last = self._alive.pop(key), self._alive_list.pop()
            if last != key:
                self._alive_list[place] = last
                self._alive[last] = place
        elif state is PeerState.SUSPECT:
            self._suspects.pop(key, None)
        elif state is PeerState.DEAD:
            self._dead.remove(key)

    def _probe(self, key: str, now: float, actions: list[Action]) -> None:
        if key in self._probing or key in self._gone:
            return
        seen = self._of(key)
        seen.probed_at = now
        self._probing.add(key)
        timeout = _FIRST_WAIT if seen.state is PeerState.UNKNOWN else _AGAIN_WAIT
        if seen.state is PeerState.SUSPECT or self._hinted(seen, now):
            timeout = _SHORTEST_WAIT  # it was given its time before, by us or by another
        elif seen.state is PeerState.ALIVE and seen.direct:
            latency = _LONGEST_WAIT if seen.latency is None else seen.latency
            timeout = min(_LONGEST_WAIT, max(_SHORTEST_WAIT, 0.2 + 4 * latency))
        actions.append(Probe(key, timeout * self.slowness))

    def _in_turn(self) -> str | None:
        """Return the next of a shuffled round of all peers but the dead and the suspects."""
        for _ in range(2):
            while self._turn < len(self._rota):
                key = self._rota[self._turn]
                self._turn += 1
                state = self.seen(key).state
                if key in self._gone or key in self._unmet:
                    continue
                if state in (PeerState.ALIVE, PeerState.UNKNOWN):
                    return key
            self._rota = [key for key in self._rota if key not in self._gone]
            self._gone.clear()
            self.chance.shuffle(self._rota)
            self._turn = 0
        return None

    def _first_redial(self, now: float) -> float:
        if len(self._dead) > SMALL:
            return now
        return min(self._seen[key].redial_at for key in self._dead)

    def _redial(self, now: float, actions: list[Action]) -> None:
        for _ in range(min(len(self._dead), SMALL)):
            key = self._dead[0]
            self._dead.rotate(-1)
            if self._seen[key].redial_at <= now and key not in self._probing:
                if len(self._probing) < self._in_flight:
                    self._probe(key, now, actions)
                return
