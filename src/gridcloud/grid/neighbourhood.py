"""What the transport must be told by those who know the members: whom to trust with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gridcloud.grid.transport import PeerAddress


@dataclass(frozen=True)
class Neighbourhood:
    """Answers at once, without waiting; keys are sites'. The defaults help nobody.

    - ``knows``: is this a member of a community of ours? Strangers get less room, and are not met.
    - ``relays_for``: the members that may help to reach a target, best first. Each is asked to
      introduce this site to it, and to relay; whether it does is its own choice.
    - ``may_introduce``: may the source learn from us where we see the target?
    - ``may_relay``: do we carry traffic, unread, between source and target?
    - ``anchors``: members to which a link is held at all times, so that a site nobody can dial
      is found through them.
    - ``slowness``: how many times longer to give one way its time, since this host is busy.
    - ``relay_bytes_per_second`` bounds all that is relayed, together.
    """

    knows: Callable[[str], bool] = lambda _key: True
    relays_for: Callable[[str], Sequence[PeerAddress]] = lambda _target: ()
    may_introduce: Callable[[str, str], bool] = lambda _source, _target: False
    may_relay: Callable[[str, str], bool] = lambda _source, _target: False
    anchors: Callable[[], Sequence[PeerAddress]] = tuple
    slowness: Callable[[], float] = lambda: 1.0
    relay_bytes_per_second: int = 2 * 1024 * 1024
