"""Those who borrow wait fairly: nobody starves, and shares of those who always ask become equal."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.errors import NoCapacity
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.usage import FadingSums
from gridcloud.orchestration.consumption import Ledger
from gridcloud.orchestration.fairness import Claims
from gridcloud.orchestration.lender import Asker, Lender
from gridcloud.orchestration.policy import Full, decide
from gridcloud.settings import LendingSettings

START = datetime(2025, 11, 19, tzinfo=UTC)
STEP = timedelta(seconds=10)
OPTICS = f"optics.{'a' * 64}"


def asker(site, person="p"):
    return Asker(OPTICS, site, f"{person}@{site}", frozenset({"consumer"}))


class World:
    """One lender of some CPUs, and borrowers that ask step by step; pure deciders, no sites."""

    def __init__(self, cpus=8, rules=(), half_life=timedelta(days=7), **claims):
        self.now = START
        self.lending = LendingSettings.model_validate({"enabled": True, "rules": list(rules)})
        self.host = Resources(cpus=cpus, memory_bytes=1024 * GIB)
        self.lately = FadingSums(half_life)
        self.claims = Claims(**claims)
        self.ledger = Ledger()
        self.live = []
        self.granted = []
        self.ended = Counter()

    def ask(self, site, cpus, length, person="p"):
        """Ask once; return whether it was granted."""
        who, need = asker(site, person), Need(cpus=cpus)
        lender = Lender("uni", self.lending, self.host, tuple(self.live), self.ledger, zone=UTC)
        usage = self.lately.sums(self.now)
        for lease in self.live:
            usage[lease.peer] = usage.get(lease.peer, 0.0) + self.cpu_seconds(lease)
        try:
            decide(lender, who, need, self.now)
        except Full:
            self.claims.refused(who, need, self.now)
            return False
        if self.claims.before(lender, who, need, usage, self.now):
            self.claims.refused(who, need, self.now)
            return False
        self.claims.granted(who, need, self.now)
        self.granted.append(site)
        self.live.append(
            Lease(
                id=f"l{len(self.granted)}",
                role=LeaseRole.LENT,
                state=LeaseState.ACTIVE,
                provider="local",
                need=need,
                created_at=self.now,
                ends_at=self.now + length,
                community=OPTICS,
                peer=site,
                person=who.person,
            )
        )
        return True

    def step(self, by=STEP):
        """Let time pass; loans that are over end."""
        self.now += by
        for lease in [each for each in self.live if each.expired(self.now)]:
            self.live.remove(lease)
            self.ledger.add(lease.released("its end has come", self.now))
            self.ended[lease.peer] += self.cpu_seconds(lease)
            self.lately.add(lease.peer, self.now.timestamp(), self.cpu_seconds(lease))

    def used(self):
        """Return the CPU-seconds of each site so far."""
        total = self.ended.copy()
        for lease in self.live:
            total[lease.peer] += self.cpu_seconds(lease)
        return total

    def cpu_seconds(self, lease):
        """Return what a loan used by now."""
        return lease.need.cpus * (self.now - lease.created_at).total_seconds()


@pytest.mark.parametrize("more", [{"cpus": 4}, {"cpus": 9, "rules": [{"cpus": 4}]}])
def test_small_requests_do_not_starve_a_large_one(more):
    """Room gathers for who waits for much, though others would fit now and ask first; so does
    room under a rule."""
    world = World(**more)
    for _ in range(4):
        assert world.ask("small", 1, 3 * STEP)
        world.step()
    served = False
    for _ in range(20):
        for _ in range(4):
            world.ask("small", 1, 3 * STEP)
        served = world.ask("large", 4, 3 * STEP)
        if served:
            break
        world.step()
    assert served


def test_who_does_not_fit_a_smaller_gap_leaves_it_to_others():
    """A claim keeps back only requests that make it wait: others' room is not idle for it."""
    world = World(cpus=8, rules=[{"people": ["p@a", "p@b"], "cpus": 2}, {}])
    assert world.ask("a", 2, 100 * STEP)
    assert not world.ask("b", 2, STEP), "its rule is full"
    world.step()
    assert world.ask("c", 6, STEP), "what comes back under that rule will do for b"


def test_a_claim_that_is_not_repeated_lapses():
    """Who went away keeps nothing from others."""
    world = World(cpus=2)
    assert world.ask("a", 1, 2 * STEP)
    assert not world.ask("gone", 2, STEP)
    world.step()
    assert not world.ask("b", 1, STEP), "it would push back the claim"
    for _ in range(4):
        world.step()
    assert world.ask("b", 1, STEP)


def test_what_policy_does_not_lend_is_no_claim():
    """Who has reached a quota keeps nobody back: room alone would not help it."""
    world = World(cpus=4, rules=[{"per_site": {"cpus": 2}}])
    assert world.ask("a", 2, 100 * STEP)
    with pytest.raises(NoCapacity):
        world.ask("a", 1, STEP, "q")
    assert world.ask("b", 2, STEP)


def test_a_claim_that_can_not_be_served_any_more_keeps_nobody_back():
    """Its hours are over, say; others need not wait for what cannot be."""
    world = World(cpus=2, rules=[{"people": ["p@a"], "hours": "00:00-00:02"}, {}])
    assert world.ask("x", 1, 100 * STEP)
    world.step(timedelta(seconds=50))
    assert not world.ask("a", 2, STEP)
    world.step()
    assert not world.ask("b", 1, STEP)
    world.step()
    assert world.ask("b", 1, STEP)


def test_who_used_less_goes_first():
    """Of two that wait equally long, the one with the smaller share is served."""
    world = World(cpus=2)
    world.ask("much", 2, 360 * STEP)
    for _ in range(360):
        world.step()
    assert world.ask("third", 2, STEP)
    for site in ("much", "little"):
        assert not world.ask(site, 2, STEP)
    world.step()
    assert not world.ask("much", 2, STEP)
    assert world.ask("little", 2, STEP)


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 60), (1, 60)), ((2, 60), (2, 10)), ((4, 60), (1, 10)), ((1, 5), (1, 60))],
)
def test_shares_of_two_that_always_ask_become_equal(first, second):
    """However many CPUs and minutes the loans of each take, and whoever had all before."""
    world = World(cpus=4, half_life=timedelta(days=1), holds_for=timedelta(minutes=10))
    world.ask("a", 4, timedelta(hours=6))
    halfway, steps = Counter(), 4 * 24 * 12
    for step in range(steps):
        for site, (cpus, minutes) in (("a", first), ("b", second)):
            while world.ask(site, cpus, timedelta(minutes=minutes)):
                pass
        world.step(timedelta(minutes=5))
        if step == steps // 2:
            halfway = world.used()
    recent = world.used() - halfway
    assert 0.4 < recent["a"] / recent.total() < 0.6, recent


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whoever_keeps_asking_is_served_after_a_bounded_number_of_others(data):
    """Whatever the others are, do and had before, and in whatever order they ask."""
    passes, patience = 20, timedelta(minutes=10)
    world = World(cpus=8, passes=passes, patience=patience, most=16, most_each=4)
    large = data.draw(st.integers(1, 8))
    length = st.integers(1, 12)
    world.ask("victim", data.draw(st.integers(1, 8)), 500 * STEP)
    for _ in range(data.draw(st.integers(0, 60))):
        world.step(by=STEP * data.draw(st.integers(1, 60)))
        world.ask(f"s{data.draw(st.integers(0, 3))}", data.draw(st.integers(1, 8)), 3 * STEP)
    world.live = [each for each in world.live if each.peer != "victim"]
    before = len(world.granted)
    for _ in range(400):
        others = (
            data.draw(
                st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8), length), max_size=3)
            )
            if world.now.second % 30 == 0
            else [(s, 1 + s % 3, 2) for s in range(6)]
        )
        for site, cpus, steps in others:
            world.ask(f"s{site}", cpus, steps * STEP)
        if world.ask("victim", large, STEP, "v"):
            break
        world.step()
    else:
        raise AssertionError("it was never served")
    # It goes before all newcomers after `passes`; the claims older than its own, at most 16, and
    # what still runs then can come before.
    assert len(world.granted) - before <= passes + 16 + 8 + 1


def test_a_crowd_of_claims_of_one_site_leaves_room_for_others():
    """Claims are bounded in all and by site; whoever has most gives one up for a newcomer."""
    alone = Claims(most=6, most_each=4)
    for number in range(50):
        alone.refused(asker("greedy", f"p{number}"), Need(cpus=4), START)
    assert len(alone._claims) == 4
    claims = Claims(most=6, most_each=4)
    lender = Lender("uni", LendingSettings(enabled=True), Resources(cpus=4, memory_bytes=64 * GIB))
    for number in range(50):
        for site in ("greedy", "greedier"):
            claims.refused(asker(site, f"p{number}"), Need(cpus=4), START)
    claims.refused(asker("modest"), Need(cpus=4), START)
    later = START + timedelta(seconds=20)
    usage = {"greedy": 5.0, "greedier": 5.0}
    assert claims.before(lender, asker("modest"), Need(cpus=4), usage, later) is None
    ahead = claims.before(lender, asker("new"), Need(cpus=4), usage | {"new": 1.0}, later)
    assert ahead
    assert ahead.asker.borrower == "modest"


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200), st.integers(1, 16)), max_size=9)
)
def test_quotas_count_what_was_used_since(loans):
    """Use adds up by site, from the hour asked for on."""
    ledger = Ledger()
    for site, hours_ago, cpus in loans:
        begun = START - timedelta(hours=hours_ago + 1)
        lease = Lease(
            id="l", role=LeaseRole.LENT, state=LeaseState.ACTIVE, provider="local",
            need=Need(cpus=cpus), created_at=begun, peer=site, community=OPTICS, person=f"p@{site}",
        )  # fmt: skip
        ledger.add(lease.released("given back", begun + timedelta(hours=1)))
    for site in "ab":
        used = ledger.used(site, START - timedelta(hours=100))
        assert used == sum(c * 3600 for s, h, c in loans if s == site and h <= 100)
