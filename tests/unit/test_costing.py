"""Costs are hours times price, by month and shape, and nothing is added up that must not be."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.model.fleet import spent
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.orchestration.costing import costs

NOW = datetime(2026, 5, 10, tzinfo=UTC)


def lease(begun, hours, cost=1.0, *, currency="EUR", shape="small", running=False):
    """A lease whose machine was there for so many hours, or still is."""
    return Lease(
        id=f"{begun.isoformat()}{shape}{currency}",
        role=LeaseRole.OWN,
        state=LeaseState.ACTIVE if running else LeaseState.RELEASED,
        provider="cloud",
        need=Need(),
        created_at=begun,
        ended_at=None if running or hours is None else begun + timedelta(hours=hours),
        shape=shape,
        cost=cost,
        currency=currency,
    )


def test_a_machine_over_the_turn_of_a_month_is_in_both():
    """Each month has its own hours."""
    begun = datetime(2026, 4, 30, 22, tzinfo=UTC)
    april, may = costs([lease(begun, 5, 0.5)], NOW).rows
    assert (april.month, april.hours, april.cost) == ("2026-04", 2.0, 1.0)
    assert (may.month, may.hours, may.cost) == ("2026-05", 3.0, 1.5)


def test_what_runs_is_counted_until_now():
    """And said to be running, in this month alone."""
    april, may = costs([lease(datetime(2026, 4, 29, tzinfo=UTC), None, running=True)], NOW).rows
    assert (april.running, may.running) == (0, 1)
    assert may.hours == pytest.approx(9 * 24)


def test_only_what_came_after_is_counted():
    """Not the hours before, of machines that were there already."""
    begun = NOW - timedelta(hours=10)
    report = costs([lease(begun, 6)], NOW, NOW - timedelta(hours=6))
    assert [(row.hours, row.cost) for row in report.rows] == [(2.0, 2.0)]
    assert costs([lease(begun, 6)], NOW, NOW).rows == ()


def test_currencies_and_shapes_are_apart():
    """Money of two currencies is never added up."""
    begun = NOW - timedelta(hours=2)
    rows = costs(
        [lease(begun, 1), lease(begun, 1, currency="USD"), lease(begun, 1, shape="big")], NOW
    ).rows
    assert {(row.shape, row.currency, row.cost) for row in rows} == {
        ("small", "EUR", 1.0),
        ("small", "USD", 1.0),
        ("big", "EUR", 1.0),
    }


def test_hours_without_a_price_are_said():
    """They are counted as hours, and not as if they were free."""
    begun = NOW - timedelta(hours=4)
    (row,) = costs([lease(begun, 1, None), lease(begun, 2, 3.0)], NOW).rows
    assert (row.hours, row.unpriced_hours, row.cost) == (3.0, 1.0, 6.0)


def test_what_was_never_had_costs_nothing():
    """A launch that failed has no time that was paid."""
    failed = lease(NOW - timedelta(hours=2), None)
    assert costs([failed], NOW).rows == ()
    assert spent(failed, NOW) == 0.0


@given(
    st.lists(
        st.tuples(
            st.datetimes(datetime(2024, 1, 1), datetime(2026, 5, 1), timezones=st.just(UTC)),
            st.floats(0.01, 5000),
            st.sampled_from([None, 0.0, 0.25, 4.0]),
        ),
        max_size=20,
    )
)
def test_no_hour_is_lost_or_counted_twice(machines):
    """The months of all rows add up to all hours, and to all that was spent."""
    leases = [lease(begun, hours, cost) for begun, hours, cost in machines]
    rows = costs(leases, datetime(2030, 1, 1, tzinfo=UTC)).rows
    assert sum(row.hours for row in rows) == pytest.approx(sum(hours for _, hours, _ in machines))
    known = sum(hours * cost for _, hours, cost in machines if cost is not None)
    assert sum(row.cost for row in rows) == pytest.approx(known)
    assert [row.month for row in rows] == sorted(row.month for row in rows)
