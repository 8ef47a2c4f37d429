"""Jobs bound to a community that this site is in no more end with the reason; others wait."""

import asyncio
from datetime import UTC, datetime

import pytest

from gridcloud.model.api import CommunityInfo
from gridcloud.model.choice import Constraints
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.market import Market, Wish
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.orchestration.standing import out_of_reach
from gridcloud.store.database import Database
from gridcloud.store.jobs import JobStore

PHYSICS, OPTICS = f"physics.{1:064x}", f"optics.{2:064x}"
REMOVED = "lab was removed from physics on 2026-05-01 by boss: moved away. Ask for an invitation."


def offer(site, community=None, cpus=4, problem=""):
    size = Resources(cpus=cpus, memory_bytes=64 * GIB)
    return Offer(
        site=site,
        provider="lent" if community else "local",
        peer=site if community else None,
        community=community,
        capacity=size,
        free=size,
        problem=problem,
    )


def barred(site):
    """What is known of a member of a community that this site was removed from."""
    nothing = {"capacity": Resources(), "free": Resources()}
    return offer(site, PHYSICS, problem=REMOVED).model_copy(update=nothing)


def community(whole, problem="", waiting=""):
    name, _, founder = whole.partition(".")
    return CommunityInfo(id=whole, name=name, founder=founder, problem=problem, waiting=waiting)


def wish(site=None, within=(), cpus=2):
    return Wish(Need(cpus=cpus), site, Constraints(within=within))


HOME = offer("home", cpus=1)
MEMBER, OUT = community(PHYSICS), community(PHYSICS, REMOVED)
ASKING = community(PHYSICS, "boss does not answer", waiting="waits for approval by boss")


@pytest.mark.parametrize(
    ("asked", "offers", "communities", "told"),
    [
        (wish(within=("physics",)), [HOME, barred("away")], [OUT], "removed from physics"),
        (wish(within=(PHYSICS,)), [HOME, barred("away")], [OUT], "by boss: moved away"),
        (wish(within=("own", "physics")), [HOME], [OUT], "removed from physics"),
        (wish("away"), [HOME, barred("away")], [OUT], "by boss: moved away"),
        (wish(within=("physics",)), [HOME], [], "not in physics any more. Join it again"),
        (wish(within=(PHYSICS,)), [HOME], [community(OPTICS)], "not in physics any more"),
        (wish(within=("physics", "optics")), [HOME], [OUT], "not in optics any more"),
        (wish("away"), [HOME], [], "in no community"),
        (wish("away", ("physics",)), [HOME, offer("away", OPTICS)], [OUT], "removed from physics"),
        (wish(within=("physics",)), [HOME], [community(PHYSICS, "boss refused lab")], "refused"),
    ],
)
def test_a_job_bound_to_what_is_gone_has_no_hope(asked, offers, communities, told):
    """The reason names who ended the membership, and what to do."""
    assert told in out_of_reach(asked, Market(offers), communities)


@pytest.mark.parametrize(
    ("asked", "offers", "communities"),
    [
        (wish(within=("physics",), cpus=1), [HOME, barred("away")], [OUT]),  # the own site is in it
        (wish(), [HOME, barred("away")], [OUT]),  # bound to nothing
        (wish(within=("own",)), [HOME], []),
        (wish(within=("physics",)), [HOME], [MEMBER]),  # nobody lends there at the moment
        (wish(within=("physics",)), [HOME], [ASKING]),
        (wish(within=("physics", "optics")), [HOME], [OUT, community(OPTICS)]),
        (wish("away"), [HOME, offer("away", PHYSICS, problem="unreachable")], [MEMBER]),
        (wish("away"), [HOME, barred("away"), offer("away", OPTICS, 0)], [OUT, community(OPTICS)]),
        (wish("gone"), [HOME], [MEMBER]),  # it may be a member again
        (wish("home"), [HOME], [OUT]),
    ],
)
def test_a_job_that_something_may_come_of_waits(asked, offers, communities):
    """Members that are away come back, and whoever asks may be admitted."""
    assert out_of_reach(asked, Market(offers), communities) == ""


class Leasing:
    """Nothing but a small site, and what is known of others."""

    async def offers(self):
        return [HOME, barred("away")]


async def test_a_job_in_line_fails_once_its_site_is_removed(tmp_path, monkeypatch):
    """What waits for the community ends with the reason, but not by a removal that is made good at
    once; what may run elsewhere goes on waiting."""
    database = Database(tmp_path / "site.db")
    await database.open()
    jobs, standing, asked = JobStore(database), [MEMBER], asyncio.Event()

    async def communities():
        asked.set()
        return list(standing)

    scheduler = Scheduler(jobs, Leasing(), None, cancel_grace=1)
    scheduler.communities = communities
    specs = {
        "inside": JobSpec(
            command=("true",), need=Need(cpus=2), constraints=Constraints(within=("physics",))
        ),
        "pinned": JobSpec(command=("true",), site="away"),
        "free": JobSpec(command=("true",), need=Need(cpus=2)),
    }
    new = [
        Job(id=name, spec=spec, state=JobState.QUEUED, created_at=datetime.now(UTC))
        for name, spec in specs.items()
    ]
    await jobs.add(new, "submitted")
    await scheduler.start()
    while len(await jobs.events(list(specs))) < 2 * len(specs):  # each told why it waits
        await asyncio.sleep(0.01)
    assert await jobs.count() == {JobState.QUEUED: 3}
    asked.clear()
    standing[:] = [OUT]
    scheduler.wake()
    await asyncio.wait_for(asked.wait(), 10)
    standing[:] = [MEMBER]
    asked.clear()
    scheduler.wake()
    await asyncio.wait_for(asked.wait(), 10)
    assert await jobs.count() == {JobState.QUEUED: 3}
    monkeypatch.setattr("gridcloud.orchestration.scheduler._HOPELESS_FOR", 0.0)
    standing[:] = [OUT]
    scheduler.wake()
    for name in ("inside", "pinned"):
        (ended,) = await scheduler.wait(name, 10)
        assert (ended.state, ended.outcome.reason) == (JobState.FAILED, "no-membership")
        assert "by boss: moved away" in ended.message
    assert (await jobs.get("free")).state is JobState.QUEUED
    await scheduler.stop()
    await database.close()
