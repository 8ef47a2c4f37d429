"""Founding, inviting and joining: who gets in, who does not, and what is believed of members."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Conflict, Forbidden, GridcloudError, InvalidSpec, NotFound
from gridcloud.grid.communities import CODE_PREFIX, Communities, read_code
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import JoinBody, MemberRecord
from gridcloud.grid.papers import Membership, Presence, Role

DAY = timedelta(days=1)
LENDER = ("provider", "consumer")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = datetime(2026, 5, 1, 12, tzinfo=UTC)

    def __call__(self):
        return self.now

    def forward(self, **time):
        self.now += timedelta(**time)


class Site:
    """One site's communities, without a network."""

    def __init__(self, clock, store=None, identity=None):
        self.identity = identity or Identity.generate()
        self.clock = clock
        self.addresses = ("127.0.0.1:4433",)
        self.store = store or MemoryCommunityStore()
        self.directory = Directory(self.identity, self.store, clock, lambda: self.addresses)
        self.communities = Communities(self.directory, self.store, clock)

    @property
    def key(self):
        return self.identity.key

    async def code(self, community, roles=LENDER, valid_for=DAY):
        return (await self.communities.invite(community, roles, valid_for, self.addresses))[0]

    def ask(self, code, site_name):
        """Return what this site sends to the inviter."""
        document, _ = read_code(code, self.clock())
        return JoinBody(
            invitation=document, site_name=site_name, presence=self.directory.presence()
        )

    async def join(self, inviter, code, site_name):
        invitation = read_code(code, self.clock())[1]
        reply = await inviter.communities.accept_join(self.key, self.ask(code, site_name))
        return await self.communities.enter(invitation, site_name, reply)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def site(clock):
    return lambda: Site(clock)


@pytest.fixture
async def founder(site):
    founder = site()
    founder.foam = await founder.communities.create("foam", "university")
    return founder


async def test_a_founder_is_a_member_with_all_roles(founder):
    """A community starts with one member, and its identity holds the founder's key."""
    assert founder.foam == f"foam.{founder.key}"
    mine = await founder.directory.myself(founder.foam)
    assert (mine.site_name, mine.membership.roles) == ("university", tuple(Role))
    assert await founder.directory.communities() == (founder.foam,)


@pytest.mark.parametrize("name", ["", "Foam", "foam.x", "a b", "-x", "x" * 64])
async def test_a_bad_name_founds_nothing(site, name):
    """The error says what names may be, and nothing is left behind."""
    one = site()
    with pytest.raises(InvalidSpec, match="a-z"):
        await one.communities.create(name, "site")
    assert await one.directory.communities() == ()


async def test_founding_the_same_twice_is_a_conflict(founder):
    """A second founding does not replace the first."""
    with pytest.raises(Conflict):
        await founder.communities.create("foam", "university")


async def test_joining_by_a_code_makes_members_of_one_another(founder, site):
    """Both sides know each other afterwards, also after a restart."""
    lab = site()
    community = await lab.join(founder, await founder.code(founder.foam), "lab")
    assert community == founder.foam
    for each in (lab, founder, Site(lab.clock, lab.store, lab.identity)):
        members = await each.directory.members(founder.foam)
        assert {m.site_name for m in members.values()} == {"university", "lab"}
    mine = await lab.directory.myself(community)
    assert mine.membership.roles == (Role.PROVIDER, Role.CONSUMER)


async def test_a_join_is_repeated_without_harm_by_the_same_key(founder, site):
    """A reply lost on the way does not cost the invitation."""
    lab, code = site(), await founder.code(founder.foam)
    first = await founder.communities.accept_join(lab.key, lab.ask(code, "lab"))
    lab.clock.forward(minutes=5)
    again = await founder.communities.accept_join(lab.key, lab.ask(code, "lab"))
    assert again.credential == first.credential


async def test_a_used_code_admits_nobody_else(founder, site):
    """An invitation is for one site, even if two come at once."""
    code = await founder.code(founder.foam)
    sites = [site() for _ in range(5)]
    results = await asyncio.gather(
        *(one.join(founder, code, f"lab-{n}") for n, one in enumerate(sites)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, Conflict)]
    assert len(refused) == 4
    assert all("already used" in error.message for error in refused)
    assert len(await founder.directory.members(founder.foam)) == 2


async def test_an_expired_code_is_refused_by_both_sides(founder, site):
    """The joiner need not ask to know, and the inviter does not trust it to have looked."""
    lab, code = site(), await founder.code(founder.foam, valid_for=timedelta(hours=1))
    asked = lab.ask(code, "lab")
    lab.clock.forward(hours=1, minutes=2)
    with pytest.raises(Forbidden, match="expired"):
        read_code(code, lab.clock())
    with pytest.raises(Forbidden, match="expired"):
        await founder.communities.accept_join(lab.key, asked)


async def test_a_forged_code_is_refused_by_both_sides(founder, site):
    """A changed code is noticed at once; one signed by another is noticed by the inviter."""
    lab, code = site(), await founder.code(founder.foam)
    place = code.index(".") + 20
    changed = code[:place] + ("A" if code[place] != "A" else "B") + code[place + 1 :]
    with pytest.raises(GridcloudError):
        read_code(changed, lab.clock())
    invitation = read_code(code, lab.clock())[1]
    mine = sign(lab.identity, invitation.model_copy(update={"inviter": lab.key}))
    with pytest.raises(Forbidden):
        await founder.communities.accept_join(lab.key, lab.ask(CODE_PREFIX + mine, "lab"))
    assert len(await founder.directory.members(founder.foam)) == 1


async def test_a_code_of_another_inviter_or_community_is_refused(founder, site):
    """A code is redeemed where it was made out, while that site is in that community."""
    lab, other = site(), site()
    theirs = await other.communities.create("foam", "other")
    with pytest.raises(Forbidden):
        await founder.communities.accept_join(lab.key, lab.ask(await other.code(theirs), "lab"))
    code = await founder.code(founder.foam)
    await founder.directory.forget(founder.foam)
    with pytest.raises(Forbidden, match="has left"):
        await founder.communities.accept_join(lab.key, lab.ask(code, "lab"))


@pytest.mark.parametrize("text", ["", "hello", "gridcloud-invite:", "gridcloud-invite:a.b.c"])
async def test_what_is_no_code_is_said_to_be_none(clock, text):
    """The error says what a code looks like."""
    with pytest.raises(InvalidSpec):
        read_code(text, clock())


async def test_a_code_wrapped_by_a_mail_program_still_works(founder, clock):
    """Spaces and line ends inside a code mean nothing."""
    code = await founder.code(founder.foam)
    wrapped = "\n  ".join(code[n : n + 60] for n in range(0, len(code), 60))
    assert read_code(wrapped, clock()) == read_code(code, clock())


async def test_a_name_taken_is_a_conflict_and_leaves_the_code_usable(founder, site):
    """Names are unique in a community; choosing another needs no new invitation."""
    lab, code = site(), await founder.code(founder.foam)
    with pytest.raises(Conflict, match="university"):
        await lab.join(founder, code, "university")
    assert await lab.join(founder, code, "lab") == founder.foam


async def test_a_manager_admits_but_makes_no_managers(founder, site):
    """What a manager signs is believed by all; only the founder makes managers."""
    manager, lab = site(), site()
    await manager.join(founder, await founder.code(founder.foam, tuple(Role)), "manager")
    await lab.join(manager, await manager.code(founder.foam), "lab")
    assert (
        await founder.directory.merge(founder.foam, await lab.directory.records(founder.foam)) == 0
    )
    assert lab.key in await founder.directory.members(founder.foam)
    with pytest.raises(Forbidden, match="founder"):
        await manager.code(founder.foam, ("manager",))
    with pytest.raises(Forbidden, match="no manager"):
        await lab.code(founder.foam)


@pytest.mark.parametrize(
    ("roles", "valid_for"),
    [
        ((), DAY),
        (("king",), DAY),
        (LENDER, timedelta(0)),
        (LENDER, -DAY),
        (LENDER, 91 * DAY),
        (LENDER, timedelta.max),
    ],
)
async def test_an_invitation_that_makes_no_sense_is_refused(founder, roles, valid_for):
    """No roles, unknown roles, and times past or absurd."""
    with pytest.raises(InvalidSpec):
        await founder.code(founder.foam, roles, valid_for)


async def test_an_old_code_does_not_bring_old_roles_back(founder, site):
    """Replaying a used invitation changes nothing after roles were changed."""
    lab = site()
    old = await founder.code(founder.foam, tuple(Role))
    await lab.join(founder, old, "lab")
    lab.clock.forward(hours=1)
    new = await founder.code(founder.foam, ("consumer",))
    lab.clock.forward(minutes=1)
    await lab.join(founder, new, "lab")
    lab.clock.forward(minutes=1)
    await founder.communities.accept_join(lab.key, lab.ask(old, "lab"))
    known = await founder.directory.member(founder.foam, lab.key)
    assert known.membership.roles == (Role.CONSUMER,)


async def test_a_lying_inviter_makes_no_member(founder, site):
    """The joiner believes only a membership of its own key, name and community."""
    lab, rival = site(), site()
    code = await founder.code(founder.foam)
    invitation = read_code(code, lab.clock())[1]
    reply = await founder.communities.accept_join(rival.key, rival.ask(code, "rival"))
    theirs = await rival.communities.create("foam", "rival")
    other = await rival.communities.accept_join(lab.key, lab.ask(await rival.code(theirs), "lab"))
    for lie in (reply, other, reply.model_copy(update={"credential": other.credential})):
        with pytest.raises(GridcloudError):
            await lab.communities.enter(invitation, "lab", lie)
    assert await lab.directory.communities() == ()


async def test_a_join_under_another_name_or_into_another_founding_is_refused(founder, site):
    """The reply must be for the name asked, and the founding document for this community."""
    lab, code = site(), await founder.code(founder.foam)
    invitation = read_code(code, lab.clock())[1]
    reply = await founder.communities.accept_join(lab.key, lab.ask(code, "lab"))
    with pytest.raises(Forbidden, match="another's membership"):
        await lab.communities.enter(invitation, "institute", reply)
    steel = await founder.communities.create("steel", "university")
    founding = await founder.directory.founding(steel)
    with pytest.raises(Forbidden, match="another community"):
        await lab.communities.enter(
            invitation, "lab", reply.model_copy(update={"community": founding})
        )
    assert await lab.directory.communities() == ()


async def test_a_peer_cannot_inject_members(founder, site):
    """Of a list, what is not proved is left out, and the rest is kept."""
    lab, eve = site(), site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    now = lab.clock()
    forged = sign(
        eve.identity,
        Membership(
            community=founder.foam,
            member=eve.key,
            site_name="eve",
            roles=tuple(Role),
            issued_at=now,
            issuer=eve.key,
        ),
    )
    good = (await founder.directory.members(founder.foam))[lab.key].record
    elsewhere = sign(eve.identity, Presence(site=eve.key, addresses=("6.6.6.6:1",), issued_at=now))
    records = [
        MemberRecord(credential=forged, presence=eve.directory.presence()),
        MemberRecord(credential=good.credential, presence=elsewhere),
        MemberRecord(credential="x", presence="y"),
        good,
    ]
    other = site()
    await other.join(founder, await founder.code(founder.foam), "other")
    assert await other.directory.merge(founder.foam, records) == 3
    members = await other.directory.members(founder.foam)
    assert {member.site_name for member in members.values()} == {"university", "lab", "other"}
    assert members[lab.key].presence.addresses == lab.addresses


async def test_the_newest_address_counts_whoever_tells_it(founder, site):
    """An address is the member's own word; an older one passed on later changes nothing."""
    lab = site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    old = (await founder.directory.members(founder.foam))[lab.key].record
    lab.clock.forward(minutes=1)
    lab.addresses = ("10.0.0.7:4433",)
    new = old.model_copy(update={"presence": lab.directory.presence()})
    for record in (new, old):
        await founder.directory.merge(founder.foam, [record])
        known = await founder.directory.member(founder.foam, lab.key)
        assert known.address.addresses == ("10.0.0.7:4433",)


async def test_a_member_shows_itself_and_a_stranger_cannot(founder, site):
    """A credential counts only from the key it is for; a stranger is told what to do."""
    lab, eve = site(), site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    asking = await lab.directory.asking(founder.foam)
    assert (await founder.directory.admit(lab.key, asking)).site_name == "lab"
    with pytest.raises(Forbidden, match=r"not a member of foam.*invitation"):
        await founder.directory.admit(eve.key, asking)
    with pytest.raises(Forbidden, match="not in foam"):
        await eve.directory.admit(lab.key, asking)


async def test_names_are_resolved_or_said_to_be_unknown_or_ambiguous(founder, site):
    """A name does if it is the only one; else the identity is wanted."""
    other = site()
    theirs = await other.communities.create("foam", "other")
    assert await founder.directory.resolve("foam") == founder.foam
    with pytest.raises(NotFound):
        await founder.directory.resolve("steel")
    await founder.join(other, await other.code(theirs), "university")
    with pytest.raises(Conflict):
        await founder.directory.resolve("foam")
    assert await founder.directory.resolve(theirs) == theirs


async def test_what_was_left_is_forgotten_but_not_the_used_codes(founder, site):
    """Leaving and coming back does not make a used code good for another."""
    lab, code = site(), await founder.code(founder.foam)
    await lab.join(founder, code, "lab")
    await lab.directory.forget(founder.foam)
    await founder.directory.remove(founder.foam, lab.key)
    assert await lab.directory.communities() == ()
    with pytest.raises(NotFound):
        await lab.directory.myself(founder.foam)
    with pytest.raises(Conflict):
        await site().join(founder, code, "lab")
