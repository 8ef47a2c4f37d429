"""A few seeds of what `make simulate` runs by the thousand; and that the simulation can be trusted:
it repeats itself, it notices what it should, and a crash of it is a crash."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from simulation.crashing import PROCESS, CrashingLoop, Process, let_go
from simulation.hosts import Host, HostProvider
from simulation.large import Stay, survey
from simulation.ledger import Ledger
from simulation.running import simulate
from simulation.scenario import Setting
from simulation.shared import Layered

TESTS = Path(__file__).parents[1]
SMALL = Setting(sites=4, latecomers=0, trouble=12.0, jobs_each=1.0, faults=4.0)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("light", [True, False], ids=["brokers", "whole"])
def test_a_grid_that_was_hurt_comes_to_rest_with_clean_books(light):
    """Crashes, cuts and storms: nothing lent twice, lost or leaked, and one roster for all."""
    report = simulate(11, replace(SMALL, light=light))
    assert report.violations == []
    assert report.counts["submitted"] > 0
    assert report.agreed_after is not None


def test_the_same_seed_is_the_same_run_in_any_process():
    """A failing seed can be looked at again: every message at the same instant."""
    program = (
        "from simulation.running import simulate; from simulation.scenario import Setting;"
        "print(simulate(5, Setting(sites=2, latecomers=0, trouble=4.0, faults=3.0)).trace)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(TESTS)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    traces = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert traces[0] == traces[1] != ""


def test_another_seed_is_another_run():
    """The trace is of what happened."""
    quick = Setting(sites=2, latecomers=0, trouble=3.0, faults=0.1)
    assert simulate(1, quick).trace != simulate(2, quick).trace


def test_a_large_grid_is_of_one_mind_after_churn():
    """What is measured at thousands of sites, with a dozen."""
    stay = Stay(warm_up=3, peace=3, churn=8, parted=5, churn_per_minute=1.0)
    found = survey(12, 1, stay)
    assert found.violations == []
    assert found.peace_messages > 0
    assert found.alone_bytes > 0


def test_an_owner_that_tears_nothing_down_is_found_out():
    """The simulated hardware keeps books of its own, so that a site's cannot hide a fault."""

    async def nothing(provider, lease_id):
        pass

    with patch.object(HostProvider, "terminate", nothing):
        report = simulate(11, replace(SMALL, rest=10.0))
    rules = {each.split(": ")[1] for each in report.violations}
    assert rules & {"capacity lent twice", "a lease leaked on the host"}


@pytest.fixture
def ledger():
    return Ledger(lambda: 0.0, {})


def lease(name, cpus=1):
    return Lease(
        id=name,
        role=LeaseRole.LENT,
        state=LeaseState.ACTIVE,
        provider="local",
        need=Need(cpus=cpus),
        created_at=NOON,
    )


def job(attempt=1, state=JobState.COMPLETED):
    spec = JobSpec(command=("work", "1"))
    return Job(id="j", spec=spec, state=state, created_at=NOON, attempts=attempt)


def rules(ledger):
    return [each.split(": ")[1] for each in ledger.violations]


def test_a_host_notices_what_is_placed_beyond_its_size(ledger):
    """And only that."""
    host = Host("s0", 3, lambda: NOON, lambda what, about: ledger.on_host(host, what, about))
    host.place(lease("a", 2))
    host.place(lease("a", 2))
    assert rules(ledger) == []
    host.place(lease("b", 2))
    assert rules(ledger) == ["capacity lent twice"]


def test_a_host_notices_a_lease_that_comes_back(ledger):
    """What was removed is not placed again under the same id."""
    host = Host("s0", 3, lambda: NOON, lambda what, about: ledger.on_host(host, what, about))
    host.place(lease("a"))
    host.remove("a")
    host.place(lease("a"))
    assert rules(ledger) == ["a lease that was over came back"]


def test_one_lease_is_granted_once_or_the_same(ledger):
    """A renewal moves its end alone; another borrower, or after its end, is a violation."""
    first = SimpleNamespace(
        lease_id="a", community="c", lender="l", borrower="b", person="p", need=Need(), ends_at=1
    )
    ledger.granted("s0", first)
    ledger.granted("s0", SimpleNamespace(**vars(first) | {"ends_at": 2}))
    assert rules(ledger) == []
    ledger.granted("s0", SimpleNamespace(**vars(first) | {"borrower": "x"}))
    assert rules(ledger) == ["one lease was granted twice, differently"]
    host = Host("s0", 3, lambda: NOON, lambda what, about: ledger.on_host(host, what, about))
    host.place(lease("a"))
    host.remove("a")
    ledger.granted("s0", SimpleNamespace(**vars(first) | {"borrower": "x"}))
    assert rules(ledger)[1:] == ["a lease was granted after its end"]


def test_results_are_of_one_attempt_and_there_when_a_job_is_done(ledger):
    """Repeating a stage-out is no harm; a second attempt's results are."""
    ledger.took("s0", job(1))
    ledger.took("s0", job(1))
    ledger.final("s0", job(1))
    assert rules(ledger) == []
    ledger.took("s0", job(2))
    assert rules(ledger) == ["results of two attempts were taken"]


@pytest.mark.parametrize(
    ("end", "rule"),
    [
        (job(1, JobState.QUEUED), "a job was never ended"),
        (job(1, JobState.COMPLETED), "a job is done without its results"),
    ],
)
def test_a_job_that_does_not_end_or_has_nothing_to_show_is_noticed(ledger, end, rule):
    """At the end of a run every job has ended, and the successful ones have results."""
    ledger.final("s0", end)
    assert rules(ledger) == [rule]


def test_nothing_of_a_killed_process_ever_runs_again():
    """As after kill -9: no handler, no `finally`, no timer; others do not notice."""
    said = []

    async def talk(name, process):
        process.enter()
        try:
            while True:
                said.append(name)
                await asyncio.sleep(1)
        except asyncio.CancelledError:
            said.append("a last word")
            raise
        finally:
            said.append("a last deed")

    async def main():
        one, other = Process("s0"), Process("s1")
        tasks = [asyncio.create_task(talk(p.site, p)) for p in (one, other)]
        await asyncio.sleep(1.5)
        one.kill()
        tasks[0].cancel()
        await asyncio.sleep(2)
        return list(said), (one, other)

    loop = CrashingLoop()
    heard, processes = loop.run_until_complete(main())
    let_go(loop, processes)
    assert heard == ["s0", "s1", "s0", "s1", "s1", "s1"]
    assert PROCESS.get() is None


@given(st.lists(st.tuples(st.sampled_from(["set", "del", "pop"]), st.integers(0, 6))))
def test_a_layered_dictionary_is_a_dictionary_and_spares_its_base(steps):
    """It behaves as a copy would, and what lies below never changes."""
    base = {number: number for number in range(4)}
    layered, plain = Layered(base), dict(base)
    for act, key in steps:
        if act == "set":
            layered[key] = plain[key] = -key
        elif act == "del" and key in plain:
            del layered[key], plain[key]
        elif act == "pop":
            assert layered.pop(key, None) == plain.pop(key, None)
        assert dict(layered) == plain
        assert len(layered) == len(plain)
        assert all((key in layered) == (key in plain) for key in range(8))
    assert base == {number: number for number in range(4)}
