"""The site's own capacity is given once, and a peer's grant is taken only as it was asked for."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from gridcloud.errors import Forbidden, NoCapacity
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.model.prices import Prices
from gridcloud.providers.base import Capacity
from gridcloud.site.leasing import SiteLeasing
from gridcloud.site.peers import Peers
from gridcloud.store.database import Database
from gridcloud.store.leases import LeaseStore

HOUR = timedelta(hours=1)
WHOLE = Resources(cpus=4, memory_bytes=8 * GIB)


class Host:
    name = kind = "local"

    async def capacity(self):
        return Capacity(resources=WHOLE)


@pytest.fixture
async def leases(tmp_path):
    database = Database(tmp_path / "site.db")
    await database.open()
    yield LeaseStore(database)
    await database.close()


def job(number, cpus):
    return Job(
        id=f"j{number}",
        spec=JobSpec(command=("true",), need=Need(cpus=cpus)),
        state=JobState.QUEUED,
        created_at=datetime.now(UTC),
    )


def loan(cpus):
    return Lease(
        id="loan",
        role=LeaseRole.LENT,
        state=LeaseState.INTENT,
        provider="local",
        need=Need(cpus=cpus),
        created_at=datetime.now(UTC),
        ends_at=datetime.now(UTC) + HOUR,
    )


async def test_what_was_lent_since_a_job_was_matched_is_not_given_twice(leases):
    """An offer is of a moment ago; own jobs and loans are decided one after the other."""
    deciding = asyncio.Lock()
    leasing = SiteLeasing("home", {"local": Host()}, leases, None, lambda: None, deciding)
    offer = Offer(site="home", provider="local", capacity=WHOLE, free=WHOLE)
    async with deciding:  # a loan is being decided on
        late = asyncio.create_task(leasing.intend(job(1, 3), offer))
        await leases.save(loan(2))
    with pytest.raises(NoCapacity, match="has 2 of 3 CPUs"):
        await late
    assert [lease.id for lease in await leases.live()] == ["loan"], "nothing is left of the try"
    assert (await leasing.intend(job(2, 2), offer)).live


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ends_at": 0.1 * HOUR}, "less time"),
        ({"ends_at": 9000 * HOUR}, "more than a year"),
        ({"prices": Prices(cpu_hour=9.0)}, "charge more"),
    ],
)
async def test_a_grant_that_is_not_what_was_offered_is_refused(changes, why):
    """Else a lender could make jobs fail by leases that end before them, or earn by surprise."""
    now = datetime.now(UTC)
    grant = SimpleNamespace(ends_at=now + 2 * HOUR, prices=Prices())
    for name, value in changes.items():
        setattr(grant, name, now + value if name == "ends_at" else value)

    async def request_lease(*_, **__):
        return grant

    peers = Peers.__new__(Peers)
    peers._broker = SimpleNamespace(request_lease=request_lease)
    peers._keyring = SimpleNamespace(new_loan_key=lambda lease_id: "key")
    lease = Lease(
        id="l",
        role=LeaseRole.BORROWED,
        state=LeaseState.INTENT,
        provider="lent",
        need=Need(time=2 * HOUR),
        created_at=now,
        job_id="j",
    )
    offer = Offer(
        site="uni",
        provider="lent",
        peer="a" * 64,
        community="optics",
        capacity=WHOLE,
        free=WHOLE,
        max_time=3 * HOUR,
    )
    with pytest.raises(Forbidden, match=why):
        await peers.borrow(lease, offer)


async def test_a_recall_that_overtakes_its_grant_stands(leases):
    """The lender's two words may arrive in either order; the earlier end holds."""
    now = datetime.now(UTC)
    intent = Lease(
        id="l",
        role=LeaseRole.BORROWED,
        state=LeaseState.INTENT,
        provider="lent",
        need=Need(),
        created_at=now,
        job_id="j",
    )
    await leases.save(intent)

    async def borrow(lease, offer):
        recall = {"ends_at": now + HOUR / 2, "reason": "own work"}
        await leases.change(lease.id, lambda kept: kept.model_copy(update=recall))
        return lease.model_copy(update={"state": LeaseState.ACTIVE, "ends_at": now + HOUR})

    async def renew(lease, until):
        return lease.model_copy(update={"ends_at": until})

    peers = SimpleNamespace(borrow=borrow, renew=renew)
    leasing = SiteLeasing("home", {}, leases, peers, lambda: None, asyncio.Lock())
    active = await leasing.fulfil(intent, None)
    assert (active.state, active.ends_at, active.reason) == (
        LeaseState.ACTIVE,
        now + HOUR / 2,
        "own work",
    )
    kept = await leasing.renew(active, now + 2 * HOUR)
    assert kept == active == await leases.find("l"), "a renewal does not undo it"
