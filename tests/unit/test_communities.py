"""Founding, inviting and joining: who gets in, who does not, and what is believed of members."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Conflict, Forbidden, GridcloudError, InvalidSpec, NotFound
from gridcloud.grid.communities import CODE_PREFIX, Communities, read_code
from gridcloud.grid.community_store import MemoryCommunityStore, Shelf
from gridcloud.grid.documents import sign, verify
from gridcloud.grid.identity import Identity
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import JoinBody, LeaveBody, MemberRecord, RevocationRecord
from gridcloud.grid.papers import Membership, Presence, Revocation, Role
from gridcloud.grid.roster import BUCKETS
from gridcloud.grid.transport import PeerAddress

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
        self.directory = Directory(self.identity, self.store, clock, self.there)
        self.communities = Communities(self.directory, self.store, clock)
        self.governing = self.communities.governing

    @property
    def key(self):
        return self.identity.key

    def there(self):
        return PeerAddress(key=self.key, addresses=self.addresses)

    async def code(self, community, roles=LENDER, valid_for=DAY, **more):
        made = await self.communities.invite(community, roles, valid_for, self.there(), **more)
        return made[0]

    def ask(self, code, site_name):
        """Return what this site sends to the inviter."""
        document, _ = read_code(code, self.clock())
        return JoinBody(
            invitation=document, site_name=site_name, presence=self.directory.presence()
        )

    async def join(self, inviter, code, site_name):
        invitation = read_code(code, self.clock())[1]
        body = self.ask(code, site_name).model_copy(
            update={"left": await self.directory.left(invitation.community)}
        )
        reply = await inviter.communities.accept_join(self.key, body)
        return await self.communities.enter(invitation, site_name, reply)

    async def names(self, community):
        roster = await self.directory.roster(community)
        return {roster.shown(key) for key in roster.members}

    async def leave(self, community, *told):
        farewell = await self.directory.farewell(community)
        for each in told:
            await each.communities.hear(LeaveBody(community=community, **farewell.model_dump()))
        await self.directory.forget(community, farewell)


async def exchange(community, *sites):
    """Have everyone hear what anyone knows, as gossip would."""
    rosters = [await site.directory.roster(community) for site in sites]
    items = [item for roster in rosters for item in roster.items_in(range(BUCKETS))]
    for site in sites:
        assert await site.directory.merge(community, items) == 0
    digests = {(await site.directory.roster(community)).digest() for site in sites}
    assert len(digests) == 1


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
    await exchange(founder.foam, founder, lab)
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
    assert await lab.directory.asking(founder.foam) == asking  # signed once, while it holds
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
    with pytest.raises(Conflict, match=r"Give 8 digits.*foam\.[0-9a-f]{8}\."):
        await founder.directory.resolve("foam")
    assert await founder.directory.resolve(theirs) == theirs
    assert await founder.directory.resolve(f"foam.{other.key[:8]}") == theirs
    for unknown in (f"foam.{other.key[:7]}", f"foam.{'0' * 8}", "foa", other.key[:8]):
        with pytest.raises(NotFound):
            await founder.directory.resolve(unknown)


async def test_what_was_left_is_forgotten_but_not_the_used_codes(founder, site):
    """Leaving and coming back does not make a used code good for another, or for oneself."""
    lab, code = site(), await founder.code(founder.foam)
    await lab.join(founder, code, "lab")
    lab.clock.forward(minutes=1)
    await lab.leave(founder.foam, founder)
    assert await lab.directory.communities() == ()
    with pytest.raises(NotFound):
        await lab.directory.myself(founder.foam)
    with pytest.raises(Conflict):
        await site().join(founder, code, "lab")
    with pytest.raises(Forbidden, match="left foam"):
        await lab.join(founder, code, "lab")


async def test_who_left_comes_back_by_a_new_code_only(founder, site):
    """Old news does not bring it back; it keeps nothing but its own word that it left."""
    lab = site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    old = (await founder.directory.roster(founder.foam)).items_in(range(BUCKETS))
    lab.clock.forward(minutes=1)
    await lab.leave(founder.foam, founder)
    await founder.directory.merge(founder.foam, old)
    assert await founder.names(founder.foam) == {"university"}
    assert [await lab.store.read(shelf, founder.foam) != {} for shelf in Shelf] == [
        shelf is Shelf.REVOCATION for shelf in Shelf
    ]
    lab.clock.forward(minutes=1)
    await lab.join(founder, await founder.code(founder.foam), "lab")
    await exchange(founder.foam, founder, lab)
    assert await founder.names(founder.foam) == await lab.names(founder.foam)
    assert await lab.names(founder.foam) == {"university", "lab"}


async def test_who_left_unheard_comes_back_all_the_same(founder, site):
    """The inviter, who thinks it a member still, hears of both when it joins again."""
    lab = site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    lab.clock.forward(minutes=1)
    await lab.leave(founder.foam)
    lab.clock.forward(minutes=1)
    code = await founder.code(founder.foam)
    assert await lab.join(founder, code, "lab") == founder.foam


async def test_a_founder_may_leave_and_come_back(founder, site):
    """A community is its founder's for ever, by whosever invitation it returns."""
    manager = site()
    await manager.join(founder, await founder.code(founder.foam, tuple(Role)), "manager")
    founder.clock.forward(minutes=1)
    await founder.leave(founder.foam, manager)
    assert await manager.names(founder.foam) == {"manager"}
    founder.clock.forward(minutes=1)
    await founder.join(manager, await manager.code(founder.foam), "university")
    await exchange(founder.foam, founder, manager)
    mine = await manager.directory.member(founder.foam, founder.key)
    assert mine.membership.roles == tuple(Role)


class TestApproval:
    async def ask(self, founder, site, name="lab", **more):
        code = await founder.code(founder.foam, approve=True, **more)
        lab = site()
        reply = await founder.communities.accept_join(lab.key, lab.ask(code, name))
        assert reply.waits
        assert reply.credential == ""
        assert reply.members == ()
        return lab, code

    async def test_who_asks_is_admitted_once_approved(self, founder, site):
        """Until then it is no member and learns nothing; asking again does no harm."""
        lab, code = await self.ask(founder, site)
        lab.clock.forward(minutes=5)
        assert (await founder.communities.accept_join(lab.key, lab.ask(code, "lab"))).waits
        assert await founder.names(founder.foam) == {"university"}
        (request,) = (await founder.communities.requests.all(founder.foam)).values()
        assert request.since == founder.clock() - timedelta(minutes=5)
        await founder.communities.approve(founder.foam, "lab")
        assert await lab.join(founder, code, "lab") == founder.foam
        assert await founder.communities.requests.all(founder.foam) == {}

    async def test_who_is_refused_is_told_so_each_time(self, founder, site):
        """Also after a restart of the inviter; a new invitation asks anew."""
        lab, code = await self.ask(founder, site)
        await founder.communities.refuse(founder.foam, lab.key[:8])
        again = Site(founder.clock, founder.store, founder.identity)
        for inviter in (founder, again):
            with pytest.raises(Forbidden, match="refused to admit lab"):
                await lab.join(inviter, code, "lab")
        with pytest.raises(NotFound):
            await founder.communities.approve(founder.foam, "lab")
        new = await founder.code(founder.foam, approve=True)
        assert (await founder.communities.accept_join(lab.key, lab.ask(new, "lab"))).waits

    async def test_one_code_serves_as_many_as_it_says(self, founder, site):
        """Each is one site, however often it asks."""
        first, code = await self.ask(founder, site, uses=2)
        for lab, name in ((first, "lab"), (site(), "second"), (first, "lab")):
            assert (await founder.communities.accept_join(lab.key, lab.ask(code, name))).waits
        with pytest.raises(Conflict, match="2 other sites"):
            await site().join(founder, code, "third")

    async def test_many_uses_want_approval(self, founder):
        """A code that leaks admits nobody unseen."""
        for more in ({"uses": 2}, {"uses": 0}, {"uses": 101, "approve": True}):
            with pytest.raises(InvalidSpec, match="--approve"):
                await founder.code(founder.foam, **more)

    async def test_a_request_ends_with_its_invitation(self, founder, site):
        """Nobody is approved by what has expired."""
        await self.ask(founder, site, valid_for=timedelta(hours=1))
        founder.clock.forward(hours=2)
        with pytest.raises(NotFound):
            await founder.communities.approve(founder.foam, "lab")

    async def test_a_name_taken_meanwhile_is_told(self, founder, site):
        """Two ask under one name: the second approval says so."""
        one, _ = await self.ask(founder, site)
        two, _ = await self.ask(founder, site)
        with pytest.raises(Conflict, match="Several"):
            await founder.communities.approve(founder.foam, "lab")
        await founder.communities.approve(founder.foam, one.key[:8])
        with pytest.raises(Conflict, match="called 'lab' already"):
            await founder.communities.approve(founder.foam, two.key)

    async def test_only_a_manager_approves(self, founder, site):
        """Who lost that role meanwhile does not."""
        manager = site()
        code = await founder.code(founder.foam, tuple(Role))
        await manager.join(founder, code, "manager")
        await self.ask(manager_of(manager, founder.foam), site)
        founder.clock.forward(minutes=1)
        await founder.governing.change_roles(founder.foam, "manager", (), ("manager",))
        await exchange(founder.foam, founder, manager)
        with pytest.raises(Forbidden, match="no manager"):
            await manager.communities.approve(founder.foam, "lab")


def manager_of(site, community):
    """Return a site with the community that `TestApproval.ask` invites to."""
    site.foam = community
    return site


@pytest.fixture
async def four(founder, site):
    """A founder, a ``manager``, a ``second`` manager, and ``lab``, admitted by the first."""
    manager, second, lab = site(), site(), site()
    for each, name in ((manager, "manager"), (second, "second")):
        await each.join(founder, await founder.code(founder.foam, tuple(Role)), name)
    await lab.join(manager, await manager.code(founder.foam), "lab")
    await exchange(founder.foam, founder, manager, second, lab)
    founder.clock.forward(minutes=5)
    return founder, manager, second, lab


class TestRemoval:
    async def test_a_removed_member_is_told_who_when_and_why(self, four):
        """Everywhere the removal is known, and its old credential does not help."""
        founder, manager, _, lab = four
        asking = await lab.directory.asking(founder.foam)
        await manager.governing.remove(founder.foam, "lab", "moved away")
        await exchange(founder.foam, founder, manager)
        for site in (founder, manager):
            with pytest.raises(Forbidden) as caught:
                await site.directory.admit(lab.key, asking)
            assert caught.value.message == (
                f"lab ({lab.key[:8]}) was removed from foam on 2026-05-01 by manager: moved away."
            )
            assert "new invitation" in caught.value.hint
        again = Site(founder.clock, founder.store, founder.identity)
        with pytest.raises(Forbidden, match="was removed"):
            await again.directory.admit(lab.key, asking)

    async def test_a_code_from_before_the_removal_does_not_admit(self, four):
        """A new one does."""
        founder, manager, _, lab = four
        old = await founder.code(founder.foam)
        founder.clock.forward(minutes=1)
        await manager.governing.remove(founder.foam, "lab", "")
        await exchange(founder.foam, founder, manager, lab)
        with pytest.raises(Forbidden, match="removed"):
            await lab.join(founder, old, "lab")
        founder.clock.forward(minutes=1)
        await lab.join(founder, await founder.code(founder.foam), "lab")
        await exchange(founder.foam, *four)
        assert await founder.names(founder.foam) == {"university", "manager", "second", "lab"}

    async def test_a_removed_site_knows_it(self, four):
        """It asks nothing of that community any more, and says why."""
        founder, _, _, lab = four
        await founder.governing.remove(founder.foam, "lab", "")
        await exchange(founder.foam, founder, lab)
        with pytest.raises(Forbidden, match="removed from foam"):
            await lab.directory.asking(founder.foam)

    async def test_ranks_are_kept(self, four):
        """A plain member removes nobody, a manager no manager, and nobody the founder or itself."""
        founder, manager, _, lab = four
        for site, target, why in (
            (lab, "manager", "no manager"),
            (manager, "second", "only the founder"),
            (manager, "university", "Nobody"),
            (manager, founder.key, "Nobody"),
        ):
            with pytest.raises(Forbidden, match=why):
                await site.governing.remove(founder.foam, target, "")
        for site, name in ((founder, "university"), (manager, "manager")):
            with pytest.raises(InvalidSpec, match="leave"):
                await site.governing.remove(founder.foam, name, "")
        with pytest.raises(NotFound):
            await founder.governing.remove(founder.foam, "nobody", "")
        with pytest.raises(InvalidSpec, match="reason"):
            await founder.governing.remove(founder.foam, "lab", "\n")

    async def test_removing_a_manager_keeps_its_members_and_its_removals(self, four, site):
        """Its word is signed anew first: its members stay with name, roles and date, whom it
        removed stays away, and what it signs afterwards, back-dated, is worth nothing."""
        founder, manager, second, lab = four
        gone = site()
        await gone.join(manager, await manager.code(founder.foam), "gone")
        founder.clock.forward(minutes=1)
        await manager.governing.remove(founder.foam, "gone", "moved away")
        await exchange(founder.foam, *four)
        before = (await founder.directory.member(founder.foam, lab.key)).membership
        chain = (await manager.directory.myself(founder.foam)).record.credential
        founder.clock.forward(minutes=1)
        await founder.governing.remove(founder.foam, "manager", "")
        await exchange(founder.foam, *four)
        assert await second.names(founder.foam) == {"university", "second", "lab"}
        after = (await lab.directory.myself(founder.foam)).membership
        assert (after.issuer, after.roles) == (founder.key, before.roles)
        assert after.admitted_at == before.admitted_at
        roster = await second.directory.roster(founder.foam)
        assert roster.revoked(gone.key).reason == "moved away"
        eve = site()
        back = before.model_copy(
            update={"member": eve.key, "site_name": "eve", "issuer": manager.key}
        )
        record = MemberRecord(
            credential=f"{sign(manager.identity, back)}~{chain}",
            presence=eve.directory.presence(),
        )
        assert await second.directory.merge(founder.foam, [record]) == 0
        assert eve.key not in roster.members
        revocation = Revocation(
            community=founder.foam, member=lab.key, issuer=manager.key, revoked_at=back.issued_at
        )
        forged = RevocationRecord(revocation=sign(manager.identity, revocation), proof=chain)
        assert not await second.directory.add(founder.foam, forged)
        assert lab.key in roster.members

    async def test_a_manager_that_leaves_takes_nobody_along(self, four):
        """The founder, hearing of it, makes its word its own; others keep its members too."""
        founder, manager, second, lab = four
        await manager.leave(founder.foam, founder, second)
        assert await second.names(founder.foam) == {"university", "second", "lab"}
        await exchange(founder.foam, founder, second, lab)
        assert await lab.names(founder.foam) == {"university", "second", "lab"}
        mine = await lab.directory.myself(founder.foam)
        assert mine.membership.issuer == founder.key

    async def test_managers_go_on_without_the_founder(self, four, site):
        """Its key lost, they invite, approve and remove; they make no managers."""
        founder, manager, second, _lab = four
        new = site()
        code = await second.code(founder.foam, approve=True)
        assert (await second.communities.accept_join(new.key, new.ask(code, "new"))).waits
        await second.communities.approve(founder.foam, "new")
        await new.join(second, code, "new")
        await manager.governing.remove(founder.foam, "lab", "")
        await exchange(founder.foam, manager, second, new)
        assert await new.names(founder.foam) == {"university", "manager", "second", "new"}
        with pytest.raises(Forbidden, match="founder"):
            await second.governing.change_roles(founder.foam, "new", ("manager",), ())


class TestPromotion:
    async def test_new_roles_reach_the_member_and_count(self, four, site):
        """The member hears of its own newer credential from others, and uses it."""
        founder, manager, second, lab = four
        await founder.governing.change_roles(founder.foam, "lab", ("manager",), ("consumer",))
        await exchange(founder.foam, founder, second)
        await exchange(founder.foam, second, lab)
        mine = await lab.directory.myself(founder.foam)
        assert mine.membership.roles == (Role.PROVIDER, Role.MANAGER)
        new = site()
        await new.join(lab, await lab.code(founder.foam), "new")
        await exchange(founder.foam, *four)
        assert "new" in await manager.names(founder.foam)

    async def test_a_manager_changes_plain_members_only(self, four):
        """The rest is the founder's."""
        founder, manager, _, lab = four
        changed = await manager.governing.change_roles(founder.foam, "lab", (), ("provider",))
        assert changed.membership.roles == (Role.CONSUMER,)
        for target, add in (("lab", ("manager",)), ("second", ()), ("university", ())):
            with pytest.raises(Forbidden, match="founder"):
                await manager.governing.change_roles(founder.foam, target, add, ("consumer",))
        with pytest.raises(Forbidden, match="no manager"):
            await lab.governing.change_roles(founder.foam, "lab", ("manager",), ())

    @pytest.mark.parametrize(
        ("target", "add", "drop"),
        [
            ("lab", ("king",), ()),
            ("lab", ("manager",), ("manager",)),
            ("lab", (), ("provider", "consumer")),
            ("university", (), ("manager",)),
        ],
    )
    async def test_roles_that_make_no_sense_are_refused(self, four, target, add, drop):
        """Unknown, both given and taken, none left, or a founder that manages no more."""
        founder = four[0]
        with pytest.raises(InvalidSpec):
            await founder.governing.change_roles(founder.foam, target, add, drop)

    async def test_a_manager_made_plain_keeps_its_members(self, four):
        """As with a removal, what it signed is signed anew."""
        founder, manager, second, _lab = four
        await founder.governing.change_roles(founder.foam, "manager", (), ("manager",))
        await exchange(founder.foam, *four)
        assert await second.names(founder.foam) == {"university", "manager", "second", "lab"}
        with pytest.raises(Forbidden, match="no manager"):
            await manager.code(founder.foam)


async def test_a_store_of_an_earlier_version_is_read(founder, site):
    """It kept one row for each member, under its key alone; nothing else."""
    lab = site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    old = Site(lab.clock, MemoryCommunityStore(), lab.identity)
    members = await lab.directory.members(founder.foam)
    rows = {
        key: (member.record.credential, member.record.presence) for key, member in members.items()
    }
    await old.store.save(Shelf.MEMBER, founder.foam, rows)
    await old.store.save_community(founder.foam, await lab.directory.founding(founder.foam))
    assert await old.names(founder.foam) == {"university", "lab"}
    kept = await old.store.read(Shelf.MEMBER, founder.foam)
    assert len(kept) == 2
    assert not kept.keys() & rows.keys()


async def test_what_is_kept_is_believed_under_a_clock_set_back(founder, site):
    """It was proved when it came; nobody vanishes from the list for a wrong clock."""
    lab = site()
    await lab.join(founder, await founder.code(founder.foam), "lab")
    lab.clock.forward(days=-30)
    again = Site(lab.clock, lab.store, lab.identity)
    assert await again.names(founder.foam) == {"university", "lab"}


async def test_a_presence_is_signed_anew_when_it_changes_or_ages(founder):
    """Not for each message: its time is its version, which others pass on."""
    first = founder.directory.presence()
    founder.clock.forward(minutes=59)
    assert founder.directory.presence() == first
    founder.clock.forward(minutes=1)
    second = founder.directory.presence()
    founder.addresses = ("10.0.0.9:1",)
    third = founder.directory.presence()
    founder.directory.relays = True
    fourth = founder.directory.presence()
    assert len({first, second, third, fourth}) == 4
    said = [verify(each, Presence, founder.key, founder.clock()) for each in (third, fourth)]
    assert said[0].issued_at < said[1].issued_at
    assert (said[1].addresses, said[1].relays) == (("10.0.0.9:1",), True)


async def test_a_member_is_found_by_name_or_key(four):
    """By what lists show, or by the beginning of its key, of which less than 8 digits is none."""
    founder, _, _, lab = four
    for word in ("lab", lab.key, lab.key[:8]):
        assert (await founder.directory.find(founder.foam, word)).key == lab.key
    for word in (lab.key[:7], "", "laboratory", "x" * 64):
        with pytest.raises(NotFound):
            await founder.directory.find(founder.foam, word)
