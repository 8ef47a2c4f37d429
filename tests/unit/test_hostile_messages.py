"""Requests and replies of a peer that tampers with them: each is refused, and changes nothing."""

import json
import logging
import random
import time

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridcloud.errors import GridcloudError
from gridcloud.grid.messages import (
    MAX_VALUES,
    GrantBody,
    JoinedBody,
    Kind,
    ReceiptReply,
    decode_reply,
    decode_request,
    encode_reply,
    reading_cost,
)
from gridcloud.grid.news import ProbeReply, SyncReply, VouchReply
from gridcloud.grid.transport import MAX_MESSAGE_BYTES
from simulation.virtual_time import EPOCH
from testbeds.hostile import (
    ADA,
    COMMUNITY,
    EVE,
    FOUNDER,
    FOUNDING,
    STRANGER,
    Victim,
    bodies,
    grant,
    message,
    offer,
    record,
    retold,
    twisted,
    word,
)

BODIES = bodies(EVE, FOUNDER)
WITH_DOCUMENTS = [kind for kind in Kind if kind not in (Kind.PING, Kind.RELEASE)]
#: A refusal that says so is a fault of the site's own.
FAULT = "internal"
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """Each refusal is a line in the log, and there are thousands."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def victim():
    with Victim() as one:
        yield one


def asked(victim, who, said):
    """Ask; return whether it was granted. Nothing a refusal leaves behind is a change."""
    victim.wait()
    before = victim.state()
    (reply,) = victim.ask_at_once([(who, said)])
    assert reply["ok"] or reply["code"] != FAULT, reply
    if not reply["ok"]:
        assert victim.state() == before, reply
    return reply["ok"]


def test_the_untampered_messages_are_understood(victim):
    """What the tests below tamper with is right before."""
    with Victim() as fresh:
        for kind, body in BODIES.items():
            reply = fresh.ask(EVE, message(kind, body))
            assert reply["ok"] or reply["code"] in (
                "forbidden",
                "unavailable",
                "not-found",
            ), (kind, reply)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_tampered_request_is_refused_without_a_trace(victim, kind):
    """Whatever is in it, it is no fault of the site, and a refusal leaves all as it was."""
    tree = BODIES[kind].model_dump(mode="json")

    @quick
    @given(twisted({"body": tree}), st.sampled_from([EVE, EVE, STRANGER, ADA]))
    def attempt(twist, who):
        def said(now):
            request = {"v": 2, "kind": kind, "id": "1", "sent_at": now.isoformat()}
            return json.dumps(request | twist).encode()

        asked(victim, who, said)

    attempt()


@quick
@given(st.sampled_from(WITH_DOCUMENTS), st.integers(0, 2**64))
def test_a_document_tampered_with_by_its_signer_is_refused_without_a_trace(victim, kind, seed):
    """A member signs nonsense in its own name, truly, and puts it where a document belongs."""
    chance = random.Random(seed)
    tree = BODIES[kind].model_dump(mode="json")
    holder, name = chance.choice(list(_documents(tree)))
    head, *chain = holder[name].split("~")
    holder[name] = "~".join([retold(head, EVE, chance), *chain])
    asked(victim, EVE, lambda now: _request(kind, tree, now))


@quick
@given(twisted({"v": 2, "kind": "ping", "id": "1", "sent_at": "now", "body": {}}))
def test_a_tampered_envelope_is_refused(victim, twist):
    """Version, kind, number and time may be anything."""

    def said(now):
        if twist.get("sent_at") == "now":
            twist["sent_at"] = now.isoformat()
        return json.dumps(twist).encode()

    asked(victim, EVE, said)


@quick
@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:0123456789eE+-.\\untrfal', max_size=300))
def test_noise_is_refused(victim, said):
    """Bytes without any meaning."""
    said = said.encode() if isinstance(said, str) else said
    assert not asked(victim, EVE, lambda _now: said)


REPLIES = [
    ProbeReply(words=(word(EVE, members=(record(EVE),), offers=(offer(EVE, "eve"),)),)),
    SyncReply(news=word(EVE, members=(record(EVE),)).news, offset=1),
    VouchReply(word=offer(EVE, "eve")),
    GrantBody(grant=grant(EVE, FOUNDER)),
    JoinedBody(community=FOUNDING, credential=offer(EVE, "eve"), members=(record(EVE),)),
    ReceiptReply(countersignature=offer(EVE, "eve"), dispute="because"),
]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_a_tampered_reply_is_an_error_and_no_fault(reply):
    """The asked site may answer anything, too."""
    tree = json.loads(encode_reply(reply, EPOCH))
    refusal = {"ok": False, "now": tree["now"], "code": "forbidden", "message": "m", "hint": "h"}

    @quick
    @given(twisted(tree) | twisted(refusal))
    def attempt(twist):
        try:
            decode_reply(json.dumps(twist).encode(), type(reply), EPOCH)
        except GridcloudError as error:
            assert error.message.isprintable()

    attempt()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("unknown fields", '{"a%d":1}'),
        ("bad documents", '{"words":[{"news":{"offers":[%s]}}]}'),
        ("empty lists", '{"words":[%s]}'),
    ],
)
def test_the_time_to_refuse_is_bounded_by_what_is_counted(victim, name, body):
    """No message of the largest size makes the site busy for long: it is refused unread, or paid
    for by its sender."""
    inside = ",".join(f'"a{n}":1' for n in range(90_000))
    body = {
        "unknown fields": "{" + inside + "}",
        "bad documents": '{"words":[{"news":{"offers":[' + "1," * 400_000 + "1]}}]}",
        "empty lists": '{"words":[' + "[]," * 300_000 + "[]]}",
    }[name]

    def said(now):
        head = f'{{"v":2,"kind":"probe","id":"1","sent_at":"{now.isoformat()}","body":'
        text = (head + body + "}").encode()
        assert len(text) <= MAX_MESSAGE_BYTES
        assert reading_cost(text) > MAX_VALUES * 32
        return text

    began = time.process_time()
    assert not asked(victim, EVE, said)
    assert time.process_time() - began < 0.2


def test_what_must_be_understood_still_is():
    """The bound on values leaves room for the longest message that brokers send."""
    page = SyncReply(news=word(EVE, members=(record(EVE),) * 300).news, offset=2**32)
    assert decode_reply(encode_reply(page, EPOCH), SyncReply, EPOCH) == page
    sync = message(Kind.SYNC, BODIES[Kind.SYNC])(EPOCH)
    assert decode_request(sync, EPOCH).kind is Kind.SYNC
    assert reading_cost(sync) < 16 * 1024


def _request(kind, tree, now):
    request = {"v": 2, "kind": kind, "id": "1", "sent_at": now.isoformat(), "body": tree}
    return json.dumps(request).encode()


def _documents(tree):
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in inside:
        if isinstance(value, dict | list):
            yield from _documents(value)
        elif isinstance(value, str) and value.count(".") >= 2 and value != COMMUNITY:
            yield tree, name
