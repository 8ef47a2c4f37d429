"""The overlay over UDP alone, for what neither offers nor needs a TCP port."""

from __future__ import annotations

from collections.abc import Sequence

from gridcloud.grid.identity import Identity
from gridcloud.grid.overlay import OverlayTransport


class IrohTransport(OverlayTransport):
    """See `OverlayTransport`."""

    def __init__(
        self, identity: Identity, listen: str = "127.0.0.1:0", advertise: Sequence[str] = ()
    ) -> None:
        super().__init__(identity, listen, advertise)
