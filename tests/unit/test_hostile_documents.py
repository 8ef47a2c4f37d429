"""Signed documents of who tampers with them, or signs nonsense: a clear error, and nothing else."""

import base64
import json
import random
import time
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gridcloud.access.certificates import parse_certificate
from gridcloud.access.keys import parse_public
from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec
from gridcloud.grid.books import Auditor, Heading, NameLine, ReceiptLine
from gridcloud.grid.communities import CODE_PREFIX, read_code
from gridcloud.grid.credentials import read_credential, read_revocation
from gridcloud.grid.documents import LEEWAY, claimed_signer, sign, verify
from gridcloud.grid.identity import Identity, is_weak
from gridcloud.grid.messages import RevocationRecord
from gridcloud.grid.news import Alive
from gridcloud.grid.offers import OfferBook
from gridcloud.grid.papers import (
    Address,
    CommunityPaper,
    Invitation,
    Key,
    LeaseGrant,
    Membership,
    OfferDigest,
    Presence,
    Revocation,
    Role,
)
from gridcloud.grid.receipts import (
    Countersignature,
    Receipt,
    chain_objections,
    link,
    loan_objections,
    read_countersignature,
    read_receipt,
    receipt_hash,
)
from gridcloud.grid.roster import Roster
from gridcloud.model.usage import Loan
from simulation.virtual_time import EPOCH
from testbeds.hostile import (
    ADA,
    COMMUNITY,
    CREDENTIALS,
    EVE,
    FOUNDER,
    FOUNDING,
    ODD_HEADERS,
    SSH_KEY,
    STRANGER,
    forged,
    grant,
    header_of,
    invitation,
    membership,
    offer,
    payload_of,
    presence,
    receipt,
    record,
    retold,
    revocation,
    twist,
    twisted,
)

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
NOW = EPOCH + timedelta(minutes=1)
ALIVE = sign(EVE, Alive(site=EVE.key, asker=FOUNDER.key, nonce="0" * 32, said_at=EPOCH))
RECEIPT = receipt(EVE, FOUNDER)
AGREED = sign(
    FOUNDER,
    Countersignature(receipt=receipt_hash(RECEIPT), borrower=FOUNDER.key, agreed_at=EPOCH),
)
DOCUMENTS = [
    (FOUNDING, CommunityPaper, FOUNDER),
    (invitation(FOUNDER), Invitation, FOUNDER),
    (CREDENTIALS[EVE.key], Membership, FOUNDER),
    (revocation(ADA, FOUNDER), Revocation, FOUNDER),
    (presence(EVE), Presence, EVE),
    (offer(EVE, "eve"), OfferDigest, EVE),
    (grant(EVE, FOUNDER), LeaseGrant, EVE),
    (ALIVE, Alive, EVE),
    (RECEIPT, Receipt, EVE),
    (AGREED, Countersignature, FOUNDER),
]
KINDS = [paper.kind for _, paper, _ in DOCUMENTS]


def refused(read):
    """Call; whatever goes in, only a clear error may come out. Returns whether one did."""
    try:
        read()
    except GridcloudError as error:
        assert error.message.isprintable()
        assert len(str(error)) < 2000
        return True
    return False


@pytest.mark.parametrize(("document", "paper", "signer"), DOCUMENTS, ids=KINDS)
def test_whatever_is_signed_is_read_or_refused(document, paper, signer):
    """The signature is right, the content or header is not; what is read is a possible value."""

    @quick
    @given(st.integers(0, 2**64))
    def attempt(seed):
        said = retold(document, signer, random.Random(seed))
        if not refused(lambda: verify(said, paper, signer.key, NOW)):
            read = verify(said, paper, signer.key, NOW)
            assert read.signer == signer.key
            assert paper.model_validate_json(read.model_dump_json()) == read
            assert read.begins_at - LEEWAY <= NOW

    attempt()


@pytest.mark.parametrize("odd", ODD_HEADERS, ids=lambda odd: "-".join(odd))
def test_header_games_are_lost(odd):
    """No other algorithm, key, kind or extension counts, though the signature fits the text."""
    for document, paper, signer in DOCUMENTS:
        if odd.get("typ") == paper.kind:
            continue
        said = forged(header_of(document) | odd, payload_of(document), signer)
        for text in (said, said[: said.rindex(".") + 1]):
            with pytest.raises((InvalidSpec, Forbidden)):
                verify(text, paper, signer.key, NOW)


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_key_written_twice_never_hides_another_signer(order):
    """Of doubled names one counts everywhere, so that no two readers see two documents."""
    document, header = presence(EVE), json.dumps(header_of(presence(EVE)))[1:-1]
    twice = f'"kid": "{STRANGER.key}"'
    parts = [twice, header] if order == "first" else [header, twice]
    said = forged(("{" + ", ".join(parts) + "}").encode(), payload_of(document), EVE)
    if order == "first":
        assert verify(said, Presence, claimed_signer(said), NOW).site == EVE.key
    else:
        with pytest.raises(Forbidden):
            verify(said, Presence, claimed_signer(said), NOW)


@quick
@given(st.integers(0, 2**64))
def test_chains_that_make_no_sense_prove_nothing(seed):
    """Credentials glued together, doubled, cut or of others make no member and no manager."""
    chance = random.Random(seed)
    manager = Identity.generate() if seed % 50 == 0 else ADA
    parts = [
        membership(STRANGER, "stranger", issuer=EVE),
        membership(STRANGER, "stranger", (Role.MANAGER,), issuer=manager),
        membership(EVE, "eve", (Role.MANAGER,), issuer=EVE),
        *CREDENTIALS.values(),
        retold(CREDENTIALS[EVE.key], EVE, chance),
        retold(membership(STRANGER, "stranger", issuer=EVE), EVE, chance),
        "",
    ]
    chosen = "~".join(chance.choices(parts, k=chance.randrange(1, 4)))
    if not refused(lambda: read_credential(chosen, COMMUNITY, NOW)):
        assert chosen in CREDENTIALS.values()
    word = RevocationRecord.model_construct(
        revocation=chance.choice(
            [
                revocation(FOUNDER, EVE),
                revocation(ADA, EVE),
                retold(revocation(ADA, EVE), EVE, chance),
            ]
        ),
        proof=chosen,
    )
    assert refused(lambda: read_revocation(word, COMMUNITY, NOW))


@quick
@given(st.integers(0, 2**64))
def test_a_roster_takes_no_nonsense(seed):
    """What a member signs wrongly in its own name leaves the roster as it was."""
    chance = random.Random(seed)
    roster = Roster(COMMUNITY, lambda: NOW)
    for who in (FOUNDER, EVE, ADA):
        roster.add(record(who))
    before = roster.digest()
    shown = record(EVE)
    said = retold(shown.presence, EVE, chance)
    item = shown.model_copy(update={"presence": said})
    if refused(lambda: roster.add(item)):
        assert roster.digest() == before
    assert set(roster.members) == {FOUNDER.key, EVE.key, ADA.key}
    assert roster.members[EVE.key].site_name == "eve"


@quick
@given(st.integers(0, 2**64))
def test_an_offer_book_takes_no_nonsense(seed):
    """An offer that cannot be is refused, and what it could be is bounded."""
    roster = Roster(COMMUNITY, lambda: NOW)
    for who in (FOUNDER, EVE):
        roster.add(record(who))
    book = OfferBook(roster, lambda: NOW)
    before = book.digest()
    said = retold(offer(EVE, "eve"), EVE, random.Random(seed))
    if refused(lambda: book.add(said)):
        assert book.digest() == before
    else:
        assert all(0 <= held.digest.offered.capacity.cpus <= 2**20 for held in book._held.values())


def test_an_offer_of_more_computers_than_there_are_is_refused():
    """2⁶⁴ CPUs are no offer, and nor is a negative number, or one that is none."""
    for cpus in (2**64, -1, 2**20 + 1, 0.5, "many", float("inf")):
        payload = payload_of(offer(EVE, "eve"))
        payload["offered"]["capacity"]["cpus"] = cpus
        said = forged(header_of(offer(EVE, "eve")), payload, EVE)
        with pytest.raises(InvalidSpec):
            verify(said, OfferDigest, EVE.key, NOW)


@quick
@given(st.integers(0, 2**64))
def test_join_codes_are_good_or_refused(seed):
    """A code is read before anybody is asked, so its reader meets the hostile first."""
    said = retold(invitation(FOUNDER), FOUNDER, random.Random(seed))
    refused(lambda: read_code(CODE_PREFIX + said, NOW))
    refused(lambda: read_code(said, NOW))


LOAN = Loan(
    lease_id="lease1",
    lender=EVE.key,
    community=COMMUNITY,
    site="eve",
    person="ada@founder",
    resources={"cpus": 1},
    starts_at=EPOCH,
    ends_at=EPOCH + timedelta(hours=1),
)


@quick
@given(st.integers(0, 2**64))
def test_receipts_are_judged_or_refused(seed):
    """Whatever a lender signs, its borrower can say in what it differs."""
    chance = random.Random(seed)
    said = retold(RECEIPT, EVE, chance)
    if not refused(lambda: read_receipt(said, EVE.key, NOW)):
        read = read_receipt(said, EVE.key, NOW)
        told = [*loan_objections(read, LOAN), *chain_objections(link(said, read), [])]
        assert all(each.isprintable() for each in told)
        assert read.ended_at.timestamp() >= 0
    refused(lambda: read_countersignature(retold(AGREED, FOUNDER, chance), RECEIPT, FOUNDER.key))


@quick
@given(st.integers(0, 2**64))
def test_books_that_were_tampered_with_are_flawed_and_no_fault(seed):
    """A file may hold anything at all; what it claims is never summed."""
    chance = random.Random(seed)
    lines = [
        Heading(site=EVE.key, receipts=1),
        NameLine(community=COMMUNITY, credential=CREDENTIALS[EVE.key]),
        NameLine(community=COMMUNITY, credential=CREDENTIALS[FOUNDER.key]),
        ReceiptLine(receipt=RECEIPT, countersignature=AGREED),
    ]
    texts = [line.model_dump_json().encode() for line in lines]
    at = chance.randrange(len(texts))
    tree = json.loads(texts[at])
    tampered = chance.choice(
        [
            lambda: json.dumps(twist(tree, chance)).encode("utf-8", "replace"),
            lambda: chance.randbytes(chance.randrange(200)),
            lambda: texts[at] * 2,
            lambda: b"[" * 100_000,
        ]
    )()
    auditor = Auditor()
    auditor.read("a", [*texts[:at], tampered, *texts[at + 1 :]])
    audit = auditor.audit()
    assert audit.receipts <= 1
    assert audit.model_dump_json()
    if at != 3:
        return
    assert all(each.figures.cpu_hours == 0 for each in audit.agreed)


def test_books_full_of_contradictions_are_judged_in_little_time():
    """A crafted file of receipts that all contradict one another costs no more than its length."""

    def judge(number):
        lines = [Heading(site=EVE.key, receipts=number).model_dump_json().encode()]
        for each in range(number):
            said = receipt(EVE, FOUNDER, number=5, previous="1" * 64, resources={"cpus": each})
            lines.append(ReceiptLine(receipt=said).model_dump_json().encode())
        auditor = Auditor()
        auditor.read("a", lines)
        began = time.process_time()
        audit = auditor.audit()
        assert {flaw.line for flaw in audit.flaws} == set(range(2, number + 2))
        return len(audit.flaws), time.process_time() - began

    few, _ = judge(50)
    many, took = judge(400)
    assert many <= 12 * few
    assert took < 2


@pytest.mark.parametrize(
    "text", ["300.1.1.1:1", "1.1.1.1:65536", "1.2.3.4.5:1", "[::::]:1", "[1.1.1.1.1]:1", "1.1.1.1:"]
)
def test_what_only_looks_like_an_address_is_none(text):
    """The pattern lets it through; the meaning does not."""
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(text)


@quick
@given(twisted({"at": "10.0.0.1:4433"}), st.text(alphabet="0123456789abcdef:.[]", max_size=40))
def test_addresses_are_addresses(tree, text):
    """What passes for an address is one: nothing later stumbles over it."""
    for each in (tree.get("at"), text):
        try:
            TypeAdapter(Address).validate_python(each)
        except (ValidationError, RecursionError):
            continue
        host, _, port = each.rpartition(":")
        assert int(port) < 65536
        assert host


@quick
@given(st.integers(0, 2**64), st.sampled_from([SSH_KEY, "ssh-ed25519-cert-v01@openssh.com AAAA"]))
def test_keys_and_certificates_of_peers_are_read_or_refused(seed, line):
    """SSH keys and certificates come from peers, too."""
    chance = random.Random(seed)
    kind, _, data = line.partition(" ")
    kind = chance.choice(
        [kind, "ssh-rsa", "ecdsa-sha2-nistp256", "ssh-dss", "sk-ssh-ed25519@openssh.com"]
    )
    raw = bytearray(chance.randbytes(chance.randrange(80)))
    if chance.random() < 0.7:
        name = kind.encode()
        raw = len(name).to_bytes(4) + name + bytes([0, 0, 0, chance.choice([1, 8, 32, 255])]) + raw
    said = f"{kind} {base64.b64encode(bytes(raw)).decode() if chance.random() < 0.9 else data}"
    refused(lambda: parse_public(said))
    refused(lambda: parse_certificate(said))


WEAK = [
    "00" * 32,
    "01" + "00" * 31,
    "01" + "00" * 30 + "80",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


@pytest.mark.parametrize("key", WEAK)
def test_a_key_under_which_anybody_signs_is_nobodys(key):
    """The points of small order: signatures that say nothing would hold for them."""
    assert is_weak(key)
    with pytest.raises(ValidationError):
        TypeAdapter(Key).validate_python(key)
    payload = payload_of(presence(EVE)) | {"site": key}
    head, body, _ = forged(header_of(presence(EVE)) | {"kid": key}, payload, EVE).split(".")
    point = "01" + "00" * 31
    signature = base64.urlsafe_b64encode(bytes.fromhex(point) + bytes(32)).rstrip(b"=").decode()
    assert refused(lambda: verify(f"{head}.{body}.{signature}", Presence, key, NOW))


def test_keys_that_are_made_are_not_weak():
    """The check turns nobody away."""
    assert not any(is_weak(Identity.generate().key) for _ in range(200))
