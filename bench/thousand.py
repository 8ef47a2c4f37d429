"""What one site of a grid of a thousand weighs: ``make bench`` runs it, or by itself.

The site is the real thing, in a process of its own. Its community has a thousand members, each
with a key of its own, a membership signed by the founder, and an offer signed by itself. The
members are in the site's store when it starts. The others are a crowd in this process: each has
its own port, answers when the site looks whether it is there, hands out the offers when the site
asks for what it lacks, and looks whether the site is there as often as all others of a grid that
size would, two of them with a new offer each second. So the site has to do what it would have to
in peace, though the others are no whole sites.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import statistics
import tempfile
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import structlog
from rounds import Table
from testbed import SiteProcess, cpu_seconds

from gridcloud import __version__
from gridcloud.errors import GridcloudError
from gridcloud.grid.announcing import OFFER_HOLDS_FOR
from gridcloud.grid.calling import Caller
from gridcloud.grid.circles import Circle
from gridcloud.grid.community_store import MemoryCommunityStore, Shelf
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.links import MAX_LINKS
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import (
    Asking,
    DigestBody,
    Kind,
    MemberRecord,
    decode_body,
    decode_request,
    encode_refusal,
    encode_reply,
)
from gridcloud.grid.news import PAGE_BYTES, News, ProbeBody, ProbeReply, SyncBody, Word
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.papers import (
    CommunityPaper,
    Membership,
    OfferDigest,
    Offered,
    Presence,
    Role,
    community_id,
)
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.site.keyring import Keyring
from gridcloud.store.database import Database
from gridcloud.store.papers import PaperStore

MEMBERS = 1000
NAME = "thousand"
AIM_BYTES, IDLE_AIM = 200e6, "0.5 %"
#: How long an offer holds in a community of this size, and so how often one of them is made anew.
LIFE = max(OFFER_HOLDS_FOR, timedelta(seconds=MEMBERS))
OFFERS_PER_SECOND = MEMBERS / (LIFE.total_seconds() / 2)
SETTLE_SECONDS, IDLE_SECONDS, LOOKS = 20.0, 60.0, 20
_MEETS_PER_SECOND = 10
_TIMEOUT = 5.0


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


class Member:
    """One of the crowd: a key, a port, a credential."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.identity = Identity.generate()
        self.name = f"s{number}"
        self.asking: Asking
        self._offer = ""
        self._crowd = crowd
        self._transport = OverlayTransport(self.identity, "127.0.0.1:0")
        self._caller = Caller(self._transport, now)

    async def start(self) -> PeerAddress:
        """Begin to answer; return where."""
        await self._transport.start(self._handle)
        return self._transport.address()

    async def close(self) -> None:
        """Stop to answer."""
        await self._transport.close()

    async def probe(self, site: PeerAddress) -> None:
        """Look whether the site is there, and tell it what is new."""
        body = ProbeBody(words=(self._crowd.word(self.asking),))
        reply = await self._caller.ask(site, Kind.PROBE, body, ProbeReply, _TIMEOUT)
        self._crowd.hear(reply.words)

    def offer(self) -> str:
        """Return a new offer of this member."""
        at = now()
        draw = random.Random(self.identity.key)
        cpus = draw.choice([4, 16, 64, 128])
        capacity = Resources(cpus=cpus, memory_bytes=cpus * 4 * GIB)
        paper = OfferDigest(
            site=self.identity.key,
            site_name=self.name,
            community=self.asking.community,
            version=int(at.timestamp() * 1000),
            offered=Offered(
                capacity=capacity,
                free=capacity,
                max_time_seconds=24 * 3600,
                network=True,
                isolation="bubblewrap",
                country=draw.choice(["DK", "DE", "SE", "NO"]),
                provider="local",
            ),
            issued_at=at,
            expires_at=at + LIFE,
        )
        self._offer = sign(self.identity, paper)
        return self._offer

    async def _handle(self, _key: str, message: bytes) -> bytes:
        try:
            request = decode_request(message, now())
            return encode_reply(self._answer(request.kind, request.body), now())
        except GridcloudError as error:
            return encode_refusal(error, now())

    def _answer(self, kind: Kind, body: dict) -> Frozen:
        if kind is Kind.SYNC:
            return self._crowd.circle.page(decode_body(body, SyncBody), PAGE_BYTES)
        if kind is Kind.OFFERS:
            return DigestBody(digest=self._offer)
        self._crowd.hear(decode_body(body, ProbeBody).words)
        return ProbeReply(words=(self._crowd.word(self.asking),))


class Crowd:
    """All members but the site, who know the same."""

    def __init__(self) -> None:
        self.members = [Member(self, number) for number in range(MEMBERS - 1)]
        founder = self.members[0].identity
        self.community = community_id(NAME, founder.key)
        paper = CommunityPaper(name=NAME, founder=founder.key, created_at=now())
        self.founding = sign(founder, paper)
        self.circle: Circle
        self._fresh: deque[str] = deque()

    async def gather(self, site: Identity) -> dict[str, tuple[str, str]]:
        """Start all; return credentials and presences of all members, the site among them."""
        rows: dict[str, tuple[str, str]] = {}
        for member in self.members:
            credential, presence = self._admit(member.identity, member.name, await member.start())
            member.asking = Asking(
                community=self.community, credential=credential, presence=presence
            )
            rows[member.identity.key] = credential, presence
        rows[site.key] = self._admit(site, "site", PeerAddress(key=site.key))
        store = MemoryCommunityStore()
        await store.save_community(self.community, self.founding)
        await store.save(Shelf.MEMBER, self.community, rows)
        me = self.members[0].identity
        directory = Directory(me, store, now, lambda: PeerAddress(key=me.key))
        self.circle = Circle(directory, await directory.roster(self.community), now)
        for member in self.members:
            self.circle.book.add(member.offer())
        return rows

    def word(self, asking: Asking) -> Word:
        """Return what a member tells the site: what is new since the last one did."""
        news = News(offers=tuple(self._fresh))
        self._fresh.clear()
        return Word(
            **asking.model_dump(),
            members_digest=self.circle.roster.digest(),
            offers_digest=self.circle.book.digest(),
            news=news,
        )

    def hear(self, words: tuple[Word, ...]) -> None:
        """Learn what the site tells."""
        for word in words:
            record = MemberRecord(credential=word.credential, presence=word.presence)
            self.circle.roster.add(record)
            for document in word.news.offers:
                self.circle.book.add(document)

    async def meet(self, site: PeerAddress) -> None:
        """Have as many look for the site as it keeps links, one after the other."""
        for member in self.members[:MAX_LINKS]:
            await member.probe(site)
            await asyncio.sleep(1 / _MEETS_PER_SECOND)

    async def live(self, site: PeerAddress) -> None:
        """Do what the others of a grid in peace do, for ever."""
        due = time.monotonic()
        owed = 0.0
        while True:
            owed += OFFERS_PER_SECOND
            while owed >= 1:
                owed -= 1
                document = random.choice(self.members).offer()
                self.circle.book.add(document)
                self._fresh.append(document)
            await random.choice(self.members).probe(site)
            due += 1.0
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def close(self) -> None:
        """Let all go home."""
        await asyncio.gather(*(member.close() for member in self.members))

    def _admit(self, identity: Identity, name: str, where: PeerAddress) -> tuple[str, str]:
        founder = self.members[0].identity
        roles = tuple(Role) if identity is founder else (Role.PROVIDER, Role.CONSUMER)
        membership = Membership(
            community=self.community,
            member=identity.key,
            site_name=name,
            roles=roles,
            issued_at=now(),
            issuer=founder.key,
        )
        presence = Presence(
            site=identity.key, addresses=where.addresses, version=__version__, issued_at=now()
        )
        return sign(founder, membership), sign(identity, presence)


async def measure(base: Path, table: Table) -> None:
    """Gather the crowd, start the site among it, and print what it weighs."""
    site = SiteProcess(base / "site", "site")
    crowd = Crowd()
    try:
        await asyncio.to_thread(site.start)  # makes its store
        await asyncio.to_thread(site.stop)
        rows = await crowd.gather(Keyring(site.state / "keys").identity)
        await _fill(site.state / "site.db", crowd, rows)
        await asyncio.to_thread(site.start)
        await _weigh(table, site, crowd)
    finally:
        await asyncio.to_thread(site.close)
        await crowd.close()


async def _fill(path: Path, crowd: Crowd, rows: dict[str, tuple[str, str]]) -> None:
    database = Database(path)
    await database.open()
    papers = PaperStore(database)
    await papers.save_community(crowd.community, crowd.founding)
    await papers.save(Shelf.MEMBER, crowd.community, rows)
    await database.close()


async def _weigh(table: Table, site: SiteProcess, crowd: Crowd) -> None:
    assert site.process
    process = psutil.Process(site.process.pid)
    with site.client() as client:
        info = await asyncio.to_thread(client.site)
        where = PeerAddress(key=info.key, addresses=info.grid_addresses)
        await crowd.meet(where)
        living = asyncio.create_task(crowd.live(where))
        await asyncio.sleep(SETTLE_SECONDS)
        before, began = cpu_seconds(process), time.monotonic()
        await asyncio.sleep(IDLE_SECONDS)
        share = (cpu_seconds(process) - before) / (time.monotonic() - began)
        weight = process.memory_info().rss
        looks = []
        for _ in range(LOOKS):
            began = time.perf_counter()
            plan = (await asyncio.to_thread(client.offers, Need(cpus=2), most=10)).plan
            looks.append(time.perf_counter() - began)
        known = len(await asyncio.to_thread(client.grid, NAME))
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
    offers = len(plan.verdicts) + plan.left_out
    table.add(
        f"a site of a grid of {known}, in peace (aim ≤ {AIM_BYTES / 1e6:.0f} MB)",
        f"{weight / 1e6:.0f} MB, {share:.2%} of a core",
        f"{offers} offers known, load {os.getloadavg()[0]:.1f}",
    )
    table.add(
        f"its 'gridcloud offers' over {offers}, some peers asked anew",
        f"{statistics.median(looks) * 1e3:.0f} ms",
    )


def main() -> None:
    """Measure, print."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), Table()))


if __name__ == "__main__":
    main()
