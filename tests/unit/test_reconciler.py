"""Nothing that should not be is overlooked, and nothing that should be is touched."""

from datetime import UTC, datetime, timedelta

from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.orchestration.reconciler import reconcile

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
