"""The owner's side of a loan: what is offered, who gets it, when it ends.

What is decided is in `gridcloud.orchestration.policy` and `fairness`; here it is carried out: the
store first, then the sandbox, the gateway and the borrower's document. All that changes one loan
goes under that loan's lock, and reads it anew there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

import structlog

from gridcloud.access.keys import parse_public
from gridcloud.errors import Conflict, Forbidden, GridcloudError, NotFound, Unavailable
from gridcloud.grid.leasing import LeaseRequest
from gridcloud.grid.papers import LeaseGrant, Offered
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, taken
from gridcloud.model.loan import LoanInfo
from gridcloud.model.need import Need
from gridcloud.orchestration.lender import LENT_FROM
from gridcloud.orchestration.policy import renewed_until, whom_to_recall
from gridcloud.site.confining import Confining
from gridcloud.site.grants import Grants
from gridcloud.site.guests import Guest, Guests
from gridcloud.site.keyring import Keyring
from gridcloud.site.lending_desk import LendingDesk
from gridcloud.site.live_settings import LiveSettings
from gridcloud.site.ports import Ports
from gridcloud.site.recalling import Recalls
from gridcloud.store.leases import LeaseStore
from gridcloud.store.papers import PaperStore

log = structlog.get_logger()
_WORD_OF_THE_END = timedelta(minutes=1)
_MOST_CALLED_OFF = 4096


class Lending:
    """Grants, keeps and ends loans of this host. The owner alone decides: whatever a peer's
    message says, what is not in the settings is not given. See `gridcloud.grid.leasing.Owner`."""

    def __init__(
        self,
        settings: LiveSettings,
        keyring: Keyring,
        leases: LeaseStore,
        papers: PaperStore,
        ports: Ports,
        confining: Confining,
    ) -> None:
        self._live = settings
        self._leases = leases
        self._papers = papers
        self._keyring = keyring
        self._grants = Grants(keyring, papers)
        self._confining = confining
        #: Held from a look at what is free until what is given of it is written down.
        self.deciding = asyncio.Lock()
        self._recalling = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._dead_since: dict[str, datetime] = {}
        #: What was given back before it was asked for, oldest first.
        self._called_off: dict[tuple[str, str], None] = {}
        self._background: set[asyncio.Task[None]] = set()
        #: Decides, and says what is offered.
        self.desk = LendingDesk(settings, leases, confining, self._communities)
        self.guests = Guests(lambda: settings.current.gateway, keyring, ports)
        #: Tells borrowers of recalls; give it a way to reach them.
        self.recalls = Recalls()
        #: Whether loans are granted: not before a start has mended what the last run left.
        self.open = False
        #: Called when what is offered may have changed.
        self.on_change: Callable[[], None] = lambda: None
        #: Called with a loan that has ended, and its grant, before it is written down as over; if
        #: that is cut off, again. So it must be idempotent.
        self.on_ended: Callable[[Lease, LeaseGrant], Awaitable[None]] = _nothing_to_do
        #: Says whether a site is (still) a member of a community.
        self.still_member: Callable[[str, str], Awaitable[bool]] = _member
        settings.listeners.append(lambda before: self._adapt())

    @property
    def gateway_address(self) -> str:
        """Where guests are told to come; empty while nothing is lent."""
        return self.guests.address

    async def start(self) -> None:
        """Open the gateway if anything is lent, and let guests with live loans in again."""
        await self.desk.start()
        lent = [lease for lease in await self._lent() if lease.state is LeaseState.ACTIVE]
        if lent or self._live.current.lending.enabled:
            await self.guests.open()
        for lease in lent:
            with contextlib.suppress(NotFound):  # what confined it is gone: house-keeping's
                self.guests.add(Guest(lease, self._confining.of(lease)))
            await self._move_end(lease)  # as written down, should a crash have come in between
            if lease.recall and (grant := await self._grants.current(lease)):
                self.recalls.begin(grant, lease.recall.reason)

    async def stop(self) -> None:
        """Close the gateway; loans go on."""
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.recalls.close()
        await self.guests.close()

    async def digest(self, community: str) -> Offered | None:
        """Return what is offered to a community now; None when nothing is."""
        return await self.desk.digest(community)

    async def _communities(self) -> list[str]:
        """Return the communities that this site is a member of."""
        me = self._keyring.identity.key
        return [
            each for each in await self._papers.communities() if await self.still_member(each, me)
        ]

    async def loans(self) -> list[LoanInfo]:
        """Return what is lent, the oldest first."""
        lent = sorted(await self._lent(), key=lambda lease: (lease.created_at, lease.id))
        return [self._info(lease) for lease in lent]

    async def grant(self, request: LeaseRequest) -> LeaseGrant:
        """Decide on a loan and make it real; the same request gets the same grant.

        Raises what `policy.decide` does, `NoCapacity` if others have waited longer, `Conflict` for
        a loan that is over and `InvalidSpec` for what is no SSH key.
        """
        parse_public(request.ssh_public_key)  # before anything is started for it
        async with self._lock(request.lease_id):
            async with self.deciding:
                if await self._leases.find(request.lease_id) is not None:
                    return await self._again(request)
                if (request.borrower, request.lease_id) in self._called_off:
                    raise Conflict("That lease was given back.", hint="Ask for a new one.")
                if not self.open:
                    raise Unavailable(f"{self._live.current.name} is starting or stopping.")
                if refusal := await self.desk.refusal():
                    raise Forbidden(f"{self._live.current.name} lends nothing: {refusal}")
                lease = await self.desk.consider(request)
                await self._leases.save(lease)
                self.desk.lent(request)
            try:
                machine = await self._confining.launch(lease)
                address = self.guests.address
                grant = await self._grants.make(request, lease, machine.folder, address)
                lease = lease.activated(machine)
                await self._leases.save(lease)
            except BaseException:  # whatever it was, and also when the asker went away meanwhile
                await asyncio.shield(self._end(lease.id, "it could not be granted"))
                raise
            self.guests.add(Guest(lease, self._confining.of(lease)))
        log.info("lent", lease=lease.id, need=str(lease.need), to=request.borrower[:16])
        self.on_change()
        return grant

    async def renew(self, lease_id: str, borrower: str, until: datetime) -> LeaseGrant:
        """Let a loan last until then, or raise why it may not; see `policy.renewed_until`.

        Idempotent. Raises `Conflict` for a loan that is over or was recalled.
        """
        now = datetime.now(UTC)
        async with self._lock(lease_id):
            lease = await self._of(lease_id, borrower)
            if lease.expired(now):
                raise Conflict("That lease is over.", hint="Ask for a new one.")
            renewed = lease.renewed(until)
            if renewed is not lease:
                async with self.deciding:
                    renewed_until(await self.desk.lender(), lease, until, now)
                    await self._leases.save(renewed)
                await self._move_end(renewed)
                log.info("loan lengthened", lease=lease_id, ends_at=str(renewed.ends_at))
            grant = await self._grants.current(renewed)
        if grant is None:
            raise Conflict("That lease is over.", hint="Ask for a new one.")
        return grant

    async def release(self, lease_id: str, borrower: str) -> None:
        """Take back a loan at its borrower's word. Idempotent.

        One that is not known is not granted any more: its request may still be on its way.
        """
        async with self._lock(lease_id):
            try:
                await self._of(lease_id, borrower)
            except NotFound:
                self._called_off[borrower, lease_id] = None
                if len(self._called_off) > _MOST_CALLED_OFF:
                    del self._called_off[next(iter(self._called_off))]
            else:
                await self._end(lease_id, "given back")

    async def recall(self, lease_id: str, reason: str) -> Lease:
        """Let a loan end after its notice, and tell its borrower. Idempotent.

        Raises `NotFound`, and `Conflict` for one that is over or was lent without a notice.
        """
        async with self._lock(lease_id):
            lease = await self._lent_as(lease_id)
            recalled = lease.recalled(reason, datetime.now(UTC))
            if recalled is not lease:
                await self._leases.save(recalled)
                await self._move_end(recalled)
                log.info("loan recalled", lease=lease_id, reason=reason)
            if grant := await self._grants.current(recalled):
                self.recalls.begin(grant, reason)
        return recalled

    async def make_room(self, need: Need) -> None:
        """Take note that an own job waits for this, and recall the fewest loans that let it fit.

        To be said again while it waits: until half a minute after, nobody is lent what it needs.
        """
        if (await self._confining.capacity()).resources.lacking(need.resources):
            return
        async with self._recalling:
            async with self.deciding:
                self.desk.promise(need)
                live = await self._leases.live()
                have = (await self._confining.capacity()).resources
                free = have.minus(taken(live, LENT_FROM))
                lent = [lease for lease in live if lease.role is LeaseRole.LENT]
            for lease in whom_to_recall(need.resources, free, lent, datetime.now(UTC)):
                with contextlib.suppress(Conflict):  # it ended meanwhile
                    await self.recall(lease.id, "its owner's own users need it")

    def want_room(self, need: Need) -> None:
        """Begin to `make_room` and return at once; while that goes on, do nothing."""
        if self.open and not self._recalling.locked():
            self._in_background(self.make_room(need))

    async def end(self, lease: Lease, reason: str) -> None:
        """End a loan for good: nobody enters any more, and what it gave is removed. Idempotent."""
        async with self._lock(lease.id):
            await self._end(lease.id, reason)

    async def end_at_word(self, lease_id: str, *, now: bool) -> LoanInfo:
        """End a loan at its owner's word, after its notice or ``now``; return it as it is then.

        Raises `NotFound`, and `Conflict` for one that is over or has no notice.
        """
        if not now:
            return self._info(await self.recall(lease_id, "its owner wants it back"))
        lease = await self._lent_as(lease_id)
        await self.end(lease, "its owner ended it")
        return self._info(await self._lent_as(lease_id))

    async def end_all(self, reason: str) -> None:
        """Lend nothing more, and end every loan, those just being granted too."""
        self.open = False
        async with self.deciding:  # who was let in before has written an intent by now
            lent = await self._lent()
        for lease in lent:
            await self._try_to_end(lease, reason)

    async def end_all_of(self, community: str, reason: str) -> None:
        """End every loan to members of a community, by its full identity."""
        async with self.deciding:
            lent = [lease for lease in await self._lent() if lease.community == community]
        for lease in lent:
            await self._try_to_end(lease, reason)

    async def keep_house(self) -> None:
        """End loans whose sandbox has ended by itself, and those of who is no member any more;
        notice hours that begin or end; forget old grants. To be called now and then."""
        lent = await self._lent()
        for lease in lent:
            if lease.state is not LeaseState.ACTIVE:
                continue
            if not await self.still_member(lease.community or "", lease.peer or ""):
                await self._try_to_end(lease, "no longer a member")
            else:
                await self._end_if_dead(lease)
        if await self.desk.hours_changed():
            self.on_change()
        await self._grants.forget_old([lease.id for lease in lent], datetime.now(UTC))

    async def _end_if_dead(self, lease: Lease) -> None:
        """End a loan a minute after its sandbox was first seen to have ended by itself: until
        then the borrower can still learn why."""
        now = datetime.now(UTC)
        try:
            reason = await self._confining.of(lease).ended(lease.id)
        except NotFound as error:
            reason = str(error)
        if not reason:
            self._dead_since.pop(lease.id, None)
        elif now - self._dead_since.setdefault(lease.id, now) > _WORD_OF_THE_END:
            await self._try_to_end(lease, reason)

    async def _try_to_end(self, lease: Lease, reason: str) -> None:
        try:
            await self.end(lease, reason)
        except GridcloudError as error:  # it stays on the books, and is tried again
            log.error("loan not ended", lease=lease.id, cause=str(error))

    async def _end(self, lease_id: str, reason: str) -> None:
        lease = await self._leases.find(lease_id)
        if lease is None or not lease.live:
            return
        await self.guests.remove(lease_id)
        self.recalls.forget(lease_id)
        self._dead_since.pop(lease_id, None)
        await self._confining.terminate(lease)
        released = lease.released(reason, datetime.now(UTC))
        if lease.state is LeaseState.ACTIVE and (grant := await self._grants.current(lease)):
            await self.on_ended(released, grant)
        await self._leases.save(released)
        self.desk.ended(released)
        log.info("loan ended", lease=lease_id, reason=reason)
        self.on_change()

    async def _lent_as(self, lease_id: str) -> Lease:
        lease = await self._leases.find(lease_id)
        if lease is None or lease.role is not LeaseRole.LENT:
            raise NotFound(f"Nothing is lent here as {lease_id}.", hint="See 'gridcloud lent'.")
        return lease

    async def _of(self, lease_id: str, borrower: str) -> Lease:
        lease = await self._lent_as(lease_id)
        if lease.peer != borrower:
            raise Forbidden("That lease is another site's.")
        return lease

    async def _again(self, request: LeaseRequest) -> LeaseGrant:
        lease = await self._of(request.lease_id, request.borrower)
        active = lease.state is LeaseState.ACTIVE and not lease.expired(datetime.now(UTC))
        grant = await self._grants.current(lease) if active else None
        if grant is None:
            raise Conflict("That lease is over.", hint="Ask for a new one.")
        return grant

    async def _move_end(self, lease: Lease) -> None:
        """Let the sandbox and the gateway go by the lease's end."""
        assert lease.ends_at
        with contextlib.suppress(NotFound):  # it has ended: the house-keeping sees to that
            await self._confining.of(lease).extend(lease.id, lease.ends_at)
        self.guests.move_end(lease)

    async def _lent(self) -> list[Lease]:
        return [lease for lease in await self._leases.live() if lease.role is LeaseRole.LENT]

    def _info(self, lease: Lease) -> LoanInfo:
        notice = lease.terms.notice if lease.terms else None
        return LoanInfo(
            lease_id=lease.id,
            community=lease.community or "",
            borrower=lease.peer or "",
            person=lease.person or "",
            need=lease.need,
            state=lease.state,
            since=lease.created_at,
            ends_at=lease.ended_at or lease.ends_at,
            notice=notice,
            recalled=lease.recall.reason if lease.recall else "",
            told=lease.recall is not None and not self.recalls.under_way(lease.id),
        )

    def _adapt(self) -> None:
        """Go by changed settings: open the gateway if there is none yet, offer anew."""
        self._in_background(self._open_if_lending())

    async def _open_if_lending(self) -> None:
        try:
            if self._live.current.lending.enabled:
                await self.guests.open()
        finally:
            self.on_change()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_noted(work), name="lending")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _lock(self, lease_id: str) -> asyncio.Lock:
        return self._locks.setdefault(lease_id, asyncio.Lock())


async def _noted(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except GridcloudError as error:
        log.error("lending goes on as before", cause=str(error))


async def _nothing_to_do(lease: Lease, grant: LeaseGrant) -> None:
    pass


async def _member(community: str, key: str) -> bool:
    return True
