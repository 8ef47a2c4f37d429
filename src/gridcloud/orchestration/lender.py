"""The lender as decisions see it: the owner's rules, what there is, and who has what now. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from functools import cached_property

from gridcloud.model.hours import Window, window
from gridcloud.model.lease import Lease, LeaseRole, LoanTerms, taken
from gridcloud.model.need import Resources
from gridcloud.orchestration.consumption import Ledger
from gridcloud.settings import LendingRule, LendingSettings

#: The provider whose capacity is lent: this host.
LENT_FROM = "local"
#: What a member has that nothing more is known of.
PLAIN_ROLES = frozenset({"provider", "consumer"})
NOTHING = Resources()
NO_BOUND = Resources(cpus=2**20, memory_bytes=2**60, gpus=2**16)


@dataclass(frozen=True)
class Asker:
    """Who asks: a person of a borrowing site, which has roles in a community."""

    community: str
    borrower: str
    person: str
    roles: frozenset[str]


@dataclass(frozen=True)
class Lender:
    """All that a decision looks at, as of one moment.

    ``host`` is what this host could lend at most, ``live`` all leases that hold capacity,
    ``promised`` what its own users wait for. ``zone`` is that of the rules' hours, None this
    computer's.
    """

    name: str
    lending: LendingSettings
    host: Resources
    live: Sequence[Lease] = ()
    ledger: Ledger = field(default_factory=Ledger)
    promised: Resources = NOTHING
    zone: tzinfo | None = None

    @cached_property
    def limit(self) -> Resources:
        """What may be lent in all."""
        return self.host.within(_bound(self.lending))

    @cached_property
    def lent(self) -> Resources:
        """What is lent now."""
        return taken(self.live, LENT_FROM, LeaseRole.LENT)

    @cached_property
    def free(self) -> Resources:
        """What of it could be lent now: neither leased nor wanted by this site's own users."""
        unused = self.host.minus(taken(self.live, LENT_FROM)).minus(self.promised)
        return unused.within(self.limit.minus(self.lent))

    @cached_property
    def rules(self) -> tuple[LendingRule, ...]:
        """The rules that count: without any, all that may be lent is for everybody."""
        return self.lending.rules or (LendingRule(),)

    @cached_property
    def loans(self) -> tuple[tuple[LendingRule | None, Lease], ...]:
        """The live loans, each with the rule that is for its borrower now."""
        lent = (lease for lease in self.live if lease.role is LeaseRole.LENT)
        return tuple((self.rule_for(asker_of(lease)), lease) for lease in lent)

    def rule_for(self, asker: Asker) -> LendingRule | None:
        """Return the rule that decides for an asker, None if there is none for it."""
        if not self.lends_in(asker.community):
            return None
        return next((rule for rule in self.rules if _is_for(rule, asker)), None)

    def under(self, rule: LendingRule) -> list[Lease]:
        """Return the live loans of a rule."""
        return [lease for each, lease in self.loans if each is rule]

    def bound(self, rule: LendingRule) -> Resources:
        """Return what a rule may lend in all."""
        return self.limit.within(_bound(rule))

    def left(self, rule: LendingRule) -> Resources:
        """Return what a rule may still lend, whether it is there or not."""
        return self.bound(rule).minus(total(self.under(rule)))

    def longest(self, rule: LendingRule) -> timedelta:
        """Return how long a loan may last."""
        return min(rule.max_time or self.lending.max_time, self.lending.max_time)

    def window(self, rule: LendingRule, now: datetime) -> Window:
        """Return whether a rule's hours hold now."""
        return window(rule.hours, now, self.zone)

    def terms(self, rule: LendingRule, roles: frozenset[str]) -> LoanTerms:
        """Return the terms of a rule's loans."""
        lending = self.lending
        return LoanTerms(
            roles=tuple(sorted(roles)),
            prices=rule.prices,
            notice=rule.notice,
            network=lending.network if rule.network is None else rule.network,
            software=lending.software if rule.software is None else rule.software,
            processes=lending.processes,
            disk_bytes=lending.disk,
        )

    def lends_in(self, community: str) -> bool:
        """Return whether a community is among those that anything is lent in."""
        named = self.lending.communities
        return not named or any(is_named(name, community) for name in named)


def asker_of(lease: Lease) -> Asker:
    """Return who has a loan, with the roles it had when it was granted."""
    roles = frozenset(lease.terms.roles) if lease.terms else PLAIN_ROLES
    return Asker(lease.community or "", lease.peer or "", lease.person or "", roles)


def for_nobody(lending: LendingSettings, communities: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return where the settings name a community that is none of ``communities``, and which.

    No error: a rule may be written before the community is joined.
    """
    rules = [
        (f"rule {number} is", rule.community)
        for number, rule in enumerate(lending.rules, start=1)
        if rule.community is not None
    ]
    of_rules = {name for _, name in rules}  # one mistake is told once
    beside = [("communities is", name) for name in lending.communities if name not in of_rules]
    return tuple(
        (where, name)
        for where, name in rules + beside
        if not any(is_named(name, community) for community in communities)
    )


def is_named(name: str, community: str) -> bool:
    """Whether ``NAME``, ``NAME.KEY`` or ``NAME.BEGINNING-OF-KEY`` is this community."""
    wanted, _, key = name.partition(".")
    have, _, founder = community.partition(".")
    return wanted == have and founder.startswith(key)


def total(leases: Iterable[Lease]) -> Resources:
    """Return what leases take together."""
    needs = [lease.need for lease in leases]
    return Resources(
        cpus=sum(need.cpus for need in needs),
        memory_bytes=sum(need.memory_bytes for need in needs),
        gpus=sum(need.gpus for need in needs),
    )


def _bound(said: LendingRule | LendingSettings) -> Resources:
    return Resources(
        cpus=NO_BOUND.cpus if said.cpus is None else said.cpus,
        memory_bytes=NO_BOUND.memory_bytes if said.memory is None else said.memory,
        gpus=NO_BOUND.gpus if said.gpus is None else said.gpus,
    )


def _is_for(rule: LendingRule, asker: Asker) -> bool:
    user, _, site = asker.person.rpartition("@")
    return (
        covers_community(rule, asker.community)
        and (not rule.roles or bool(asker.roles & {*rule.roles}))
        and (not rule.people or any(_is_person(each, user, site) for each in rule.people))
    )


def covers_community(rule: LendingRule, community: str) -> bool:
    """Return whether a rule is for members of a community."""
    return rule.community is None or is_named(rule.community, community)


def _is_person(pattern: str, user: str, site: str) -> bool:
    users, _, sites = pattern.partition("@")
    return bool(user) and users in ("*", user) and sites in ("*", site)
