"""Rosters that share what they have in common, so that thousands of sites fit in one process.

What a site holds of a community of 5000 takes it some ten megabytes; five thousand sites in one
process cannot each have that. They begin with the same roster, and each keeps only what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

from gridcloud.grid.documents import Clock
from gridcloud.grid.roster import Roster, _bucket

K = TypeVar("K")
V = TypeVar("V")


class Layered(MutableMapping[K, V]):
    """A dictionary over another one, which it never changes."""

    def __init__(self, base: dict[K, V]) -> None:
        self.base = base
        self.own: dict[K, V] = {}
        self.gone: set[K] = set()

    def __getitem__(self, key: K) -> V:
        if key in self.own:
            return self.own[key]
        if key in self.gone:
            raise KeyError(key)
        return self.base[key]

    def __setitem__(self, key: K, value: V) -> None:
        self.own[key] = value
        self.gone.discard(key)

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self.own.pop(key, None)
        if key in self.base:
            self.gone.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self.own or (key in self.base and key not in self.gone)

    def __iter__(self) -> Iterator[K]:
        if not self.own and not self.gone:
            yield from self.base
            return
        yield from (key for key in self.base if key not in self.own and key not in self.gone)
        yield from self.own

    def __len__(self) -> int:
        new = sum(key not in self.base for key in self.own)
        return len(self.base) - len(self.gone) + new


class LayeredSets(Layered[K, set[Any]]):
    """The values are sets that whoever takes one out may change."""

    def __getitem__(self, key: K) -> set[Any]:
        if key not in self.own:
            self.own[key] = set(super().__getitem__(key))
        return self.own[key]

    def get(self, key: K, default: Any = None) -> Any:
        """Return a set only to be looked at."""
        return Layered.__getitem__(self, key) if key in self else default


class SharedRoster(Roster):
    """A roster that began as a copy of ``base``, which must not change any more."""

    def __init__(self, base: Roster, clock: Clock) -> None:
        super().__init__(base.community, clock)
        attributes: dict[str, Any] = {
            "_seats": Layered(base._seats),
            "_members": Layered(base._members),
            "_names": LayeredSets(base._names),
            "_signed_by": LayeredSets(base._signed_by),
            "_buckets": list(base._buckets),
            "_hashes": list(base._hashes),
            "_digest": base.digest(),
        }
        missing = attributes.keys() - vars(self).keys()
        assert not missing, f"a roster has no {missing} any more"
        vars(self).update(attributes)
        self._base = base

    def _own(self, key: str) -> None:
        seats: Any = self._seats
        if key in seats and key not in seats.own:
            seat = seats[key]
            seats[key] = replace(
                seat, admissions=dict(seat.admissions), removals=dict(seat.removals)
            )

    def _seat(self, key: str) -> Any:
        self._own(key)
        if key not in self._seats:
            self._own_bucket(key)
        return super()._seat(key)

    def _drop(self, key: str) -> None:
        self._own_bucket(key)
        super()._drop(key)

    def _own_bucket(self, key: str) -> None:
        """Copy the part that will change, if this one does."""
        number = _bucket(key)
        if self._buckets[number] is self._base._buckets[number]:
            self._buckets[number] = set(self._buckets[number])

    def _settle(self, key: str) -> bool:
        self._own(key)
        return super()._settle(key)
