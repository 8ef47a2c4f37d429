"""Those who have a live loan of this host, and the gateway they come in by."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from gridcloud.model.lease import Lease
from gridcloud.providers.base import Enterable
from gridcloud.settings import GatewaySettings
from gridcloud.site.entrance import Entrance
from gridcloud.site.gateway import Gateway
from gridcloud.site.keyring import Keyring
from gridcloud.site.ports import Ports, parse_address


class Guest:
    """What the gateway may do for one live loan; see `gridcloud.site.gateway`."""

    machine: tuple[str, int] | None = None

    def __init__(self, lease: Lease, place: Enterable) -> None:
        self.lease_id = lease.id
        self.peer = lease.peer
        self._place = place
        self.ends_at = lease.ends_at
        self.home: Path | None = place.home(lease.id)
        self.shown_as = place.shown_as(lease.id)

    async def run(
        self, command: str, stdin_fd: int, stdout_fd: int, stderr_fd: int, env: Mapping[str, str]
    ) -> int:
        """Run a command line in the guest's place."""
        descriptors = (stdin_fd, stdout_fd, stderr_fd)
        return await self._place.enter(self.lease_id, command, descriptors, env)


class Guests:
    """The guests by lease, and the one port they come in by, opened when it is needed."""

    def __init__(
        self,
        gateway: Callable[[], GatewaySettings],
        keyring: Keyring,
        ports: Ports,
    ) -> None:
        self._settings = gateway
        self._keyring = keyring
        self._ports = ports
        self._guests: dict[str, Guest] = {}
        self._gateway: Gateway | None = None
        #: Where guests are told to come; empty while the gateway is closed, and where it has no
        #: address that could be told: they then come over the overlay alone.
        self.address = ""
        #: The way in by streams of the overlay.
        self.entrance = Entrance(lambda: self._gateway, self.lent_to)

    async def open(self) -> None:
        """Open the gateway. Idempotent; raises `Unavailable` if its address is taken."""
        if self._gateway:
            return
        settings = self._settings()
        host, port = parse_address(settings.listen)
        port = self._ports.choose("gateway", host, port, socket.SOCK_STREAM)
        gateway = Gateway(
            self._keyring.gateway_host_key, self._keyring.user_ca, self, host=host, port=port
        )
        self._gateway = gateway  # before it listens, so that no second one is opened meanwhile
        try:
            bound = await gateway.start()
        except BaseException:
            self._gateway = None
            raise
        # Any address of this host: which of them others reach nobody knows, if it is not told.
        shown = "" if ip_address(host).is_unspecified else f"{host}:{bound}"
        self.address = settings.advertise or shown

    async def close(self) -> None:
        """Close the gateway; loans go on."""
        if self._gateway:
            await self._gateway.close()

    def find(self, lease_id: str) -> Guest | None:
        """Return the guest of a live loan, for the gateway."""
        guest = self._guests.get(lease_id)
        if guest and guest.ends_at and datetime.now(UTC) >= guest.ends_at:
            return None
        return guest

    def lent_to(self, peer: str) -> Collection[str]:
        """Return the leases of a borrower's guests."""
        return [guest.lease_id for guest in self._guests.values() if guest.peer == peer]

    def add(self, guest: Guest) -> None:
        """Let a guest in from now on."""
        self._guests[guest.lease_id] = guest

    def move_end(self, lease: Lease) -> None:
        """Let a guest stay until its lease's new end."""
        if guest := self._guests.get(lease.id):
            guest.ends_at = lease.ends_at

    async def remove(self, lease_id: str) -> None:
        """Let a guest in no more, and cut what it has open. Idempotent."""
        self._guests.pop(lease_id, None)
        if self._gateway:
            await self._gateway.cut(lease_id)
