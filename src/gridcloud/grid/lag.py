"""How late this site itself is: then a silence says little about the peer.

On a host that is very busy a site gets its turn late, and so would take for dead who answered in
time. All the looking and asking that follows would keep the host busier still. So a site that is
late waits longer, and asks less, in proportion (as in Lifeguard: Dadgar, Phillips, Currey 2017).
"""

from __future__ import annotations

import asyncio

#: So much lateness doubles all waits; they grow ten times at most.
_DOUBLES_AT = 0.1
_SLOWEST = 10.0
#: Each so many seconds half of a lateness is forgotten.
_HALF_LIFE = 2.0


class Lag:
    """Watches the running event loop by its own clock; where time is virtual nobody is late."""

    def __init__(self) -> None:
        self._lag = 0.0
        self._at = 0.0

    async def slowness(self, due: float) -> float:
        """Return how many times longer to wait for all, at least 1.

        ``due`` is when the caller meant to run at the latest, of the loop's clock. Waits for one
        round of the loop.
        """
        loop = asyncio.get_running_loop()
        woken = loop.time()
        await asyncio.sleep(0)
        now = loop.time()
        late = max(woken - due, now - woken)
        kept = self._lag * 0.5 ** ((now - self._at) / _HALF_LIFE)
        self._lag, self._at = max(late, kept), now
        return min(_SLOWEST, 1.0 + self._lag / _DOUBLES_AT)
