"""The owner's rules decide what is lent to whom, on what terms, until when."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NoCapacity
from gridcloud.model.hours import parse_hours, window
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, LoanTerms, Machine
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.orchestration.consumption import Ledger
from gridcloud.orchestration.lender import NOTHING, Asker, Lender
from gridcloud.orchestration.policy import (
    STAGING_TIME,
    Full,
    decide,
    offered,
    over_quota,
    renewed_until,
    whom_to_recall,
)
from gridcloud.settings import LendingSettings

ZONE = ZoneInfo("Europe/Copenhagen")
#: A Wednesday, at noon where the lender is.
NOON = datetime(2025, 11, 19, 12, tzinfo=ZONE)
OPTICS, LAB = f"optics.{'a' * 64}", f"lab.{'b' * 64}"
HOST = Resources(cpus=8, memory_bytes=32 * GIB)
HOUR = timedelta(hours=1)


def lender(rules=(), live=(), ended=(), promised=NOTHING, **more):
    lending = LendingSettings.model_validate({"enabled": True, **more, "rules": list(rules)})
    return Lender("uni", lending, HOST, tuple(live), Ledger(ended), promised, ZONE)


def asker(person="alice@lab", community=OPTICS, roles=("consumer", "provider"), borrower="b1"):
    return Asker(community, borrower, person, frozenset(roles))


def need(cpus=1, time=None, memory=GIB):
    return Need(cpus=cpus, memory_bytes=memory, time=time)


def loan(number=1, cpus=1, who=None, since=NOON - HOUR, notice=None, length=2 * HOUR, memory=GIB):
    who = who or asker()
    return Lease(
        id=f"l{number}",
        role=LeaseRole.LENT,
        state=LeaseState.ACTIVE,
        provider="local",
        need=need(cpus, memory=memory),
        created_at=since,
        ends_at=since + length,
        community=who.community,
        peer=who.borrower,
        person=who.person,
        machine=Machine(lease_id=f"l{number}", provider="local", folder="jobs"),
        terms=LoanTerms(
            roles=tuple(sorted(who.roles)), notice=notice, processes=8, disk_bytes=2**20
        ),
    )


def end_of(given_lender, who, what, now=NOON):
    return decide(given_lender, who, what, now).ends_at - now


def test_without_rules_everybody_gets_what_there_is():
    """A site that only enabled lending lends to members of all its communities."""
    assert end_of(lender(), asker(), need(8)) == timedelta(hours=24)
    assert end_of(lender(), asker(), need(8, time=HOUR)) == HOUR + STAGING_TIME
    assert end_of(lender(max_time="5s"), asker(), need()) == timedelta(seconds=5)


def test_without_rules_the_named_communities_get_what_there_is():
    """``communities`` bounds whom anything is lent to, by name or key."""
    for named in ("optics", OPTICS, OPTICS[:20]):
        decide(lender(communities=[named]), asker(), need(), NOON)
        with pytest.raises(Forbidden, match="uni lends nothing to alice@lab in lab"):
            decide(lender(communities=[named]), asker(community=LAB), need(), NOON)
    with pytest.raises(Forbidden):
        decide(lender(communities=["optics.bbbbbbbb"]), asker(), need(), NOON)


def test_the_first_rule_that_is_for_the_asker_decides():
    """Community, role and person each may be named; whom no rule is for gets nothing."""
    policy = lender(
        [
            {"community": "optics", "roles": ["manager"], "max_time": "12h"},
            {"community": "optics", "people": ["bob@lab", "*@far"], "max_time": "6h"},
            {"community": "lab", "max_time": "3h"},
        ]
    )
    manager = asker(roles=("consumer", "manager"))
    assert end_of(policy, manager, need()) == 12 * HOUR
    assert end_of(policy, asker("bob@lab"), need()) == 6 * HOUR
    assert end_of(policy, asker("eve@far"), need()) == 6 * HOUR
    assert end_of(policy, asker(community=LAB), need()) == 3 * HOUR
    for nobody in (asker("alice@lab"), asker("bob@labs"), asker(community=f"o.{'c' * 64}")):
        with pytest.raises(Forbidden, match="no rule"):
            decide(policy, nobody, need(), NOON)


def test_terms_come_from_the_rule():
    """Prices, notice, network and software are the rule's, else those of all lending."""
    policy = lender(
        [
            {
                "community": "optics",
                "prices": {"cpu_hour": 2.0},
                "notice": "5m",
                "network": True,
                "software": ["/opt/a"],
            },
            {},
        ],
        software=["/opt/a", "/opt/b"],
    )
    special = decide(policy, asker(), need(), NOON).terms
    plain = decide(policy, asker(community=LAB), need(), NOON).terms
    assert special.prices.cpu_hour == 2.0
    assert special.notice == timedelta(minutes=5)
    assert (special.network, plain.network) == (True, False)
    assert ([*map(str, special.software)], len(plain.software)) == (["/opt/a"], 2)
    assert plain.notice is None


def test_a_need_that_is_never_lent_is_told_apart():
    """Too large or too long is an error of the asker; full is a reason to wait."""
    policy = lender([{"cpus": 4, "max_time": "2h", "per_site": {"cpus": 3}}])
    with pytest.raises(InvalidSpec, match="has 3 of 4 CPUs"):
        decide(policy, asker(), need(4), NOON)
    with pytest.raises(InvalidSpec, match="2h 00m at most"):
        decide(policy, asker(), need(time=3 * HOUR), NOON)


def test_a_rule_bounds_all_its_loans_together():
    """What the rule has left counts for everybody it is for, and for nobody else."""
    rules = [{"community": "optics", "cpus": 4}, {}]
    others = asker("carol@far", borrower="b2")
    policy = lender(rules, live=[loan(1, 3, others)])
    with pytest.raises(Full, match="has 1 of 2 CPUs"):
        decide(policy, asker(), need(2), NOON)
    decide(policy, asker(), need(1), NOON)
    decide(policy, asker(community=LAB), need(5), NOON)
    with pytest.raises(Full):
        decide(policy, asker(community=LAB), need(6), NOON)


def test_own_leases_and_promises_come_first():
    """What the site's own users have, or wait for, is not lent."""
    own = Lease(
        id="o", role=LeaseRole.OWN, state=LeaseState.ACTIVE, provider="local",
        need=need(4), created_at=NOON,
    )  # fmt: skip
    with pytest.raises(Full):
        decide(lender(live=[own]), asker(), need(5), NOON)
    with pytest.raises(Full):
        decide(lender(live=[own], promised=Resources(cpus=2)), asker(), need(3), NOON)
    decide(lender(live=[own], promised=Resources(cpus=2)), asker(), need(2), NOON)


def test_quotas_bound_a_person_and_a_site():
    """CPUs at a time, counted for one person or one borrowing site."""
    alice, bob = asker("alice@lab"), asker("bob@lab")
    far = asker("alice@far", borrower="b2")
    policy = lender(
        [{"per_person": {"cpus": 2}, "per_site": {"cpus": 3}}], live=[loan(1, 2, alice)]
    )
    with pytest.raises(NoCapacity, match="alice@lab 2 CPUs at a time") as caught:
        decide(policy, alice, need(), NOON)
    assert not isinstance(caught.value, Full)
    decide(policy, bob, need(1), NOON)
    with pytest.raises(NoCapacity, match="the site lab 3 CPUs"):
        decide(policy, bob, need(2), NOON)
    decide(policy, far, need(2), NOON)


def test_cpu_hours_are_counted_with_what_runs():
    """Ended loans of the period, live ones to their ends, and the one asked for fit the quota."""
    rules = [{"per_person": {"cpu_hours": 10, "period": "1d"}}]
    ended = loan(1, 2, since=NOON - 10 * HOUR).released("given back", NOON - 8 * HOUR)
    old = loan(2, 8, since=NOON - 60 * HOUR).released("given back", NOON - 58 * HOUR)
    policy = lender(rules, ended=[ended, old])
    assert end_of(policy, asker(), need(2)) == 3 * HOUR
    assert end_of(policy, asker("bob@lab"), need(2)) == 5 * HOUR
    with pytest.raises(NoCapacity, match="10 CPU-hours"):
        decide(policy, asker(), need(2, time=4 * HOUR), NOON)
    running = lender(rules, ended=[ended, old], live=[loan(3, 3, since=NOON)])
    with pytest.raises(NoCapacity, match="10 CPU-hours"):
        decide(running, asker(), need(1, time=HOUR), NOON)


def test_hours_bound_when_and_until():
    """Outside its hours a rule lends nothing; inside, no longer than they last."""
    policy = lender([{"hours": ["18:00-08:00", "sat-sun"]}])
    with pytest.raises(NoCapacity, match="nothing at this hour") as caught:
        decide(policy, asker(), need(), NOON)
    assert "Wed 18:00" in caught.value.hint
    night = NOON + 14 * HOUR
    assert decide(policy, asker(), need(), night).ends_at == NOON + 20 * HOUR
    with pytest.raises(NoCapacity, match="until Thu 08:00"):
        decide(policy, asker(), need(time=7 * HOUR), night)


def test_what_a_community_is_offered():
    """A plain member's place now: its rule, its quota, the hours, what is free."""
    policy = lender(
        [
            {"community": "optics", "roles": ["manager"]},
            {"community": "optics", "cpus": 6, "per_person": {"cpus": 4}, "hours": "12:00-14:00"},
            {"community": "lab", "people": ["ann@x"], "cpus": 2},
        ],
        live=[loan(1, 5)],
    )
    plain = offered(policy, OPTICS, NOON)
    assert (plain.capacity.cpus, plain.free.cpus) == (4, 1)
    assert plain.max_time == 2 * HOUR
    closed = offered(policy, OPTICS, NOON + 3 * HOUR)
    assert (closed.capacity.cpus, closed.free.cpus, closed.max_time) == (4, 0, 24 * HOUR)
    assert (plain.opens_at, closed.opens_at) == (None, NOON + 24 * HOUR)
    assert offered(policy, LAB, NOON).capacity.cpus == 2
    assert offered(policy, f"other.{'c' * 64}", NOON) is None


def test_a_lowered_limit_leaves_what_runs_alone():
    """More than the limit may be lent then: it is told, nothing new is lent until below."""
    live = [loan(1, 3), loan(2, 1, asker("bob@lab"))]
    policy = lender([{"cpus": 3, "per_person": {"cpus": 2}}], live=live)
    assert over_quota(policy) == (
        "rule 1: 4 of 3 CPUs are lent",
        "alice@lab: 3 of 2 CPUs are lent",
    )
    with pytest.raises(NoCapacity):
        decide(policy, asker("eve@lab"), need(1), NOON)
    with pytest.raises(NoCapacity, match="4 of 3 CPUs"):
        renewed_until(policy, live[1], NOON + 2 * HOUR, NOON)
    assert over_quota(lender([{"cpus": 4}], live=live)) == ()
    gone = over_quota(lender([{"community": "lab"}], live=live[:1]))
    assert "no rule is for them any more" in gone[0]


def test_a_renewal_keeps_to_the_longest_time_from_the_start():
    """However often it is asked, a loan lasts no longer than one that was asked for at once."""
    lease = loan(since=NOON - HOUR, length=2 * HOUR)
    policy = lender([{"max_time": "4h"}], live=[lease])
    assert renewed_until(policy, lease, NOON, NOON) == lease.ends_at
    assert renewed_until(policy, lease, NOON + 3 * HOUR, NOON) == NOON + 3 * HOUR
    with pytest.raises(Forbidden, match="beyond Wed 15:00"):
        renewed_until(policy, lease, NOON + 3 * HOUR + timedelta(seconds=1), NOON)


@pytest.mark.parametrize(
    ("more", "promised", "word"),
    [
        ({"rules": [{"community": "lab"}]}, NOTHING, "any more"),
        ({"enabled": False}, NOTHING, "any more"),
        ({"rules": [{"hours": "11:00-13:30"}]}, NOTHING, "11:00-13:30"),
        ({"rules": [{"hours": "18:00-20:00"}]}, NOTHING, "18:00-20:00"),
        ({"rules": [{"per_person": {"cpu_hours": 2.5}}]}, NOTHING, "CPU-hours"),
        ({"rules": [{"notice": "1m"}]}, Resources(cpus=1), "own users"),
    ],
)
def test_a_renewal_needs_what_a_loan_needs(more, promised, word):
    """Rules, hours, quotas and own users are looked at again, by today's policy."""
    lease = loan(since=NOON - HOUR, length=2 * HOUR, notice=timedelta(minutes=1))
    rules = more.pop("rules", ())
    with pytest.raises((Forbidden, NoCapacity), match=word):
        renewed_until(
            lender(rules, live=[lease], promised=promised, **more), lease, NOON + 2 * HOUR, NOON
        )


def test_recalls_are_the_fewest_and_youngest():
    """One large loan goes before two small ones, the youngest of those that suffice."""
    notice = timedelta(minutes=5)
    loans = [
        loan(n, cpus, since=NOON - n * timedelta(minutes=1), notice=notice)
        for n, cpus in enumerate((1, 2, 4, 4, 1), start=1)
    ]
    kept = loan(9, 8, since=NOON)

    def recalled(cpus, free=0, among=loans):
        chosen = whom_to_recall(Resources(cpus=cpus), Resources(cpus=free), [*among, kept], NOON)
        return [lease.id for lease in chosen]

    assert recalled(1) == ["l1"]
    assert recalled(2) == ["l2"]
    assert recalled(4) == ["l3"]
    assert recalled(4, free=3) == ["l1"]
    assert recalled(5) == ["l1", "l3"]
    assert recalled(4, free=4) == []
    assert recalled(13) == [], "recalling all of them would not do"
    first = [loans[0].recalled("own users", NOON), *loans[1:]]
    assert recalled(1, among=first) == [], "enough is coming"
    assert recalled(2, among=first) == ["l2"]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=7),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_recalls_suffice_and_none_is_too_many(sizes, cpus, memory):
    """What is recalled is enough where anything could be, and no smaller number would be."""
    loans = [
        loan(n, c, since=NOON - timedelta(minutes=n), notice=HOUR, memory=m * GIB)
        for n, (c, m) in enumerate(sizes)
    ]
    wanted = Resources(cpus=cpus, memory_bytes=memory * GIB)
    chosen = whom_to_recall(wanted, NOTHING, loans, NOON)

    def enough(some):
        return sum(each.need.cpus for each in some) >= cpus and (
            sum(each.need.memory_bytes for each in some) >= memory * GIB
        )

    if chosen:
        assert enough(chosen)
        subsets = [[x for i, x in enumerate(loans) if mask >> i & 1] for mask in range(1 << len(loans))]  # fmt: skip # noqa: E501
        assert len(chosen) == min(len(some) for some in subsets if enough(some))
    else:
        assert enough([]) or not enough(loans)


def test_very_many_loans_are_still_chosen_from_quickly():
    """Where trying all combinations would take for ever, enough are found all the same."""
    loans = [loan(n, 1, since=NOON - timedelta(seconds=n), notice=HOUR) for n in range(200)]
    chosen = whom_to_recall(Resources(cpus=50), NOTHING, loans, NOON)
    assert len(chosen) == 50


@pytest.mark.parametrize(
    ("text", "at", "is_open", "changes"),
    [
        ("18:00-08:00", "Wed 12:00", False, "Wed 18:00"),
        ("18:00-08:00", "Wed 19:00", True, "Thu 08:00"),
        ("18:00-08:00", "Sun 23:30", True, "Mon 08:00"),
        ("fri 18:00-08:00", "Sat 07:59", True, "Sat 08:00"),
        ("fri 18:00-08:00", "Sat 08:00", False, "Fri 18:00"),
        ("sat-sun", "Sun 12:00", True, "Mon 00:00"),
        ("sat - mon 00:00-24:00", "Sun 12:00", True, "Tue 00:00"),
        ("mon,wed 10:00-12:00", "Tue 11:00", False, "Wed 10:00"),
        ("22:00-00:00", "Tue 23:00", True, "Wed 00:00"),
    ],
)
def test_hours_of_the_week(text, at, is_open, changes):
    """Windows over midnight and over the end of the week, and days alone."""
    monday = datetime(2025, 11, 17)
    moments = {f"{monday + timedelta(minutes=m):%a %H:%M}": m for m in range(7 * 1440)}
    now = (monday + timedelta(minutes=moments[at])).replace(tzinfo=ZONE)
    found = window([parse_hours(text)], now, ZONE)
    assert found.open is is_open
    assert f"{found.changes_at.astimezone(ZONE):%a %H:%M}" == changes
    assert timedelta(0) < found.changes_at - now <= timedelta(days=7)


def test_hours_follow_the_clock_on_the_wall():
    """When clocks change in the night, a window still ends at its hour."""
    evening = datetime(2025, 10, 25, 20, tzinfo=ZONE)
    found = window([parse_hours("18:00-08:00")], evening, ZONE)
    assert found.changes_at == datetime(2025, 10, 26, 8, tzinfo=ZONE)
    assert found.changes_at - evening.astimezone(UTC) == timedelta(hours=13)
    twice = datetime(2025, 10, 26, 2, 40, fold=1, tzinfo=ZONE)
    found = window([parse_hours("00:00-02:30")], twice, ZONE)
    assert found.changes_at is None or found.changes_at > twice.astimezone(UTC)


def test_windows_that_fill_the_week_never_change():
    """Day and night together are always."""
    both = [parse_hours("18:00-08:00"), parse_hours("08:00-18:00")]
    assert window(both, NOON, ZONE).changes_at is None


_HOURS = st.tuples(st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440)).filter(
    lambda each: each[1] != each[2]
)


@given(st.lists(_HOURS, min_size=1, max_size=4), st.integers(0, 7 * 1440 - 1))
def test_windows_agree_with_looking_at_every_minute(parts, minute):
    """Open or not, and when that changes, is what a walk through the week finds."""
    names = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    hours = [
        parse_hours(f"{names[d]} {b // 60:02d}:{b % 60:02d}-{e // 60:02d}:{e % 60:02d}")
        for d, b, e in parts
    ]
    covered = set()
    for day, begin, end in parts:
        length = end - begin if end > begin else end + 1440 - begin
        covered |= {(day * 1440 + begin + m) % 10080 for m in range(length)}
    now = datetime(2025, 6, 2, tzinfo=UTC) + timedelta(minutes=minute)
    found = window(hours, now, UTC)
    assert found.open == (minute in covered)
    after = next(
        (m for m in range(1, 10081) if ((minute + m) % 10080 in covered) != found.open), None
    )
    changes = None if after is None else now + timedelta(minutes=after)
    assert found.changes_at == changes


def test_a_lease_that_is_over_stays_so():
    """Released is final, a recall is never undone, and an end moves only as agreed."""
    lease = loan(notice=timedelta(minutes=5))
    recalled = lease.recalled("own users", NOON)
    assert recalled.ends_at == NOON + timedelta(minutes=5)
    assert recalled.recalled("again", NOON + HOUR) is recalled
    assert recalled.renewed(recalled.ends_at) is recalled
    with pytest.raises(Conflict, match="own users"):
        recalled.renewed(NOON + HOUR)
    over = recalled.released("given back", NOON)
    assert over.released("again", NOON + HOUR) is over
    for act in (lambda: over.renewed(NOON + 9 * HOUR), lambda: over.recalled("x", NOON)):
        with pytest.raises(Conflict, match="is over"):
            act()
    with pytest.raises(Conflict, match="without a notice"):
        loan().recalled("own users", NOON)
    soon = loan(since=NOON - HOUR, length=HOUR + timedelta(minutes=1), notice=HOUR)
    assert soon.recalled("own users", NOON).ends_at == soon.ends_at, "never later than before"
