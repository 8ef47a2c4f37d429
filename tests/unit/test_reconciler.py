"""Nothing that should not be is overlooked, and nothing that should be is touched."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need
from gridcloud.orchestration.reconciler import GONE, LOST, THE_END, absences, reconcile
from gridcloud.orchestration.troubles import Troubles

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def lease(name, role=LeaseRole.OWN, state=LeaseState.ACTIVE, job=None, ends=None):
    return Lease(
        id=name,
        role=role,
        state=state,
        provider="local",
        need=Need(),
        created_at=NOW,
        job_id=job,
        ends_at=ends,
    )


def mend(leases, jobs=None, made=None, *, starting=False, now=NOW):
    found = reconcile(leases, jobs or {}, made or {"local": []}, now, starting=starting)
    return [each.id for each, _ in found.release], found.terminate


def test_an_intent_is_given_up_only_after_a_crash():
    """While the site runs an intent is a request under way; at its start it was cut off."""
    intent = lease("a", state=LeaseState.INTENT, job="j")
    assert mend([intent], {"j": "a"}) == ([], [])
    assert mend([intent], {"j": "a"}, starting=True) == (["a"], [])


def test_a_lease_ends_with_its_job():
    """A lease whose job is over is given up; one whose job runs is kept."""
    assert mend([lease("a", job="over"), lease("b", job="runs")], {"runs": "b"}) == (["a"], [])


def test_a_loan_ends_in_time_or_when_what_it_gave_is_gone():
    """Loans end at their end; a loan whose sandbox vanished is not kept on the books."""
    late = lease("late", LeaseRole.LENT, ends=NOW - timedelta(seconds=1))
    gone = lease("gone", LeaseRole.LENT, ends=NOW + timedelta(hours=1))
    good = lease("good", LeaseRole.LENT, ends=NOW + timedelta(hours=1))
    made = {"local": ["late", "good"]}
    assert mend([late, gone, good], made=made)[0] == ["late"]  # it may be just being made
    released, strays = mend([late, gone, good], made=made, now=NOW + timedelta(minutes=2))
    assert released == ["late", "gone"]
    assert strays == []


def test_a_loan_is_not_ended_because_nobody_could_look():
    """A provider that could not be asked says nothing about what it gave."""
    good = lease("good", LeaseRole.LENT, ends=NOW + timedelta(hours=1))
    later = NOW + timedelta(minutes=2)
    assert reconcile([good], {}, {}, later, starting=False).release == []
    assert reconcile([good], {}, {}, NOW, starting=True).release == []


def test_what_no_lease_knows_is_removed():
    """A sandbox without a lease goes, even with an empty store."""
    assert mend([], made={"local": ["stray"]}) == ([], [("local", "stray")])


def test_a_job_has_one_lease():
    """A lease its job no longer counts on is given up, once the job has had time to name it."""
    orphan = lease("old", job="j")
    assert mend([orphan], {"j": "new"}) == ([], [])
    assert mend([orphan], {"j": "new"}, now=NOW + timedelta(minutes=2)) == (["old"], [])


def test_a_job_in_line_has_no_lease():
    """What a crash left between a grant and its first use is given up at once: the job waits for
    room that this very lease may take."""
    cut_off = lease("a", job="j")
    assert mend([cut_off], {"j": None}, starting=True) == (["a"], [])
    assert mend([cut_off], {"j": None}) == ([], [])  # it may be just being granted
    assert mend([cut_off], {"j": None}, now=NOW + timedelta(minutes=2)) == (["a"], [])


def machine(name, state=LeaseState.ACTIVE, *, job=None, ends=None, reason="", provider="cloud"):
    """A lease for which a machine is made at a cloud, with or without a job."""
    made = Machine(lease_id=name, provider=provider, folder="j", certified=True)
    return Lease(
        id=name,
        role=LeaseRole.OWN,
        state=state,
        provider=provider,
        need=Need(),
        created_at=NOW,
        job_id=job,
        ends_at=ends,
        shape="small",
        order=MachineOrder(name="" if job else name),
        machine=made if state is LeaseState.ACTIVE else None,
        reason=reason,
    )


def test_the_making_of_a_machine_goes_on_after_a_crash():
    """Its intent is not given up at a start, as that of a job is."""
    intent = machine("m", LeaseState.INTENT, ends=NOW + timedelta(hours=1))
    assert mend([intent], starting=True) == ([], [])
    assert mend([intent], made={"cloud": ["m"]}, starting=True) == ([], [])


def test_a_machine_ends_in_time():
    """At its end it is given back, whether it is there or still being made."""
    for state in (LeaseState.INTENT, LeaseState.ACTIVE):
        late = machine("m", state, ends=NOW)
        assert reconcile([late], {}, {}, NOW, starting=False).release == [(late, THE_END)]
        assert mend([late], now=NOW - timedelta(seconds=1)) == ([], [])


def test_a_machine_that_is_being_given_back_is_not_forgotten():
    """Its reason is in the lease: it is tried again and again, also after a crash."""
    stopped = machine("m", ends=NOW + timedelta(hours=1), reason="stopped by its user")
    for starting in (False, True):
        mending = reconcile([stopped], {}, {"cloud": ["m"]}, NOW, starting=starting)
        assert mending.release == [(stopped, "stopped by its user")]


def test_a_machine_of_a_job_that_is_late_is_given_back():
    """A job's own driver sees to its end first; after that the machine is not kept."""
    late = machine("m", job="j", ends=NOW)
    assert mend([late], {"j": "m"}, now=NOW + timedelta(minutes=1)) == ([], [])
    assert mend([late], {"j": "m"}, now=NOW + timedelta(minutes=3)) == (["m"], [])


def looks(leases, *listed, jobs=None):
    """Look again and again, 15 s apart, at what a cloud lists; return the last mending."""
    absent, now, mending = {}, NOW + timedelta(hours=1), None
    for made in listed:
        absent = absences(absent, leases, made, now)
        mending = reconcile(leases, jobs or {}, made, now, starting=False, absent=absent)
        now += timedelta(seconds=15)
    return mending


HERE, AWAY, UNKNOWN = {"cloud": ["m"]}, {"cloud": []}, {}


def test_a_machine_that_is_not_listed_for_long_is_gone():
    """One look that does not show it proves nothing; three quarters of a minute do."""
    there = machine("m", ends=NOW + timedelta(hours=9))
    assert looks([there], AWAY, AWAY, AWAY).release == []
    assert looks([there], AWAY, AWAY, HERE, AWAY).release == []
    assert looks([there], AWAY, AWAY, AWAY, AWAY).release == [(there, GONE)]


def test_the_job_on_a_machine_that_is_gone_has_lost_its_place():
    """Its lease is given up by the job itself, once that knows."""
    there = machine("m", job="j", ends=NOW + timedelta(hours=9))
    mending = looks([there], AWAY, AWAY, AWAY, AWAY, jobs={"j": "m"})
    assert (mending.lost, mending.release) == ([(there, LOST)], [])


def test_a_cloud_that_does_not_answer_has_lost_nothing():
    """However long it is away: nothing is concluded, and what was seen before still counts."""
    there = machine("m", ends=NOW + timedelta(days=9))
    assert looks([there], *[UNKNOWN] * 300).release == []
    assert looks([there], AWAY, *[UNKNOWN] * 10).release == []
    assert looks([there], AWAY, *[UNKNOWN] * 10, AWAY).release == [(there, GONE)]


_LEASES = st.lists(
    st.builds(
        machine,
        st.sampled_from("abc"),
        st.sampled_from([LeaseState.INTENT, LeaseState.ACTIVE]),
        job=st.sampled_from([None, "j", "k"]),
        ends=st.integers(-600, 600).map(lambda seconds: NOW + timedelta(seconds=seconds)),
        reason=st.sampled_from(["", "stopped"]),
    ),
    unique_by=lambda each: each.id,
)
_MADE = st.dictionaries(st.just("cloud"), st.lists(st.sampled_from("abcd"), unique=True))
_JOBS = st.dictionaries(st.sampled_from("jk"), st.sampled_from([None, "a", "b"]))


@given(_LEASES, _MADE, _JOBS, st.booleans(), st.booleans())
def test_whatever_there_is_every_thing_has_one_fate(leases, made, jobs, starting, missing):
    """What has no lease is removed, and only that; no lease is both given up and lost; and a
    machine in time, that nobody stops and that is listed, is left alone."""
    absent = {each.id: NOW - timedelta(hours=1) for each in leases} if missing else {}
    mending = reconcile(leases, jobs, made, NOW, starting=starting, absent=absent)
    known = {each.id for each in leases}
    listed = set(made.get("cloud", []))
    assert {tag for _, tag in mending.terminate} == listed - known
    released = [each.id for each, _ in mending.release]
    lost = [each.id for each, _ in mending.lost]
    assert len(set(released + lost)) == len(released + lost)
    assert all(reason for _, reason in mending.release + mending.lost)
    for each in leases:
        fine = not each.reason and not each.expired(NOW) and each.id in listed
        if each.for_a_machine and fine:
            assert each.id not in released + lost


def test_troubles_are_tried_with_growing_pauses_and_told():
    """15 s, 30 s, ... up to 5 minutes; said with since when and why; forgotten once over."""
    troubles, now = Troubles(), NOW
    pauses = []
    for _ in range(8):
        troubles.failed("cloud", "it is down", now)
        asked = now
        while not troubles.due("cloud", now):
            now += timedelta(seconds=15)
        pauses.append((now - asked).total_seconds())
    assert pauses == [15, 30, 60, 120, 240, 300, 300, 300]
    (told,) = troubles.told(now)
    assert "2026-01-01 00:00" in told
    assert "it is down" in told
    assert troubles.due("other", now)
    troubles.worked("cloud")
    assert troubles.told(now) == []
    assert troubles.due("cloud", now)
