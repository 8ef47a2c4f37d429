"""Membership as people run it: real sites, the command line, over real QUIC."""

import json
from datetime import timedelta

import pytest

from gridcloud.errors import InvalidSpec
from gridcloud.model import JobSpec, JobState, Need
from gridcloud.model.choice import Constraints
from testbeds.sites import wait_until


def listed(site):
    """Return what a site lists of its communities."""
    return json.loads(site.cli("community", "list", "--json").stdout)


def names(site):
    """Return the names of the members, as a site lists them."""
    found = site.cli("community", "members", "physics", "--json")
    return [member["site_name"] for member in json.loads(found.stdout)]


def test_ask_approve_promote_remove_leave(new_site):
    """A site asks, waits over a restart, is admitted, made a manager, admits, and is removed."""
    one, two, three = (new_site(name) for name in ("one", "two", "three"))
    for site in (one, two, three):
        site.start()
    one.cli("community", "create", "physics")
    code = one.cli("community", "invite", "--approve", "--uses", "2", "physics").stdout.strip()
    asked = two.cli("community", "join", code)
    assert (asked.returncode, "waits for approval by one (" in asked.stdout) == (0, True), asked
    two.stop()
    two.start()
    assert "waits for approval" in two.cli("community", "list").stdout
    (request,) = json.loads(one.cli("community", "requests", "physics", "--json").stdout)
    assert request["site_name"] == "two"
    assert one.cli("community", "approve", "physics", "two").returncode == 0
    wait_until(lambda: listed(two)[0]["roles"])
    three.cli("community", "join", code)
    assert one.cli("community", "refuse", "physics", "three").returncode == 0
    wait_until(lambda: "refused to admit three" in listed(three)[0]["problem"])
    assert three.cli("community", "leave", "physics").returncode == 0
    assert listed(three) == []

    promoted = one.cli("community", "promote", "physics", "two", "--role", "manager")
    assert "two is now provider, consumer, manager" in promoted.stdout, promoted.stderr
    wait_until(lambda: "manager" in listed(two)[0]["roles"])
    code = two.cli("community", "invite", "physics").stdout.strip()
    assert three.cli("community", "join", code).returncode == 0
    assert names(one) == ["one", "three", "two"]

    refused = two.cli("community", "remove", "--yes", "physics", "one")
    assert (refused.returncode, "founder" in refused.stderr) == (77, True)
    asked = one.cli("community", "remove", "physics", "two", input="n\n")
    assert asked.returncode != 0
    assert names(one) == ["one", "three", "two"]
    gone = one.cli("community", "remove", "--yes", "--reason", "moved away", "physics", "two")
    assert gone.returncode == 0, gone.stderr
    wait_until(lambda: "by one: moved away" in listed(two)[0]["problem"])
    two.stop()
    two.start()
    assert "by one: moved away" in listed(two)[0]["problem"]
    done = two.cli("community", "members", "physics")
    assert (done.returncode, "removed from physics" in done.stderr) == (77, True), done
    assert names(three) == ["one", "three"]

    one.stop()
    left = three.cli("community", "leave", "physics.ab")
    assert left.returncode == 66
    left = three.cli("community", "leave", "physics")
    assert (left.returncode, "Nobody could be told" in left.stderr) == (0, True), left
    assert listed(three) == []


LENDER = '[providers.local]\ncpus = 2\nmemory = "4G"\n[lending]\nenabled = true\ndisk = "1G"\n'


def test_a_job_bound_to_a_community_ends_when_its_site_is_removed(new_site):
    """It waits for a member that has no room, but not for a membership that is over."""
    one, two = new_site("one", LENDER), new_site("two", "[providers.local]\ncpus = 1\n")
    for site in (one, two):
        site.start()
    one.cli("community", "create", "physics")
    two.cli("community", "join", one.cli("community", "invite", "physics").stdout.strip())
    need, inside = Need(cpus=2), Constraints(within=("physics",))
    with one.client() as owner, two.client() as user:
        wait_until(lambda: user.offers(need).plan.winners)
        (holder,) = owner.submit(JobSpec(command=("sleep", "300"), need=need))
        wait_until(lambda: not user.offers(need).plan.winners)
        bound = [
            user.submit(JobSpec(command=("true",), need=need, **more))[0]
            for more in ({"constraints": inside}, {"site": "one"})
        ]
        (free,) = user.submit(JobSpec(command=("true",), need=need))
        one.cli("community", "remove", "--yes", "--reason", "moved away", "physics", "two")
        for job in bound:
            (ended,) = user.wait(job.id, timedelta(seconds=60))
            assert ended.state is JobState.FAILED, two.log()
            assert "by one: moved away" in ended.message
        (late,) = user.job(free.id)
        assert late.state is JobState.QUEUED
        with pytest.raises(InvalidSpec, match="by one: moved away"):
            user.submit(JobSpec(command=("true",), need=need, constraints=inside))
        owner.cancel(holder.id)
