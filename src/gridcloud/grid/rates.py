"""Rates: how much one peer, or one address, may ask of this site. No I/O."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

_MAX_HANDSHAKES = 128
#: Of one IP address; many sites may sit behind one.
_MAX_HANDSHAKES_PER_HOST = 32
_HANDSHAKES_PER_SECOND = 20.0
_HANDSHAKES_AT_ONCE = 200.0


class TokenBucket:
    """Lets ``rate`` a second through, and up to ``burst`` at once.

    The time is any that only grows, in seconds.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take ``amount``, on credit if need be; return the seconds to wait before going on."""
        self._fill(now)
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)

    def try_take(self, amount: float, now: float) -> bool:
        """Take ``amount`` if it is there; say whether it was."""
        self._fill(now)
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True

    def _fill(self, now: float) -> None:
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        self._tokens = min(self._burst, self._tokens + passed * self._rate)


class Buckets:
    """A `TokenBucket` for each name; the ``most`` names used last are remembered.

    One that is forgotten begins anew with a full burst: so many names must be used meanwhile that
    what bounds all of them together bites first.
    """

    def __init__(self, rate: float, burst: float, most: int = 4096) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def of(self, name: str, now: float) -> TokenBucket:
        """Return the bucket of a name, made at first."""
        bucket = self._buckets.setdefault(name, TokenBucket(self._rate, self._burst, now))
        self._buckets.move_to_end(name)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return bucket


class Door:
    """Bounds the handshakes that are under way, and how often one host may begin one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_host = Buckets(_HANDSHAKES_PER_SECOND, _HANDSHAKES_AT_ONCE)
        self._under_way: Counter[str] = Counter()

    @property
    def crowded(self) -> bool:
        """Whether so many are under way that a newcomer should first prove its address."""
        return self._under_way.total() >= _MAX_HANDSHAKES // 4

    @contextlib.contextmanager
    def enter(self, host: str) -> Iterator[bool]:
        """Count a handshake for the while; gives whether it may go on."""
        host = _who(host)
        if (
            self._under_way.total() >= _MAX_HANDSHAKES
            or self._under_way[host] >= _MAX_HANDSHAKES_PER_HOST
            or not self._by_host.of(host, self._clock()).try_take(1, self._clock())
        ):
            yield False
            return
        self._under_way[host] += 1
        try:
            yield True
        finally:
            self._under_way[host] -= 1
            self._under_way += Counter()  # drops those at nought


def _who(host: str) -> str:
    """Return what stands for a host: of IPv6 the network, since one host has all its addresses."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        if address.version == 6 and address.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(address), 64), strict=False))
    return host
