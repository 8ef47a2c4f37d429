"""The owner's side of a loan: what is offered, who gets it, how it is entered, when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from gridcloud.access.keys import public_line
from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Unavailable,
)
from gridcloud.grid.leasing import LeaseRequest
from gridcloud.grid.papers import LeaseGrant, Offered
from gridcloud.model.lease import Endpoint, Lease, LeaseRole, LeaseState, taken
from gridcloud.model.need import Resources
from gridcloud.model.quantities import format_bytes, format_duration
from gridcloud.providers.local import LocalProvider
from gridcloud.providers.local.bubblewrap import GUEST_HOME
from gridcloud.settings import SiteSettings
from gridcloud.site.gateway import Gateway
from gridcloud.site.keyring import Keyring
from gridcloud.site.ports import Ports, parse_address
from gridcloud.store.leases import LeaseStore
from gridcloud.store.papers import PaperStore

log = structlog.get_logger()
#: On top of the time a job may run, for copying its files in and out.
STAGING_TIME = timedelta(minutes=10)
_WORD_OF_THE_END = timedelta(minutes=1)


class Guest:
    """What the gateway may do for one live loan; see `gridcloud.site.gateway`."""

    shown_as = GUEST_HOME
    machine: tuple[str, int] | None = None

    def __init__(self, lease: Lease, local: LocalProvider) -> None:
        self._lease_id = lease.id
        self._local = local
        self.ends_at = lease.ends_at
        self.home: Path | None = local.home(lease.id)

    async def run(
        self, command: str, stdin_fd: int, stdout_fd: int, stderr_fd: int, env: Mapping[str, str]
    ) -> int:
        """Run a command line in the sandbox."""
        descriptors = (stdin_fd, stdout_fd, stderr_fd)
        return await self._local.enter(self._lease_id, command, descriptors, env)


class Lending:
    """Grants, keeps and ends loans of this host. The owner alone decides: whatever a peer's
    message says, what is not in the settings is not given."""

    def __init__(
        self,
        settings: SiteSettings,
        keyring: Keyring,
        leases: LeaseStore,
        papers: PaperStore,
        ports: Ports,
        local: Callable[[], LocalProvider],
    ) -> None:
        self._settings = settings
        self._keyring = keyring
        self._leases = leases
        self._papers = papers
        self._ports = ports
        self._local = local
        self._guests: dict[str, Guest] = {}
        self._deciding = asyncio.Lock()
        self._dead_since: dict[str, datetime] = {}
        self._gateway: Gateway | None = None
        self.gateway_address = ""
        #: Whether loans are granted: not before a start has mended what the last run left.
        self.open = False
        #: Called when capacity came free or was taken.
        self.on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Open the gateway if anything is lent, and let guests with live loans in again."""
        if not self._settings.lending.enabled:
            return
        for lease in await self._leases.live():
            if lease.role is LeaseRole.LENT and lease.state is LeaseState.ACTIVE:
                self._guests[lease.id] = Guest(lease, self._local())
        host, port = parse_address(self._settings.gateway.listen)
        port = self._ports.choose("gateway", host, port, socket.SOCK_STREAM)
        self._gateway = Gateway(
            self._keyring.gateway_host_key, self._keyring.user_ca, self, host=host, port=port
        )
        bound = await self._gateway.start()
        self.gateway_address = self._settings.gateway.advertise or f"{host}:{bound}"

    async def stop(self) -> None:
        """Close the gateway; loans go on."""
        if self._gateway:
            await self._gateway.close()

    def find(self, lease_id: str) -> Guest | None:
        """Return the guest of a live loan, for the gateway."""
        guest = self._guests.get(lease_id)
        if guest and guest.ends_at and datetime.now(UTC) >= guest.ends_at:
            return None
        return guest

    async def describe(self) -> str:
        """Return in words what is lent, or why nothing is."""
        lending = self._settings.lending
        if not lending.enabled:
            return "off; set enabled = true under [lending] in the settings"
        if problem := await self._problem():
            return f"not offered: {problem}"
        limit = await self._limit()
        return (
            f"{limit.cpus} CPUs, {format_bytes(limit.memory_bytes)}, at most "
            f"{format_duration(lending.max_time)}, {'with' if lending.network else 'no'} network"
        )

    async def problems(self) -> tuple[str, ...]:
        """Return why what the owner means to lend cannot be lent."""
        problem = await self._problem() if self._settings.lending.enabled else ""
        return (f"lending: {problem}",) if problem else ()

    async def digest(self, community: str) -> Offered | None:
        """Return what is offered to a community now; None when nothing is."""
        if await self._refusal(community):
            return None
        limit, lending = await self._limit(), self._settings.lending
        return Offered(
            capacity=limit,
            free=await self._free(limit),
            max_time_seconds=int(lending.max_time.total_seconds()),
            network=lending.network,
            isolation="bubblewrap",
        )

    async def grant(self, request: LeaseRequest) -> LeaseGrant:
        """Decide on a loan and make it real; the same request gets the same grant.

        Raises `Forbidden`, `NoCapacity`, `InvalidSpec`, or `Conflict` for a loan that is over.
        """
        async with self._deciding:
            if await self._leases.find(request.lease_id) is not None:
                return await self._again(request)
            if not self.open:
                raise Unavailable(f"{self._settings.name} is starting or stopping.")
            if refusal := await self._refusal(request.community):
                raise Forbidden(f"{self._settings.name} lends nothing: {refusal}")
            lease = await self._intend(request)
        try:
            machine = await self._local().launch(lease)
            grant = self._write_grant(request, lease, machine.folder)
            lease = lease.model_copy(update={"state": LeaseState.ACTIVE, "machine": machine})
            await self._papers.save_grant(request.community, lease.id, grant.model_dump_json())
            await self._leases.save(lease)
        except BaseException:  # whatever it was, and also when the asker went away meanwhile
            await asyncio.shield(self.end(lease, "it could not be granted"))
            raise
        self._guests[lease.id] = Guest(lease, self._local())
        log.info("lent", lease=lease.id, need=str(lease.need), to=request.borrower[:16])
        self.on_change()
        return grant

    async def renew(self, lease_id: str, borrower: str, until: datetime) -> LeaseGrant:
        """Refuse: loans end when they said they would. A longer one is asked for at the start."""
        await self._of(lease_id, borrower)
        raise Forbidden(
            f"{self._settings.name} does not lengthen leases.", hint="Ask for more time at first."
        )

    async def release(self, lease_id: str, borrower: str) -> None:
        """Take back a loan at its borrower's word. Idempotent."""
        with contextlib.suppress(NotFound):
            lease = await self._of(lease_id, borrower)
            if lease.live:
                await self.end(lease, "given back")

    async def end(self, lease: Lease, reason: str) -> None:
        """End a loan for good: nobody enters any more, and what it gave is removed. Idempotent."""
        self._guests.pop(lease.id, None)
        self._dead_since.pop(lease.id, None)
        if self._gateway:
            await self._gateway.cut(lease.id)
        await self._local().terminate(lease.id)
        released = {"state": LeaseState.RELEASED, "reason": reason}
        await self._leases.save(lease.model_copy(update=released))
        log.info("loan ended", lease=lease.id, reason=reason)
        self.on_change()

    async def end_the_dead(self) -> None:
        """End loans whose sandbox has ended by itself, a minute after that was first seen: until
        then the borrower can still learn why."""
        now = datetime.now(UTC)
        for lease in await self._leases.live():
            if lease.role is not LeaseRole.LENT or lease.state is not LeaseState.ACTIVE:
                continue
            reason = await self._local().ended(lease.id)
            if not reason:
                self._dead_since.pop(lease.id, None)
            elif now - self._dead_since.setdefault(lease.id, now) > _WORD_OF_THE_END:
                await self._try_to_end(lease, reason)

    async def end_all(self, reason: str) -> None:
        """Lend nothing more, and end every loan, those just being granted too."""
        self.open = False
        async with self._deciding:  # who was let in before has written an intent by now
            lent = [lease for lease in await self._leases.live() if lease.role is LeaseRole.LENT]
        for lease in lent:
            await self._try_to_end(lease, reason)

    async def _try_to_end(self, lease: Lease, reason: str) -> None:
        try:
            await self.end(lease, reason)
        except GridcloudError as error:  # it stays on the books, and is tried again
            log.error("loan not ended", lease=lease.id, cause=str(error))

    async def _of(self, lease_id: str, borrower: str) -> Lease:
        lease = await self._leases.find(lease_id)
        if lease is None or lease.role is not LeaseRole.LENT:
            raise NotFound(f"There is no lease {lease_id} here.")
        if lease.peer != borrower:
            raise Forbidden("That lease is another site's.")
        return lease

    async def _again(self, request: LeaseRequest) -> LeaseGrant:
        lease = await self._of(request.lease_id, request.borrower)
        document = await self._papers.grant(lease.id)
        if not lease.live or document is None:
            raise Conflict("That lease is over.", hint="Ask for a new one.")
        return LeaseGrant.model_validate_json(document)

    async def _intend(self, request: LeaseRequest) -> Lease:
        lending, need = self._settings.lending, request.need
        limit = await self._limit()
        if lacking := limit.lacking(need.resources):
            raise InvalidSpec(f"{self._settings.name} lends less: {', '.join(lacking)}.")
        if lacking := (await self._free(limit)).lacking(need.resources):
            raise NoCapacity(f"{self._settings.name} {', '.join(lacking)} at the moment.")
        if need.time and need.time > lending.max_time:
            longest = format_duration(lending.max_time)
            raise InvalidSpec(f"{self._settings.name} lends for {longest} at most.")
        now = datetime.now(UTC)
        length = min(need.time + STAGING_TIME, lending.max_time) if need.time else lending.max_time
        lease = Lease(
            id=request.lease_id,
            role=LeaseRole.LENT,
            state=LeaseState.INTENT,
            provider="local",
            need=need,
            created_at=now,
            ends_at=now + length,
            community=request.community,
            peer=request.borrower,
            person=request.person,
        )
        await self._leases.save(lease)
        return lease

    def _write_grant(self, request: LeaseRequest, lease: Lease, folder: str) -> LeaseGrant:
        assert lease.ends_at
        host, port = parse_address(self.gateway_address)
        certificate = self._keyring.user_ca.issue(
            request.ssh_public_key, lease.id, lease.created_at, lease.ends_at
        )
        return LeaseGrant(
            lease_id=lease.id,
            community=request.community,
            lender=self._keyring.identity.key,
            borrower=request.borrower,
            person=request.person,
            need=lease.need,
            endpoint=Endpoint(
                host=host,
                port=port,
                user=lease.id,
                host_keys=(public_line(self._keyring.gateway_host_key),),
            ),
            certificate=certificate,
            folder=folder,
            starts_at=lease.created_at,
            ends_at=lease.ends_at,
        )

    async def _problem(self) -> str:
        host, _ = parse_address(self._settings.gateway.listen)
        if host in ("0.0.0.0", "::") and not self._settings.gateway.advertise:  # noqa: S104
            return "gateway.advertise must say under which HOST:PORT peers reach this gateway"
        return await self._local().lending_problem()

    async def _refusal(self, community: str) -> str:
        lending = self._settings.lending
        if not lending.enabled:
            return "its owner has not enabled lending"
        if lending.communities and community.split(".", maxsplit=1)[0] not in lending.communities:
            return "not to this community"
        return await self._problem()

    async def _limit(self) -> Resources:
        """Return what may be lent in all: the settings' bounds within what the host has."""
        lending = self._settings.lending
        have = (await self._local().capacity()).resources
        return Resources(
            cpus=min(have.cpus, lending.cpus or have.cpus),
            memory_bytes=min(have.memory_bytes, lending.memory or have.memory_bytes),
        )

    async def _free(self, limit: Resources) -> Resources:
        live = await self._leases.live()
        have = (await self._local().capacity()).resources.minus(taken(live, "local"))
        left = limit.minus(taken(live, "local", LeaseRole.LENT))
        return have.within(left)
