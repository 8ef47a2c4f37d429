"""Which machine is made: the smallest that fits, only where nothing else will do, and why."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.model.prices import Prices
from gridcloud.model.shape import Headroom
from gridcloud.orchestration import line
from gridcloud.orchestration.market import Market, Wish
from gridcloud.orchestration.planner import judge, plan

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def shape(name, cpus, gib=4, gpus=0, *, at="aws", region="eu", lacking="", **more):
    has = Resources(cpus=cpus, memory_bytes=gib * GIB, gpus=gpus)
    more = {"cost": cpus * 0.1, "currency": "EUR"} | more
    return Offer(
        site="home",
        provider=at,
        capacity=has,
        free=Resources() if lacking else has,
        problem=lacking,
        shape=name,
        region=region,
        **more,
    )


def machine(site, cpus, *, free=None, peer=None, gpus=0, **more):
    have = {"memory_bytes": 64 * GIB, "gpus": gpus}
    return Offer(
        site=site,
        provider="local",
        peer=peer,
        capacity=Resources(cpus=cpus, **have),
        free=Resources(cpus=cpus if free is None else free, **have),
        **more,
    )


def best(offers, strategy=Strategy.FIRST_FIT, *, spot=False, constraints=None, **need):
    winners = plan(Need(**need), offers, None, constraints, strategy, spot=spot).winners
    return winners[0].shape or winners[0].site if winners else None


SIZES = st.builds(
    lambda number, cpus, gib, gpus, cost: (number, cpus, gib, gpus, cost),
    st.integers(0, 99),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0, 0, 1, 2]),
    st.sampled_from([None, 0.1, 0.2, 0.4]),
)


@given(
    st.lists(SIZES, min_size=1, max_size=12),
    st.sampled_from(Strategy),
    st.builds(
        Need,
        cpus=st.integers(1, 8),
        memory_bytes=st.integers(1, 8).map(lambda gib: gib * GIB),
        gpus=st.integers(0, 2),
    ),
    st.booleans(),
)
@settings(max_examples=300)
def test_never_larger_than_another_that_fits_and_is_not_dearer(sizes, strategy, need, one_money):
    """Whatever the strategy, and whether or not prices can be compared."""
    offers = [
        shape(
            f"s{index}",
            cpus,
            gib,
            gpus,
            at=f"cloud-{number % 3}",
            cost=cost,
            currency="EUR" if one_money else ["EUR", "USD", "DKK"][number % 3],
        )
        for index, (number, cpus, gib, gpus, cost) in enumerate(sizes)
    ]
    fit = [offer for offer in offers if not offer.capacity.lacking(need.resources)]
    winners = plan(need, offers, strategy=strategy).winners
    assert len(winners) == len(fit)
    if not winners:
        return
    chosen = winners[0]
    mine = chosen.capacity
    for other in fit:
        has = other.capacity
        smaller = has != mine and not mine.lacking(has)
        same_money = other.currency == chosen.currency or chosen.cost == other.cost is None
        known = chosen.cost is None or (other.cost is not None and other.cost <= chosen.cost)
        assert not (smaller and same_money and known)
    if not need.gpus and any(not offer.capacity.gpus for offer in fit):
        assert not mine.gpus, "no GPU is taken by who needs none"


@pytest.mark.parametrize("strategy", [s for s in Strategy if s is not Strategy.CHEAPEST])
def test_nothing_is_made_while_something_there_will_do(strategy):
    """Own machines come first, then peers with room; a full one does not count."""
    cloud = shape("s", 2, cost=0.0)
    assert best([cloud, machine("home", 4)], strategy) == "home"
    assert best([cloud, machine("uni", 4, peer="k")], strategy) == "uni"
    assert best([cloud, machine("home", 4, free=0)], strategy) == "s"


def test_cheapest_weighs_a_machine_against_credits():
    """A credit counts as a unit of the currency; what costs nothing wins."""
    dear = machine("uni", 4, peer="k", prices=Prices(cpu_hour=1.0))
    cheap = machine("uni", 4, peer="k", prices=Prices(cpu_hour=0.05))
    free = machine("home", 4)
    made = shape("s", 2, cost=0.2)
    assert best([dear, made], Strategy.CHEAPEST) == "s"
    assert best([cheap, made], Strategy.CHEAPEST) == "uni"
    assert best([free, made], Strategy.CHEAPEST) == "home"


def test_gpus_are_left_to_who_needs_them():
    """Even the cheapest machine with a GPU is the last choice for work without."""
    offers = [shape("gpu", 2, gpus=1, cost=0.01), shape("plain", 8, cost=9.0)]
    for strategy in Strategy:
        assert best(offers, strategy) == "plain"
        assert best(offers, strategy, gpus=1) == "gpu"


def test_prices_of_several_currencies_are_not_compared():
    """Then size alone decides, and the price only between equals."""
    offers = [
        shape("small", 1, cost=9.0, currency="USD", at="a"),
        shape("large", 2, cost=1.0, currency="EUR", at="b"),
        shape("small-too", 1, cost=8.0, currency="USD", at="a"),
    ]
    assert best(offers) == "small-too"
    assert best([offers[0], offers[1]]) == "small"
    assert best([each.model_copy(update={"currency": "EUR"}) for each in offers]) == "large"
    assert best([*offers, machine("home", 8)], Strategy.CHEAPEST) == "home"


def test_a_shape_without_a_price_where_others_have_one_comes_last():
    """It may be the dearest of all; a cloud that names no price at all is taken to be free."""
    offers = [shape("secret", 64, cost=None), shape("known", 2, cost=5.0)]
    assert best(offers) == "known"
    assert best([shape("own", 4, cost=None, at="stack"), *offers]) == "own"
    assert best(offers[:1], constraints=Constraints(max_price=9), time=HOUR) == "secret"
    assert best(offers, constraints=Constraints(max_price=1), time=HOUR) is None


def test_the_highest_price_holds_for_clouds_too():
    """It is what an hour of the whole machine costs, not of the part that is needed."""
    judged = plan(
        Need(time=2 * HOUR), [shape("s", 8, cost=0.8)], constraints=Constraints(max_price=1)
    )
    assert judged.verdicts[0].reasons == ("costs 1.6 EUR, 1 at most are given",)
    assert best([shape("s", 8, cost=0.8)], constraints=Constraints(max_price=2), time=2 * HOUR)
    assert best([shape("s", 8, cost=0.8)], constraints=Constraints(max_price=2)) is None


def test_a_flexible_shape_counts_as_large_as_it_would_be_made():
    """Up to 64 CPUs, but 2 of them are cheaper than a fixed 4, and 8 dearer."""
    flexible = shape("flex", 64, 512, cost=6.4, flexible=True)
    fixed = shape("fixed", 8, cost=0.5)
    assert best([flexible, fixed], cpus=2) == "flex"
    assert best([flexible, fixed], cpus=8) == "fixed"
    assert flexible.hourly(Resources(cpus=2)) == pytest.approx(0.2)


def test_capacity_that_may_be_taken_back_only_for_who_asks():
    """And who asks gets no other machine made; what is there already serves both."""
    offers = [shape("firm", 2), shape("spot", 2, spot=True, cost=0.01)]
    assert best(offers) == "firm"
    assert best(offers, spot=True) == "spot"
    assert best([*offers, machine("home", 4)], spot=True) == "home"
    reasons = {v.offer.shape: v.reasons for v in plan(Need(), offers).verdicts if v.reasons}
    assert reasons == {"spot": ("its cloud may take it back",)}
    reasons = {v.offer.shape: v.reasons for v in plan(Need(), offers, spot=True).verdicts}
    assert reasons["firm"] == ("is no spot capacity",)
    job = Job(
        id="j",
        spec=JobSpec(command=("true",), machine=MachineOrder(spot=True)),
        created_at=NOW,
    )
    placing = line.place([job], Market(offers), now=NOW)
    assert [offer.shape for _, offer in placing.placed] == ["spot"]


def test_a_shape_beyond_the_quota_may_serve_later():
    """And says what the quota lacks, once."""
    offers = [shape("s", 8, lacking="its quota has 2 of 8 CPUs left")]
    judged = plan(Need(), offers)
    assert judged.possible_later
    assert judged.verdicts[0].reasons == ("its quota has 2 of 8 CPUs left",)


# Many at once


def placed(offers, count, **need):
    spec = JobSpec(command=("true",), need=Need(**need))
    jobs = [Job(id=f"j{n}", spec=spec, created_at=NOW) for n in range(count)]
    placing = line.place(jobs, Market(offers), now=NOW)
    return [offer.shape for _, offer in placing.placed], placing


@given(
    st.integers(0, 12),
    st.integers(0, 30),
    st.integers(0, 8),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=6),
)
def test_an_array_never_exceeds_the_quota_its_shapes_share(jobs, cpus, machines, sizes):
    """However many tasks, and every one of them gets the smallest that there is room for."""
    quota = Headroom(cpus=cpus, machines=machines)
    offers = [
        shape(f"s{n}", size, quota=quota, lacking=", ".join(quota.lacking(Resources(cpus=size))))
        for n, size in enumerate(sizes)
    ]
    names, _ = placed(offers, jobs)
    used = [next(o.capacity.cpus for o in offers if o.shape == name) for name in names]
    assert sum(used) <= cpus
    assert len(names) <= machines
    smallest = min(sizes)
    assert set(used) <= {smallest}
    assert len(names) == min(jobs, machines, cpus // smallest)


def test_many_machines_of_one_shape_are_made_at_once():
    """A shape is not used up by the first; another region goes on where the quota ends."""
    small = Headroom(machines=2)
    offers = [
        shape("a", 2, region="eu", quota=small),
        shape("b", 2, region="us", cost=0.3),
    ]
    names, _ = placed(offers, 4)
    assert names == ["a", "a", "b", "b"]
    names, placing = placed(offers[:1], 3)
    placing.explain({"j2"})
    assert names == ["a", "a"]
    assert "its quota allows no more machines" in placing.reasons["j2"]


def test_a_flexible_shape_takes_of_the_quota_what_is_made():
    """And is no larger than what is left."""
    quota = Headroom(cpus=5)
    flexible = shape("flex", 64, 512, flexible=True, quota=quota)
    names, _ = placed([flexible], 4, cpus=2)
    assert names == ["flex", "flex"]


def test_a_look_after_a_round_begins_anew():
    """What was taken or left alone in one round does not count in the next."""
    quota = Headroom(machines=1)
    offers = [shape("a", 2, quota=quota), shape("b", 2, region="us", cost=0.3)]
    market = Market(offers)
    spec = JobSpec(command=("true",))
    jobs = [Job(id=f"j{n}", spec=spec, created_at=NOW) for n in range(2)]
    for _ in range(2):
        market = market.refreshed(offers)
        placing = line.place(jobs, market, now=NOW)
        assert [offer.shape for _, offer in placing.placed] == ["a", "b"]
    market = market.refreshed(offers)
    market.shut({"own/aws/eu"}, "refused a moment ago")
    placing = line.place(jobs, market, now=NOW)
    assert [offer.shape for _, offer in placing.placed] == ["b", "b"]
    market = market.refreshed(offers)
    assert market.refreshed(offers) is market, "nothing changed, and nothing was taken"


def test_a_new_price_reorders_what_was_there():
    """Whether prices can be compared depends on all of them, not on those that are new."""
    offers = [shape("large", 4, cost=0.1, at="a"), shape("small", 2, cost=0.2, at="b")]
    market = Market(offers)
    assert judge(market, Wish(Need())).winners[0].shape == "large"
    foreign = shape("huge", 8, cost=0.1, currency="USD", at="c")
    market = market.refreshed([*offers, foreign])
    assert judge(market, Wish(Need())).winners[0].shape == "small"
    market = market.refreshed(offers)
    assert judge(market, Wish(Need())).winners[0].shape == "large"


# What is told


def many(count, cloud="aws", **more):
    return [shape(f"s{n:03}", 1 + n % 4, at=cloud, **more) for n in range(count)]


def test_five_hundred_shapes_too_small_are_one_sentence():
    """The largest of each cloud are told, the others counted."""
    offers = [*many(500), *many(300, "stack"), machine("home", 2)]
    for most in (None, 20):
        told = plan(Need(cpus=8), offers, most=most).explain()
        assert len(told) < 600
        assert "home/local: has 2 of 8 CPUs" in told
        assert "in eu: has 4 of 8 CPUs" in told
        assert "and 498 more shapes of home/aws" in told
        assert "and 298 more shapes of home/stack" in told


def test_each_cloud_is_told_of_where_only_some_are():
    """The first few hundred verdicts are not all of one cloud."""
    offers = [*many(300, "a", cost=0.1), *many(300, "b", cost=0.2), machine("home", 0)]
    judged = plan(Need(), offers, most=50)
    assert {v.offer.provider for v in judged.verdicts} == {"a", "b", "local"}
    assert [v.rank for v in judged.verdicts if v.rank] == list(range(1, len(judged.winners) + 1))
    assert judged.fit == 600
    assert judged.left_out + len(judged.verdicts) == len(offers)
    assert sum(judged.shapes_left_out.values()) == judged.left_out


def test_whoever_comes_second_knows_why():
    """By the strategy's own measure."""
    offers = [
        machine("home", 4),
        machine("uni", 4, peer="k"),
        shape("small", 2),
        shape("large", 4),
        shape("twin", 4, gib=8, cost=0.4),
        shape("gpu", 2, gpus=1, cost=0.0),
    ]
    behind = {v.offer.label: v.behind for v in plan(Need(), offers).verdicts}
    assert behind["home/local"] == ""
    assert behind["uni/local"] == "farther away"
    assert behind["home/aws small in eu"] == "a machine would have to be made"
    behind = {v.offer.shape: v.behind for v in plan(Need(), offers[2:]).verdicts}
    assert behind == {
        "small": "",
        "large": "dearer",
        "twin": "dearer",
        "gpu": "its GPUs would stay idle",
    }
    cheapest = plan(Need(), offers[2:], strategy=Strategy.CHEAPEST)
    assert {v.offer.shape: v.behind for v in cheapest.verdicts}["gpu"] == "its GPUs would stay idle"
    behind = {v.offer.shape: v.behind for v in plan(Need(), offers[3:5]).verdicts}
    assert behind["twin"] == "more memory"


def test_a_job_lost_at_a_shape_may_be_made_another_machine():
    """It is that shape in that region which it does not go back to."""
    offers = [shape("a", 2), shape("a", 2, region="us", cost=0.3)]
    spec = JobSpec(command=("true",))
    job = Job(id="j", spec=spec, created_at=NOW, lost_at=("own/aws/eu/a",))
    placing = line.place([job], Market(offers), now=NOW)
    assert [offer.region for _, offer in placing.placed] == ["us"]
    job = job.model_copy(update={"lost_at": ("own/aws/eu/a", "own/aws/us/a")})
    assert not line.place([job], Market(offers), now=NOW).placed
