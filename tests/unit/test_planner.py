"""The planner ranks, explains, and is fair to those who wait."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from gridcloud.model.job import Job, JobSpec
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.planner import place, plan


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


def job(name, cpus=1, **spec):
    need = Need(cpus=cpus, memory_bytes=2**20)
    spec = JobSpec(command=("true",), need=need, **spec)
    return Job(id=name, spec=spec, created_at=datetime.now(UTC))


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
    assert [j.id for j, _ in waiting] == ["large", "small"]


def test_a_waiting_job_does_not_block_what_it_cannot_use():
    """An offer too small for the older job is free for the younger."""
    offers = [offer("big", 4, 3), offer("little", 1, peer="k")]
    placed, _ = place([job("large", 4), job("small", 1)], offers)
    assert [(j.id, o.site) for j, o in placed] == [("small", "little")]


@given(
    st.lists(st.integers(1, 5), max_size=12),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
)
def test_never_more_than_is_free(needs, sizes):
    """Whatever is asked, no offer is given more than it has free, and no job is forgotten."""
    offers = [offer(f"s{i}", max(cap, free), free, f"k{i}") for i, (cap, free) in enumerate(sizes)]
    jobs = [job(f"j{i}", cpus) for i, cpus in enumerate(needs)]
    placed, waiting = place(jobs, offers)
    for each in offers:
        assert sum(j.spec.need.cpus for j, o in placed if o.site == each.site) <= each.free.cpus
    assert sorted(j.id for j, _ in placed + waiting) == sorted(j.id for j in jobs)


def test_an_offer_of_unknown_size_is_worth_waiting_for():
    """A machine that was never reached may turn out to be large enough."""
    unknown = offer("away", 0, known=False, problem="unreachable: no route")
    judged = plan(Need(cpus=64), [unknown])
    assert judged.possible_later
    assert judged.verdicts[0].reasons == ("unreachable: no route",)
