"""The planner ranks, keeps to constraints, explains, and is fair to those who wait."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gridcloud.errors import InvalidSpec
from gridcloud.model.choice import Constraints, Order, Strategy
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.model.prices import Prices
from gridcloud.orchestration import line
from gridcloud.orchestration.line import LONGEST_DELAY
from gridcloud.orchestration.market import Market, Wish, able, suitable
from gridcloud.orchestration.planner import check_names, judge, plan
from gridcloud.orchestration.strategies import best

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
PHYSICS, OPTICS = f"physics.{0:064x}", f"optics.{1:064x}"


def offer(site, cpus, free=None, peer=None, **more):
    have = {"memory_bytes": 64 * GIB, "gpus": more.pop("gpus", 0)}
    return Offer(
        site=site,
        provider="local",
        peer=peer,
        capacity=Resources(cpus=cpus, **have),
        free=Resources(cpus=cpus if free is None else free, **have),
        **more,
    )


def job(name, cpus=1, *, at=NOW, time=None, lost_at=(), **spec):
    need = Need(cpus=cpus, memory_bytes=2**20, time=time)
    spec = JobSpec(command=("true",), need=need, **spec)
    return Job(id=name, spec=spec, created_at=at, lost_at=lost_at)


def place(jobs, offers, **how):
    """Return who is placed where, and who waits."""
    how = {"now": NOW} | how
    placing = line.place(jobs, Market(offers), **how)
    return placing.placed, placing.waiting


def names(judged):
    return [each.site for each in judged.winners]


def reasons(judged):
    return {v.offer.site: " ".join(v.reasons) for v in judged.verdicts if v.reasons}


def test_home_comes_first_then_the_emptiest_peer():
    """Work stays at home while there is room; among peers the one with most CPUs free wins."""
    offers = [offer("a", 8, 2, "ka"), offer("b", 8, 6, "kb"), offer("home", 2, 1)]
    assert [o.site for o in plan(Need(), offers).winners] == ["home", "b", "a"]


def test_every_loser_is_told_why():
    """Each reason names what is there and what was wanted."""
    offers = [offer("small", 2), offer("busy", 8, 1), offer("down", 8, problem="unreachable")]
    judged = plan(Need(cpus=4, gpus=1), offers)
    reasons = {v.offer.site: v.reasons for v in judged.verdicts}
    assert reasons["small"] == ("has 2 of 4 CPUs", "has 0 of 1 GPUs")
    assert not judged.winners
    assert not judged.possible_later


def test_later_means_it_fits_once_there_is_room():
    """A busy or unreachable offer that is large enough is worth waiting for."""
    judged = plan(Need(cpus=4), [offer("busy", 8, 1), offer("down", 8, problem="unreachable")])
    assert judged.possible_later
    assert {v.reasons for v in judged.verdicts} == {("has free now 1 of 4 CPUs",), ("unreachable",)}


def test_a_pinned_job_goes_nowhere_else():
    """A site chosen by the user is the only one considered."""
    judged = plan(Need(), [offer("a", 4), offer("b", 4, peer="kb")], site="b")
    assert [o.site for o in judged.winners] == ["b"]


def test_no_lease_shorter_than_the_need():
    """An owner who lends for an hour does not get a job of two."""
    judged = plan(Need(time=timedelta(hours=2)), [offer("a", 4, max_time=timedelta(hours=1))])
    assert judged.verdicts[0].reasons == ("lends for 1h 00m at most, 2h 00m are needed",)


def test_small_jobs_do_not_starve_a_large_one():
    """What an older job waits for is not given to younger ones."""
    placed, waiting = place([job("large", 4), job("small", 1)], [offer("a", 4, 3)])
    assert placed == []
    assert [j.id for j in waiting] == ["large", "small"]


def test_a_waiting_job_does_not_block_what_it_cannot_use():
    """An offer too small for the older job is free for the younger."""
    offers = [offer("big", 4, 3), offer("little", 1, peer="k")]
    placed, _ = place([job("large", 4), job("small", 1)], offers)
    assert [(j.id, o.site) for j, o in placed] == [("small", "little")]


@given(
    st.lists(st.integers(1, 5), max_size=12),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    st.sampled_from(Order),
    st.sampled_from(Strategy),
)
def test_never_more_than_is_free(needs, sizes, order, strategy):
    """Whatever is asked, no offer is given more than it has free, and no job is forgotten."""
    offers = [offer(f"s{i}", max(cap, free), free, f"k{i}") for i, (cap, free) in enumerate(sizes)]
    jobs = [job(f"j{i}", cpus) for i, cpus in enumerate(needs)]
    placed, waiting = place(jobs, offers, order=order, strategy=strategy)
    for each in offers:
        assert sum(j.spec.need.cpus for j, o in placed if o.site == each.site) <= each.free.cpus
    assert sorted(j.id for j in [j for j, _ in placed] + waiting) == sorted(j.id for j in jobs)


def test_an_offer_of_unknown_size_is_worth_waiting_for():
    """A machine that was never reached may turn out to be large enough."""
    unknown = offer("away", 0, known=False, problem="unreachable: no route")
    judged = plan(Need(cpus=64), [unknown])
    assert judged.possible_later
    assert judged.verdicts[0].reasons == ("unreachable: no route",)


# Strategies


def test_best_fit_leaves_large_room_whole():
    """The offer of which least is left over, by the resource of which most is left."""
    offers = [offer("huge", 64, 64), offer("snug", 4, 3, "k"), offer("half", 8, 6, "l")]
    judged = plan(Need(cpus=2, memory_bytes=63 * GIB), offers, strategy=Strategy.BEST_FIT)
    assert names(judged) == ["snug", "half", "huge"]


def test_best_fit_keeps_gpus_free_for_who_needs_them():
    """An offer whose GPUs would stay idle is the last choice."""
    offers = [offer("gpus", 4, gpus=4), offer("plain", 4, peer="k")]
    judged = plan(Need(cpus=4, memory_bytes=64 * GIB), offers, strategy=Strategy.BEST_FIT)
    assert names(judged) == ["plain", "gpus"]


def test_fair_fit_spreads():
    """Where this site used least of its fair part lately; among equals as best-fit."""
    offers = [
        offer("much", 8, peer="k", share=1.5),
        offer("wide", 8, peer="l", share=0.5),
        offer("snug", 2, peer="m", share=0.5),
    ]
    judged = plan(Need(memory_bytes=64 * GIB), offers, strategy=Strategy.FAIR_FIT)
    assert names(judged) == ["snug", "wide", "much"]


def test_cheapest_counts_all_that_is_needed():
    """Not the price of a CPU decides, but what the whole need costs."""
    dear_memory = Prices(cpu_hour=1, memory_gib_hour=1)
    offers = [
        offer("memory", 8, peer="k", prices=dear_memory),
        offer("cpus", 8, peer="l", prices=Prices(cpu_hour=3)),
        offer("free", 8, 1, "m"),
    ]
    judged = plan(Need(cpus=1, memory_bytes=8 * GIB), offers, strategy=Strategy.CHEAPEST)
    assert names(judged) == ["free", "cpus", "memory"]


def test_nearest_data_weighs_distance_by_the_inputs():
    """A little distance is nothing for small inputs, and much for large ones."""
    offers = [
        offer("near", 4, peer="k", latency_seconds=0.01),
        offer("far", 64, peer="l", latency_seconds=0.04),
        offer("unmeasured", 64, peer="m"),
    ]
    market = Market(offers)
    small, large = (
        Wish(Need(), strategy=Strategy.NEAREST_DATA, input_bytes=size) for size in (0, GIB)
    )
    assert best(market.rows, small).site == "far"
    assert best(market.rows, large).site == "near"
    home = [*offers, offer("home", 1)]
    assert names(plan(Need(), home, strategy=Strategy.NEAREST_DATA))[0] == "home"


# Constraints


@pytest.mark.parametrize(
    ("constraints", "winners", "word"),
    [
        ({"countries": ("dk",)}, ["home", "a"], "is in DE, not in DK"),
        ({"countries": ("SE",)}, [], "does not say in which country"),
        ({"kinds": ("ssh",)}, ["a"], "is of kind local, not ssh"),
        ({"within": ("own",)}, ["home"], "is outside own"),
        ({"within": ("physics",)}, ["home", "a"], "is outside physics"),
        ({"within": (PHYSICS, "optics")}, ["home", "a", "b", "c"], ""),
        ({"max_price": 4.0}, ["home", "a"], "costs 6 credits, 4 at most are given"),
        ({"max_price": 0.0}, ["home"], "costs 4 credits, 0 at most are given"),
    ],
)
def test_constraints_are_kept_and_explained(constraints, winners, word):
    """Whoever does not keep to one loses for good, with that reason."""
    offers = [
        offer("home", 4, country="DK", kind="local"),
        offer(
            "a", 4, 3, "ka", country="DK", kind="ssh", community=PHYSICS, prices=Prices(cpu_hour=1)
        ),
        offer(
            "b",
            4,
            2,
            "kb",
            country="DE",
            kind="local",
            community=OPTICS,
            prices=Prices(cpu_hour=1.5),
        ),
        offer("c", 4, 2, "kc", community=OPTICS, prices=Prices(cpu_hour=9)),
    ]
    judged = plan(Need(cpus=2, time=2 * HOUR), offers, constraints=Constraints(**constraints))
    assert names(judged) == winners
    assert word in judged.explain()
    assert not judged.possible_later


def test_a_price_cannot_be_kept_without_a_time():
    """What a job costs is not known then; who asks nothing is still welcome."""
    offers = [offer("free", 4), offer("dear", 4, peer="k", prices=Prices(cpu_hour=0.1))]
    judged = plan(Need(), offers, constraints=Constraints(max_price=100))
    assert names(judged) == ["free"]
    assert "only with --time" in judged.explain()


@pytest.mark.parametrize("code", ["XX", "D", "", "DNK", "ÅÅ", "UK"])
def test_an_unknown_country_is_refused(code):
    """With an example of what can be meant."""
    with pytest.raises(ValidationError, match="no country has the code"):
        Constraints(countries=(code,))


def test_an_unknown_community_is_refused_with_those_there_are():
    """A typo never becomes a job that waits for ever."""
    offers = [offer("a", 4, peer="k", community=PHYSICS)]
    with pytest.raises(InvalidSpec, match=r"'phisics'.* own, physics"):
        check_names(Wish(Need(), constraints=Constraints(within=("phisics",))), offers)
    check_names(Wish(Need(), constraints=Constraints(within=("own", "physics", PHYSICS))), offers)


def test_two_communities_of_one_name_have_to_be_told_apart():
    """The name alone could let a job out to the wrong one."""
    other = f"physics.{7:064x}"
    offers = [offer("a", 4, peer="k", community=PHYSICS), offer("b", 4, peer="l", community=other)]
    with pytest.raises(InvalidSpec, match="2 communities are called"):
        check_names(Wish(Need(), constraints=Constraints(within=("physics",))), offers)
    judged = plan(Need(), offers, constraints=Constraints(within=(other,)))
    assert names(judged) == ["b"]


def test_a_place_lost_before_is_not_gone_to_again():
    """It is barred for that job alone."""
    offers = [offer("a", 4, peer="k"), offer("b", 2, peer="l")]
    gone = job("again", lost_at=("k/local",))
    placed, _ = place([gone, job("other")], offers)
    assert {j.id: o.site for j, o in placed} == {"again": "b", "other": "a"}
    assert (
        "was lost there before"
        in judge(Market(offers), Wish.of(gone, Strategy.FIRST_FIT)).explain()
    )


OFFERS = st.lists(
    st.builds(
        lambda number, cpus, busy, peer, **more: offer(
            f"s{number}", cpus, max(0, cpus - busy), f"k{number}" if peer else None, **more
        ),
        number=st.integers(0, 5),
        cpus=st.integers(0, 6),
        busy=st.integers(0, 6),
        peer=st.booleans(),
        gpus=st.integers(0, 1),
        country=st.sampled_from(["", "DK", "DE"]),
        kind=st.sampled_from(["", "local", "ssh"]),
        community=st.sampled_from([None, PHYSICS, OPTICS]),
        prices=st.builds(Prices, cpu_hour=st.sampled_from([0, 0.1, 1.0, 1 / 3])),
        known=st.booleans(),
        problem=st.sampled_from(["", "unreachable"]),
        max_time=st.sampled_from([None, HOUR, 3 * HOUR]),
    ),
    max_size=6,
)
WISHES = st.builds(
    Wish,
    need=st.builds(
        Need,
        cpus=st.integers(1, 4),
        gpus=st.integers(0, 1),
        time=st.sampled_from([None, HOUR, 2 * HOUR]),
    ),
    site=st.sampled_from([None, "s0"]),
    constraints=st.builds(
        Constraints,
        countries=st.sampled_from([(), ("DK",), ("DK", "DE")]),
        kinds=st.sampled_from([(), ("ssh",)]),
        within=st.sampled_from([(), ("own",), ("physics",), (OPTICS,)]),
        max_price=st.sampled_from([None, 0.0, 0.2, 2.0]),
    ),
    strategy=st.sampled_from(Strategy),
    barred=st.sampled_from([(), ("k1/local",)]),
)


@given(OFFERS, WISHES)
def test_the_quick_search_agrees_with_the_reasons(offers, wish):
    """Whoever has no reason against it is found, whoever has one is not, and the best comes first
    whichever way it is looked for."""
    market = Market(offers)
    judged = judge(market, wish)
    assert len(judged.verdicts) == len(offers)
    assert all(bool(v.reasons) == (v.rank is None) for v in judged.verdicts)
    chosen = best(able(market.rows, wish), wish)
    assert (chosen.offer if chosen else None) == next(iter(judged.winners), None)
    later = [v for v in judged.verdicts if v.later]
    assert len(later) + len(judged.winners) == len(suitable(market.rows, wish))


def test_only_the_best_are_told_of_many():
    """The rest is counted, not listed; nor does an explanation grow without bound."""
    offers = [offer(f"s{i:03}", 1, peer=f"k{i}") for i in range(300)]
    some = plan(Need(), offers, most=7)
    assert [v.rank for v in some.verdicts] == list(range(1, 8))
    assert some.left_out == 293
    none = plan(Need(cpus=2), offers, most=20)
    assert len(none.explain()) < 500
    assert none.explain().endswith("and 292 more")


def test_offers_that_stay_are_not_read_again():
    """Only what changed costs anything; what was taken in a round is free again in the next."""
    offers = [offer("a", 4), offer("b", 4, peer="k")]
    market = Market(offers)
    line.place([job("j", 4)], market, now=NOW)
    fresh = market.refreshed([offers[1], offer("c", 9, peer="l"), offers[0]])
    assert [row.site for row in fresh.rows] == ["b", "c", "a"]
    assert [row.cpus for row in fresh.rows] == [4, 9, 4]
    assert fresh.rows[0] is market.rows[1]


# Order in line


def test_lifo_serves_the_youngest_first():
    """And what it waits for is not given to older ones."""
    jobs = [job("old"), job("middle"), job("young")]
    placed, waiting = place(jobs, [offer("a", 2)], order=Order.LIFO)
    assert [j.id for j, _ in placed] == ["young", "middle"]
    assert [j.id for j in waiting] == ["old"]
    placed, _ = place([job("small"), job("large", 4)], [offer("a", 4, 3)], order=Order.LIFO)
    assert placed == []


def test_in_fair_order_a_short_job_may_pass():
    """If it ends by its own limit before the large one has waited too long; else it stands back."""
    large = job("large", 4, at=NOW - 10 * timedelta(minutes=1))
    offers = [offer("a", 4, 3)]
    short, long = job("short", time=HOUR / 6), job("long", time=HOUR)
    placed, _ = place([large, long, job("unlimited"), short], offers, order=Order.FAIR)
    assert [j.id for j, _ in placed] == ["short"]
    placed, _ = place([large, short], offers, order=Order.FIFO)
    assert placed == []


def test_in_fair_order_nobody_passes_who_has_waited_long():
    """After the longest delay a job goes before all younger ones, however short these are."""
    large = job("large", 4, at=NOW - LONGEST_DELAY)
    short = job("short", time=timedelta(minutes=1))
    placed, waiting = place([large, short], [offer("a", 4, 3)], order=Order.FAIR)
    assert placed == []
    assert [j.id for j in waiting] == ["large", "short"]


def test_in_fair_order_the_more_urgent_passes_first():
    """Of those that may pass, who asks less for as long a wait is the more urgent."""
    large = job("large", 8, at=NOW - HOUR / 6)
    both = [
        job("wide", 3, at=NOW - HOUR / 6, time=HOUR / 10),
        job("slim", 1, at=NOW - HOUR / 6, time=HOUR / 10),
    ]
    placed, _ = place([large, *both], [offer("a", 8, 3)], order=Order.FAIR)
    assert [j.id for j, _ in placed] == ["slim"]


def test_in_fair_order_room_for_all_is_given_to_all():
    """Who stood back for an elder is placed in the same look, once that one is."""
    jobs = [job("old", 3, at=NOW - timedelta(minutes=1)), job("young", 1, at=NOW)]
    placed, _ = place(jobs, [offer("a", 4)], order=Order.FAIR)
    assert sorted(j.id for j, _ in placed) == ["old", "young"]


def test_who_waits_behind_another_is_told_so():
    """Room that is kept for an elder is no reason by itself."""
    placing = line.place([job("large", 4), job("small", 1)], Market([offer("a", 4, 3)]), now=NOW)
    placing.explain({"large", "small"})
    assert placing.reasons == {
        "large": "a/local: has free now 3 of 4 CPUs",
        "small": "a job ahead of it waits for the same places",
    }


MINUTE = timedelta(minutes=1)
LONGEST_RUN = 40


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    order=st.sampled_from([Order.FIFO, Order.FAIR]),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    before=st.integers(0, 3),
)
def test_nobody_starves(data, order, sizes, before):
    """Whatever else arrives, in order fifo and fair a job that fits some offer is placed within
    the longest delay and the running times of those that came before it."""
    running = {}  # job id → (offer's place, cpus, minute it ends)
    wanted = data.draw(st.integers(1, max(sizes)), label="wanted")
    queue, number, placed_at, limit = [], 0, None, None
    step = 5
    arrivals = st.lists(
        st.tuples(st.integers(1, max(sizes)), st.integers(1, LONGEST_RUN), st.booleans()),
        max_size=3,
    )

    def arrive(name, cpus, length, limited, minute):
        at, time = NOW + minute * MINUTE, length * MINUTE if limited else None
        queue.append((job(name, cpus, at=at, time=time), length))

    for index in range(before):
        arrive(f"before{index}", max(sizes), LONGEST_RUN, limited=False, minute=0)
    allowed = LONGEST_DELAY / MINUTE + (before + 2) * (LONGEST_RUN + step)
    for minute in range(0, int(allowed) + 3 * step, step):
        if minute == step:
            arrive("wanted", wanted, 1, limited=False, minute=minute)
            limit = minute + allowed
        for cpus, length, limited in data.draw(arrivals):
            number += 1
            arrive(f"j{number}", cpus, length, limited, minute)
        running = {name: run for name, run in running.items() if run[2] > minute}
        offers = []
        for index, size in enumerate(sizes):
            used = sum(cpus for where, cpus, _ in running.values() if where == f"s{index}/local")
            offers.append(offer(f"s{index}", size, size - used, peer=f"k{index}"))
        lengths = {each.id: length for each, length in queue}
        placed, _ = place(
            [each for each, _ in queue], offers, order=order, now=NOW + minute * MINUTE
        )
        for each, where in placed:
            ends = minute + lengths[each.id]
            running[each.id] = (where.place, each.spec.need.cpus, ends)
            if each.id == "wanted":
                placed_at = minute
        queue = [entry for entry in queue if entry[0].id not in running]
        if placed_at is not None:
            break
    assert placed_at is not None and placed_at <= limit
