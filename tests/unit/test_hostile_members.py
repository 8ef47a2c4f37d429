"""What a hostile member, or a stranger, can do to a site and what it cannot; whole brokers."""

import asyncio
import json
from collections import Counter
from datetime import timedelta

import pytest
import structlog

from gridcloud.errors import Unavailable
from gridcloud.grid.communities import CODE_PREFIX
from gridcloud.grid.limits import MEMBER_BURST, MEMBER_BYTES, STRANGER_BURST, STRANGERS_BURST
from gridcloud.grid.messages import (
    PROTOCOL_VERSION,
    Asking,
    JoinBody,
    Kind,
    LeaveBody,
    MemberRecord,
    Nothing,
    decode_request,
    encode_reply,
)
from gridcloud.grid.news import NEWS_BYTES, News, ProbeBody, Rumour, SyncReply
from gridcloud.grid.papers import Role
from gridcloud.grid.swim import PeerState
from gridcloud.site.log_lines import AT_ONCE, PER_SECOND, Restraint, printable
from simulation.virtual_time import EPOCH
from testbeds.hostile import (
    ADA,
    COMMUNITY,
    CREDENTIALS,
    EVE,
    FOUNDER,
    STRANGER,
    Victim,
    bodies,
    identity,
    invitation,
    membership,
    message,
    offer,
    presence,
    receipt,
    revocation,
    word,
)

BODIES = bodies(EVE, FOUNDER)
SECOND = timedelta(seconds=1)


@pytest.fixture
def victim():
    with Victim() as one:
        yield one


def known(victim):
    """Return the circle of the community that everybody here is in."""
    return victim.broker._gossip.exchanges.circles[COMMUNITY]


def probe(who, **news):
    return message(Kind.PROBE, ProbeBody(words=(word(who, **news),)))


class TestReplays:
    """What was true once, said again."""

    def test_a_request_from_before_is_refused(self, victim):
        """A message caught on its way is worth a minute; then its time gives it away."""
        caught = message(Kind.LEASE, BODIES[Kind.LEASE])(victim.clock())
        later = victim.ask(EVE, lambda _now: caught)  # asks a minute later: just in time
        assert later["ok"]
        for _ in range(2):
            late = victim.ask(EVE, lambda _now: caught)
            assert (late["ok"], late["code"]) == (False, "conflict")
        assert len(victim.noted.leases) == 1

    def test_a_request_repeated_in_time_is_one_request(self, victim):
        """The same lease twice is one lease."""
        lease = message(Kind.LEASE, BODIES[Kind.LEASE])
        replies = victim.ask_at_once([(EVE, lease)] * 20)
        assert len({json.dumps(reply["body"]) for reply in replies}) == 1
        assert len(victim.noted.leases) == 1

    def test_a_request_used_for_something_else_is_refused(self, victim):
        """One name means one lease: who asks by it for more gets neither more nor a fault."""
        body = BODIES[Kind.LEASE]
        assert victim.ask(EVE, message(Kind.LEASE, body))["ok"]
        more = body.model_copy(update={"need": body.need.model_copy(update={"cpus": 64})})
        assert victim.ask(EVE, message(Kind.LEASE, more))["code"] == "conflict"
        assert [lease.need.cpus for lease in victim.noted.leases.values()] == [1]

    def test_another_borrower_gains_nothing_by_repeating_it(self, victim):
        """A request says nothing of its sender; under another key it is another's."""
        lease = message(Kind.LEASE, BODIES[Kind.LEASE])
        assert victim.ask(EVE, lease)["ok"]
        for thief in (ADA, STRANGER):
            assert victim.ask(thief, lease)["code"] == "forbidden"
        assert len(victim.noted.leases) == 1

    def test_old_papers_change_nothing(self, victim):
        """An address moved from, a role lost, an offer withdrawn: the newer word stands."""
        newer, older = presence(ADA, EPOCH + SECOND, "10.1.1.1:1"), presence(ADA)
        moved = MemberRecord(credential=CREDENTIALS[ADA.key], presence=newer)
        plain = membership(ADA, "ada", (Role.CONSUMER,), at=EPOCH + SECOND)
        fewer = MemberRecord(credential=plain, presence=newer)
        assert victim.ask(EVE, probe(EVE, members=(moved, fewer), offers=(offer(ADA, "ada", 2),)))
        victim.ask(EVE, probe(EVE, revocations=(), offers=(offer(EVE, "eve", 2),)))
        before = victim.state()
        old = MemberRecord(credential=CREDENTIALS[ADA.key], presence=older)
        offers = (offer(ADA, "ada", 1), offer(EVE, "eve", 1))
        assert victim.ask(EVE, probe(EVE, members=(old,) * 20, offers=offers))["ok"]
        assert victim.state() == before
        assert known(victim).roster.members[ADA.key].presence.addresses == ("10.1.1.1:1",)
        assert known(victim).book.version(EVE.key) == 2


@pytest.mark.parametrize("version", [0, 1, PROTOCOL_VERSION + 1, -1])
def test_another_version_of_the_protocol_is_not_spoken(victim, version):
    """Nobody is talked down to an older one; the refusal names both."""

    def said(now):
        tree = {"v": version, "kind": "ping", "id": "1", "sent_at": now.isoformat(), "body": {}}
        return json.dumps(tree).encode()

    reply = victim.ask(EVE, said)
    assert reply["code"] == "invalid-spec"
    assert str(PROTOCOL_VERSION) in reply["message"]


class TestLies:
    """A member says what is not so."""

    def test_nobody_offers_for_another(self, victim):
        """Neither another's name nor another's key can be put under an offer."""
        before = victim.state()
        for lie in (offer(EVE, "ada"), offer(STRANGER, "ada"), offer(FOUNDER, "eve")):
            assert victim.ask(EVE, probe(EVE, offers=(lie,)))["ok"]
        offers = {each.site_name: each for each in known(victim).book.listed(FOUNDER.key, _unseen)}
        assert offers["ada"].digest is None
        assert "cannot be used" in offers["eve"].problem
        assert victim.state()[0] == before[0]

    def test_what_others_are_said_to_offer_is_no_blame_of_theirs(self, victim):
        """A broken offer in Ada's name is laid at nobody's door but the teller's."""
        assert victim.ask(ADA, probe(ADA, offers=(offer(ADA, "ada"),)))["ok"]
        broken = offer(ADA, "eve", version=9)
        victim.ask(EVE, probe(EVE, offers=(broken, "a.b.c", broken[:-4] + "AAAA")))
        offers = {each.site_name: each for each in known(victim).book.listed(FOUNDER.key, _unseen)}
        assert offers["ada"].digest is not None

    def test_rumours_kill_nobody(self, victim):
        """What a member says of others makes the site look for itself; it believes nothing."""
        swim = victim.broker._gossip.swim
        victim.ask(ADA, message(Kind.PING, Nothing()))
        assert swim.seen(ADA.key).state is PeerState.ALIVE
        lies = tuple(Rumour(key=ADA.key, state=PeerState.DEAD) for _ in range(16))
        for _ in range(50):
            victim.ask(EVE, probe(EVE, rumours=lies))
        assert swim.seen(ADA.key).state is PeerState.ALIVE

    @pytest.mark.parametrize("target", [ADA, FOUNDER], ids=["member", "founder"])
    def test_nobody_is_removed_by_a_plain_member(self, victim, target):
        """Whatever proof is shown: by request, as news, and as a stranger too."""
        before = victim.state()
        for proof in ("", CREDENTIALS[EVE.key], CREDENTIALS[FOUNDER.key]):
            said = LeaveBody(community=COMMUNITY, revocation=revocation(target, EVE), proof=proof)
            for who in (EVE, STRANGER):
                assert not victim.ask(who, message(Kind.LEAVE, said))["ok"]
            word_of_it = said.model_dump(exclude={"community"})
            victim.ask(EVE, probe(EVE, revocations=(word_of_it,)))
        assert victim.state() == before

    def test_a_name_is_taken_from_nobody(self, victim):
        """A newcomer cannot come in under a member's name, nor a member give itself another."""
        code = victim.run(victim.broker.invite("foam", ("consumer",), timedelta(days=1))).code
        join = JoinBody(
            invitation=code.removeprefix(CODE_PREFIX), site_name="ada", presence=presence(STRANGER)
        )
        assert victim.ask(STRANGER, message(Kind.JOIN, join))["code"] == "conflict"
        other = MemberRecord(
            credential=membership(EVE, "ada", issuer=EVE), presence=presence(EVE, EPOCH + SECOND)
        )
        victim.ask(EVE, probe(EVE, members=(other,)))
        roster = known(victim).roster
        assert roster.named("ada").key == ADA.key
        assert roster.shown(EVE.key) == "eve"

    def test_nobody_is_admitted_by_a_plain_member(self, victim):
        """Strangers that a member vouches for stay strangers, and fill nothing."""
        before = victim.state()
        strangers = [identity(f"sock {number}") for number in range(7)]
        told = tuple(
            MemberRecord(
                credential=f"{membership(each, 'sock', issuer=EVE)}~{CREDENTIALS[EVE.key]}",
                presence=presence(each),
            )
            for each in strangers
        )
        assert victim.ask(EVE, probe(EVE, members=told))["ok"]
        assert victim.state() == before

    def test_receipts_of_loans_that_never_were_are_not_kept(self, victim):
        """The tenant is asked and refuses; what is no receipt does not get that far."""
        for document in ("a.b.c", receipt(ADA, FOUNDER), offer(EVE, "eve")):
            body = BODIES[Kind.RECEIPT].model_copy(update={"receipt": document})
            victim.ask(EVE, message(Kind.RECEIPT, body))
        assert known(victim).book.version(EVE.key) == -1


class TestFloods:
    """Much of everything, while an honest member goes on asking."""

    @pytest.mark.parametrize("kind", list(Kind))
    def test_requests_of_one_member_are_bounded_and_another_is_answered(self, victim, kind):
        """A thousand at once: what is over the bound is told so, and Ada does not notice."""
        flood = [(EVE, message(kind, BODIES[kind]))] * 1000
        honest = (ADA, message(Kind.PING, Nothing()))
        asked = []
        for at, each in enumerate(flood):
            asked.append(each)
            if at % 100 == 0:
                asked.append(honest)
        replies = victim.ask_at_once(asked)
        for (who, _), reply in zip(asked, replies, strict=True):
            assert who is EVE or reply["ok"]
        refused = [r for r in replies if not r["ok"] and "too often" in r["message"]]
        assert len(refused) >= 1000 - MEMBER_BURST

    def test_what_one_member_may_have_proved_is_bounded(self, victim, monkeypatch):
        """News of its own that is new each time costs signatures: so much a second, by its size."""
        proved = Counter()
        add = type(known(victim).roster).add

        def counted(self, item):
            proved["items"] += 1
            return add(self, item)

        monkeypatch.setattr(type(known(victim).roster), "add", counted)
        members = tuple(
            MemberRecord(
                credential=CREDENTIALS[EVE.key],
                presence=presence(EVE, EPOCH + timedelta(microseconds=number)),
            )
            for number in range(60)
        )
        flood = [(EVE, probe(EVE, members=members))] * 150
        size = len(flood[0][1](EPOCH))
        replies = victim.ask_at_once([*flood, (ADA, message(Kind.PING, Nothing()))])
        assert replies[-1]["ok"]
        taken = sum(reply["ok"] for reply in replies[:-1])
        assert taken <= MEMBER_BYTES[1] / size + 1
        assert proved["items"] <= 61 * (taken + 1)

    def test_others_are_not_made_to_pass_on_junk_without_end(self, victim):
        """However often a member changes its mind, one word of it is under way, within the size."""
        for number in range(100):
            at = EPOCH + timedelta(seconds=number)
            newer = MemberRecord(credential=CREDENTIALS[EVE.key], presence=presence(EVE, at))
            victim.ask(EVE, probe(EVE, members=(newer,), offers=(offer(EVE, "eve", number, at),)))
        assert len(known(victim)._news._entries) <= 3
        told, left = known(victim).word(Asking(**_asking()), ADA.key, NEWS_BYTES)
        assert 0 <= left <= NEWS_BYTES
        assert len(told.news.members) + len(told.news.offers) <= 3

    def test_strangers_with_many_keys_share_one_budget(self, victim):
        """Join attempts by a thousand keys: few are even read, and a member is answered."""
        forged = JoinBody(
            invitation=invitation(STRANGER), site_name="x", presence=presence(STRANGER)
        )
        join = message(Kind.JOIN, forged)
        strangers = [(identity(f"stranger {number}"), join) for number in range(1000)]
        replies = victim.ask_at_once([*strangers, (EVE, message(Kind.PING, Nothing()))])
        assert replies[-1]["ok"]
        read = [reply for reply in replies[:-1] if "too often" not in reply["message"]]
        assert len(read) <= STRANGERS_BURST
        one = victim.ask_at_once([(STRANGER, join)] * 100)
        assert sum("too often" not in reply["message"] for reply in one) <= STRANGER_BURST

    def test_a_flood_is_over_when_it_is_over(self, victim):
        """Who was refused for asking too often is served again a little later."""
        victim.ask_at_once([(EVE, message(Kind.PING, Nothing()))] * 1000)
        assert victim.ask(EVE, message(Kind.PING, Nothing()))["ok"]


class TestDealings:
    """What a hostile peer does when it is asked, or has others ask."""

    def test_a_peer_that_drips_pages_does_not_keep_others_from_comparing(self, victim):
        """A comparison ends in bounded time, whatever the peer answers."""

        async def drip(_key, said):
            await asyncio.sleep(4)
            offset = decode_request(said, victim.clock()).body["offset"]
            news = News(offers=(offer(EVE, "eve", version=offset + 1),))
            return encode_reply(SyncReply(news=news, offset=offset + 1), victim.clock())

        assert _time_to_sync(victim, drip) < 130

    def test_a_peer_that_sends_empty_pages_is_left_at_once(self, victim):
        """A page with nothing in it is the last."""

        asked = []

        async def empty(_key, said):
            asked.append(said)
            offset = decode_request(said, victim.clock()).body["offset"]
            return encode_reply(SyncReply(news=News(), offset=offset + 1), victim.clock())

        _time_to_sync(victim, empty)
        assert len(asked) == 1

    def test_a_helper_tells_nothing_of_its_network(self, victim):
        """A member that says it lives at an address of the helper's network learns by the helper
        neither what answers there, nor how."""
        where = presence(ADA, EPOCH + SECOND, "127.0.0.1:22")
        victim.ask(ADA, message(Kind.OFFERS, Asking(**_asking(ADA) | {"presence": where})))
        reply = victim.ask(EVE, message(Kind.PROBE_FOR, BODIES[Kind.PROBE_FOR]))
        assert reply["code"] == Unavailable.code
        assert "127.0.0.1" not in json.dumps(reply)
        assert "answered" not in reply["message"]
        assert "refused" not in reply["message"]


class TestLog:
    """What a hostile peer leaves in the log."""

    def test_secrets_are_not_in_it(self, victim):
        """Join codes and keys are handled, refused and failed with, and none is written down."""
        lines = []
        structlog.configure(
            processors=[
                structlog.processors.format_exc_info,
                printable,
                structlog.processors.LogfmtRenderer(),
                lambda _logger, _method, line: lines.append(line) or line,
            ]
        )
        try:
            code = victim.run(victim.broker.invite("foam", ("consumer",), timedelta(days=1))).code
            secret = victim.run(_secret_of(code))
            document = code.removeprefix(CODE_PREFIX)
            for said in (document, document[:-3] + "AAA", document[40:]):
                for kind in Kind:
                    tree = BODIES[kind].model_dump(mode="json")
                    for name, value in tree.items():
                        if isinstance(value, str):
                            tree[name] = said
                    request = {"v": 2, "kind": kind, "id": said[:60], "body": tree}
                    victim.ask(
                        STRANGER,
                        lambda now, request=request: json.dumps(
                            request | {"sent_at": now.isoformat()}
                        ).encode(),
                    )
            join = JoinBody(invitation=document, site_name="eve", presence=presence(STRANGER))
            victim.ask(STRANGER, message(Kind.JOIN, join))
            victim.broker._lender = None  # a fault of the site, with all it has at hand
            assert victim.ask(EVE, message(Kind.LEASE, BODIES[Kind.LEASE]))["code"] == "internal"
        finally:
            structlog.reset_defaults()
        written = "\n".join(lines)
        assert "request refused" in written
        assert "Traceback" in written
        for hidden in (code, document, secret, FOUNDER.secret_bytes.hex(), document[-40:]):
            assert hidden not in written

    def test_a_flood_fills_no_disk(self, victim):
        """Lines of one kind come at a small rate, and the log says how many were left out."""
        now, lines = 0.0, []
        restraint = Restraint(clock=lambda: now)
        structlog.configure(
            processors=[restraint, lambda _logger, _method, line: lines.append(line) or str(line)]
        )
        try:
            for hour in range(3):
                now = hour * 3600.0
                victim.ask_at_once([(EVE, lambda _now: b"nonsense")] * 1500)
        finally:
            structlog.reset_defaults()
        refused = [line for line in lines if line["event"] == "request refused"]
        assert len(refused) <= AT_ONCE * 3
        assert sum(line.get("left_out_before", 0) for line in refused) == 2000
        assert PER_SECOND * 3600 >= AT_ONCE

    def test_other_events_are_not_left_out_for_a_flood(self):
        """Only what comes too often is left out."""
        restraint = Restraint(clock=lambda: 0.0)
        for _ in range(int(AT_ONCE)):
            restraint(None, "info", {"event": "request refused"})
        with pytest.raises(structlog.DropEvent):
            restraint(None, "info", {"event": "request refused"})
        assert restraint(None, "info", {"event": "lent"})

    def test_a_peer_steers_no_terminal(self):
        """Control characters in what a peer said are shown as question marks."""
        line = printable(None, "info", {"event": "x", "cause": "a\x1b[31m\rb\nc\u202e"})
        assert line["cause"] == "a?[31m?b\nc?"


def _unseen(_key):
    from gridcloud.grid.swim import Seen

    return Seen(state=PeerState.ALIVE)


def _asking(who=FOUNDER):
    return {
        "community": COMMUNITY,
        "credential": CREDENTIALS[who.key],
        "presence": presence(who),
    }


async def _secret_of(code):
    from gridcloud.grid.communities import read_code

    return read_code(code, EPOCH + timedelta(minutes=1))[1].secret


def _time_to_sync(victim, answer):
    """Return how long the victim compares with Eve, who answers so."""

    async def go():
        node = victim.network.node(EVE.key)
        await node.start(answer)
        where = presence(EVE, EPOCH + SECOND, node.address().addresses[0])
        await victim.broker._directory.merge(
            COMMUNITY, [MemberRecord(credential=CREDENTIALS[EVE.key], presence=where)]
        )
        began = asyncio.get_running_loop().time()
        await victim.broker._gossip.exchanges.sync(known(victim), EVE.key)
        return asyncio.get_running_loop().time() - began

    return victim.run(go())
