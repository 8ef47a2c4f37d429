"""Identities, signed documents and envelopes: what is good passes, and nothing else does."""

import base64
import contextlib
import json
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import example, given
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import OKPKey

from gridcloud.errors import Conflict, Forbidden, GridcloudError, InvalidSpec, Unavailable
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import LEEWAY, claimed_signer, sign, verify
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.messages import (
    MAX_CLOCK_DIFFERENCE,
    PROTOCOL_VERSION,
    Kind,
    LeaveBody,
    Nothing,
    decode_body,
    decode_reply,
    decode_request,
    encode_refusal,
    encode_reply,
    encode_request,
)
from gridcloud.grid.papers import (
    CommunityPaper,
    Invitation,
    Membership,
    Presence,
    Role,
    community_id,
    split_community,
)

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ALICE, BOB = Identity.generate(), Identity.generate()
COMMUNITY = community_id("foam", ALICE.key)
INVITATION = Invitation(
    community=COMMUNITY,
    inviter=ALICE.key,
    addresses=("127.0.0.1:4433", "[::1]:4433"),
    secret="0" * 32,
    roles=(Role.CONSUMER,),
    issued_at=NOW,
    expires_at=NOW + timedelta(hours=1),
)
DOCUMENT = sign(ALICE, INVITATION)


def headed(header: bytes) -> str:
    """Return a text in the form of a document, with this header."""
    return base64.urlsafe_b64encode(header).decode() + ".e30.e30"


class TestIdentity:
    def test_a_key_is_made_once_and_found_again(self, tmp_path):
        """The second start of a site has the key of the first, readable by its owner alone."""
        path = tmp_path / "key"
        made = Identity.load_or_create(path)
        assert Identity.load_or_create(path).key == made.key
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(tmp_path.iterdir()) == [path]
        assert len(made.secret_bytes) == 32
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(made.key)).verify(made.sign(b"x"), b"x")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o660])
    def test_a_key_open_to_others_is_refused(self, tmp_path, mode):
        """A secret that others may have read is not used."""
        path = tmp_path / "key"
        Identity.load_or_create(path)
        path.chmod(mode)
        with pytest.raises(Forbidden, match="chmod 600"):
            Identity.load_or_create(path)

    def test_what_is_no_ed25519_key_is_refused_and_left_alone(self, tmp_path):
        """A damaged or foreign key file is named, never replaced by a new key."""
        path = tmp_path / "key"
        other = generate_private_key(SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        for content in (b"", b"garbage", other):
            path.write_bytes(content)
            path.chmod(0o600)
            with pytest.raises(InvalidSpec, match="backup"):
                Identity.load_or_create(path)
            assert path.read_bytes() == content

    def test_a_missing_folder_is_an_error_with_its_cause(self, tmp_path):
        """No traceback of the operating system's."""
        with pytest.raises(Unavailable, match="No such file"):
            Identity.load_or_create(tmp_path / "none" / "key")

    def test_the_secret_is_not_shown(self):
        """Printing an identity shows the start of its public key."""
        assert repr(ALICE) == f"Identity({short(ALICE.key)})"


class TestDocuments:
    def test_what_was_signed_is_read_again(self):
        """A document says what its paper said, to anyone who knows the issuer's key."""
        assert verify(DOCUMENT, Invitation, ALICE.key, NOW) == INVITATION
        assert claimed_signer(DOCUMENT) == ALICE.key
        header = json.loads(base64.urlsafe_b64decode(DOCUMENT.split(".")[0] + "=="))
        assert header == {"alg": "Ed25519", "typ": "gridcloud-invitation", "kid": ALICE.key}

    def test_nobody_signs_for_another(self):
        """A paper that names its signer is signed by no one else."""
        with pytest.raises(Forbidden):
            sign(BOB, INVITATION)

    def test_another_issuer_is_refused(self):
        """A document by somebody else than expected counts nothing, however well signed."""
        with pytest.raises(Forbidden, match="should be signed by"):
            verify(DOCUMENT, Invitation, BOB.key, NOW)

    def test_a_forged_signature_is_refused(self):
        """Changing one character of content or signature is noticed."""
        head, body, signature = DOCUMENT.split(".")
        changed = {"A": "B"}
        for forged in (
            f"{head}.{body}.{changed.get(signature[0], 'A')}{signature[1:]}",
            f"{head}.{body[:40]}{changed.get(body[40], 'A')}{body[41:]}.{signature}",
            f"{head}.{body}.",
        ):
            with pytest.raises(Forbidden, match="forged"):
                verify(forged, Invitation, ALICE.key, NOW)

    def test_a_signature_by_another_key_under_the_right_name_is_refused(self):
        """Naming Alice in the header does not make it hers."""
        paper = INVITATION.model_copy(update={"inviter": BOB.key})
        signed = sign(BOB, paper).split(".")
        theirs = ".".join([DOCUMENT.split(".")[0], *signed[1:]])
        with pytest.raises(Forbidden):
            verify(theirs, Invitation, ALICE.key, NOW)

    def test_a_paper_that_names_another_signer_is_refused(self):
        """Signing well what only another may say counts nothing."""
        document = sign(ALICE, RawPaper(INVITATION.model_dump(mode="json") | {"inviter": BOB.key}))
        with pytest.raises(Forbidden, match="names"):
            verify(document, Invitation, ALICE.key, NOW)

    def test_one_kind_never_passes_for_another(self):
        """A document's kind is part of what is signed."""
        with pytest.raises(InvalidSpec, match="another kind"):
            verify(DOCUMENT, Membership, ALICE.key, NOW)

    @pytest.mark.parametrize(
        "change",
        [
            {"alg": "none"},
            {"alg": "EdDSA"},
            {"alg": "HS256"},
            {"kid": "x"},
            {"crit": ["b64"], "b64": False},
            {"jwk": {}},
            {"crit": 5},
        ],
    )
    def test_only_one_algorithm_and_no_other_header_is_accepted(self, change):
        """No weaker algorithm, and no header that could bring a key along."""
        head, body, signature = DOCUMENT.split(".")
        header = json.loads(base64.urlsafe_b64decode(head + "==")) | change
        head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
        with pytest.raises(GridcloudError):
            verify(f"{head}.{body}.{signature}", Invitation, ALICE.key, NOW)

    def test_a_document_has_one_spelling(self):
        """Bits that mean nothing, or padding, make no second text of the same document."""
        head, body, signature = DOCUMENT.split(".")
        other = next(
            letter
            for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
            if letter != signature[-1]
            and base64.urlsafe_b64decode(signature[:-1] + letter + "==")
            == base64.urlsafe_b64decode(signature + "==")
        )
        for spelt in (f"{signature[:-1]}{other}", f"{signature}=="):
            with pytest.raises(Forbidden):
                verify(f"{head}.{body}.{spelt}", Invitation, ALICE.key, NOW)

    def test_what_was_verified_once_is_still_judged_by_the_clock_and_the_kind(self):
        """Remembering a signature remembers nothing else."""
        assert verify(DOCUMENT, Invitation, ALICE.key, NOW) == INVITATION
        with pytest.raises(Forbidden, match="expired"):
            verify(DOCUMENT, Invitation, ALICE.key, INVITATION.expires_at + 2 * LEEWAY)
        with pytest.raises(InvalidSpec, match="another kind"):
            verify(DOCUMENT, Membership, ALICE.key, NOW)
        with pytest.raises(Forbidden, match="should be signed by"):
            verify(DOCUMENT, Invitation, BOB.key, NOW)

    def test_an_unknown_field_is_refused(self):
        """What this version does not understand it does not half obey."""

        class Wider(Invitation):
            extra: str = "x"

        wider = Wider(**INVITATION.model_dump())
        with pytest.raises(InvalidSpec, match="unknown field"):
            verify(sign(ALICE, wider), Invitation, ALICE.key, NOW)

    def test_times_count_with_a_leeway(self):
        """Expired and not yet valid are refused, a minute's difference of clocks is not."""
        tick = timedelta(seconds=1)
        end, start = INVITATION.expires_at, INVITATION.issued_at
        assert verify(DOCUMENT, Invitation, ALICE.key, end + LEEWAY - tick)
        assert verify(DOCUMENT, Invitation, ALICE.key, start - LEEWAY)
        with pytest.raises(Forbidden, match="expired"):
            verify(DOCUMENT, Invitation, ALICE.key, end + LEEWAY)
        with pytest.raises(Forbidden, match="NTP"):
            verify(DOCUMENT, Invitation, ALICE.key, start - LEEWAY - tick)

    @pytest.mark.parametrize("time", [datetime.min, datetime.max, datetime(9001, 1, 1)])
    def test_times_at_the_ends_of_the_calendar_are_refused(self, time):
        """Nobody reckons with a year at which reckoning overflows."""
        for name in ("issued_at", "expires_at"):
            paper = INVITATION.model_copy(update={name: time.replace(tzinfo=UTC)})
            with pytest.raises(InvalidSpec, match=name):
                verify(sign(ALICE, paper), Invitation, ALICE.key, NOW)

    def test_too_large_a_document_is_refused_unread(self):
        """64 KiB is the end."""
        with pytest.raises(InvalidSpec, match="longer than"):
            verify(DOCUMENT + "A" * 65536, Invitation, ALICE.key, NOW)

    @given(st.one_of(st.text(), st.text(alphabet="ab.e30_-="), st.binary().map(headed)))
    @example("..")
    @example("\ud800..")
    @example(headed(b'"alg"'))
    @example(headed(b"[" * 5000))
    def test_garbage_is_only_ever_a_clear_error(self, text):
        """No library's traceback comes out, whatever goes in."""
        for read in (
            lambda: verify(text, Invitation, ALICE.key, NOW),
            lambda: verify_credential(text, COMMUNITY, NOW),
            lambda: claimed_signer(text),
        ):
            with pytest.raises(GridcloudError):
                read()

    @given(st.integers(0, len(DOCUMENT) - 1), st.characters(max_codepoint=0x2FF))
    def test_no_change_of_one_character_alters_what_a_document_says(self, place, character):
        """Either it is refused, or the change was without meaning."""
        changed = DOCUMENT[:place] + character + DOCUMENT[place + 1 :]
        with contextlib.suppress(GridcloudError):
            assert verify(changed, Invitation, ALICE.key, NOW) == INVITATION

    @given(
        st.dictionaries(
            st.sampled_from([*Invitation.model_fields, "x"]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
        )
    )
    def test_signed_nonsense_is_only_ever_a_clear_error(self, fields):
        """A member who signs odd content cannot make another site stumble."""
        content = INVITATION.model_dump(mode="json") | fields
        try:
            document = sign(ALICE, RawPaper(content))
        except (UnicodeEncodeError, GridcloudError):
            return
        try:
            verify(document, Invitation, ALICE.key, NOW)
        except GridcloudError as error:
            assert error.message.isprintable()


class RawPaper:
    """Signs any JSON as if it were an invitation."""

    kind = Invitation.kind
    signer = ALICE.key

    def __init__(self, content):
        self._content = content

    def model_dump_json(self):
        return json.dumps(self._content)


class TestCredentials:
    def membership(self, member, issuer, roles=(Role.CONSUMER,), community=COMMUNITY):
        """Return the document of a membership."""
        paper = Membership(
            community=community,
            member=member.key,
            site_name="site",
            roles=roles,
            issued_at=NOW,
            issuer=issuer.key,
        )
        return sign(issuer, paper)

    def test_the_founder_and_its_managers_admit(self):
        """One signature, or a manager's with the founder's for the manager."""
        manager = self.membership(BOB, ALICE, tuple(Role))
        assert verify_credential(manager, COMMUNITY, NOW).member == BOB.key
        carol = Identity.generate()
        credential = f"{self.membership(carol, BOB)}~{manager}"
        assert verify_credential(credential, COMMUNITY, NOW).member == carol.key

    def test_nobody_else_does(self):
        """Neither a stranger, a plain member, a manager of a manager, nor another's founder."""
        carol, dave = Identity.generate(), Identity.generate()
        manager = self.membership(BOB, ALICE, tuple(Role))
        plain = self.membership(BOB, ALICE)
        second = self.membership(carol, BOB, tuple(Role))
        other = community_id("foam", BOB.key)
        for bad in (
            self.membership(BOB, BOB),
            f"{self.membership(carol, BOB)}~{plain}",
            f"{second}~{manager}",
            f"{self.membership(dave, carol)}~{second}",
            f"{self.membership(dave, carol)}~{second}~{manager}",
            f"{self.membership(carol, BOB)}~{self.membership(BOB, BOB, tuple(Role))}",
            f"{self.membership(dave, carol)}~{manager}",
            self.membership(BOB, ALICE, community=community_id("other", ALICE.key)),
            self.membership(BOB, BOB, community=other),
        ):
            with pytest.raises(GridcloudError):
                verify_credential(bad, COMMUNITY, NOW)


class TestPapers:
    @pytest.mark.parametrize(
        "name", ["", "A", "-a", "a.b", "a" * 64, "a b", "a\n", "ä", "../x", "a/b"]
    )
    def test_odd_names_are_refused(self, name):
        """Names are safe in file names, logs and terminals."""
        with pytest.raises(ValueError, match="name"):
            CommunityPaper(name=name, founder=ALICE.key, created_at=NOW)

    @pytest.mark.parametrize("community", ["", "foam", "foam.", ".", "." + "0" * 64, "a.b"])
    def test_what_is_no_community_is_refused(self, community):
        """The identity is a name and a key."""
        with pytest.raises(InvalidSpec):
            split_community(community)

    @pytest.mark.parametrize(
        "address", ["host:1", "1.2.3.4", "1.2.3.4:x", "::1:5", "", "1.2.3.4:5\n"]
    )
    def test_odd_addresses_are_refused(self, address):
        """Addresses are numbers: a peer cannot make others look names up."""
        with pytest.raises(ValueError, match="addresses"):
            Presence(site=ALICE.key, addresses=(address,), issued_at=NOW)


class TestEnvelopes:
    BODY = LeaveBody(community=COMMUNITY, revocation="x.y.z")

    def test_a_request_and_its_reply_pass(self):
        """What is encoded is decoded the same."""
        request = decode_request(encode_request(Kind.LEAVE, self.BODY, NOW), NOW)
        assert request.kind is Kind.LEAVE
        assert decode_body(request.body, LeaveBody) == self.BODY
        assert decode_reply(encode_reply(self.BODY, NOW), LeaveBody, NOW) == self.BODY

    def test_an_error_comes_out_as_it_went_in(self):
        """Code, message and hint survive; what steers terminals does not."""
        told = encode_refusal(Forbidden("No\x1b[2J.", hint="Ask\n."), NOW)
        with pytest.raises(Forbidden) as caught:
            decode_reply(told, Nothing, NOW)
        assert (caught.value.message, caught.value.hint) == ("No?[2J.", "Ask?.")

    @pytest.mark.parametrize("way", [1, -1])
    def test_clocks_ten_minutes_apart_are_refused_by_either_side(self, way):
        """The error says how far apart they are and what to do."""
        off = NOW + way * timedelta(minutes=10)
        for read in (
            lambda: decode_request(encode_request(Kind.PING, Nothing(), off), NOW),
            lambda: decode_reply(encode_reply(Nothing(), off), Nothing, NOW),
            lambda: decode_reply(encode_refusal(Forbidden("no"), off), Nothing, NOW),
        ):
            with pytest.raises(Conflict, match=r"10m 00s.*NTP") as caught:
                read()
            assert ("behind" if way > 0 else "ahead of") in caught.value.message

    def test_clocks_nearly_right_pass(self):
        """A minute is the limit."""
        edge = NOW + MAX_CLOCK_DIFFERENCE
        assert decode_request(encode_request(Kind.PING, Nothing(), edge), NOW)

    def test_another_version_is_named(self):
        """An older or newer site is told so."""
        this = f'"v":{PROTOCOL_VERSION}'.encode()
        message = encode_request(Kind.PING, Nothing(), NOW).replace(this, b'"v":99')
        with pytest.raises(InvalidSpec, match="version 99"):
            decode_request(message, NOW)

    @given(
        st.one_of(
            st.binary(),
            st.text().map(str.encode),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
                lambda inner: (
                    st.lists(inner)
                    | st.dictionaries(
                        st.sampled_from(["v", "kind", "sent_at", "id", "body", "ok", "now"]), inner
                    )
                ),
            ).map(lambda value: json.dumps(value).encode()),
        )
    )
    @example(b"[" * 100_000)
    @example(b'{"v":2,"kind":"ping","id":"","sent_at":"0001-01-01T00:00:00+23:59","body":{}}')
    @example(b'{"ok":true,"now":1e300,"body":{}}')
    def test_garbage_is_only_ever_a_clear_error(self, message):
        """No library's traceback comes out, whatever a peer sends."""
        for read in (
            lambda: decode_request(message, NOW),
            lambda: decode_reply(message, LeaveBody, NOW),
        ):
            with pytest.raises(GridcloudError):
                read()


class TestForm:
    """Documents are what RFC 7515 says, as others read and write it."""

    def key(self, private=True):
        """Return the same key as another implementation has it."""
        parts = {"kty": "OKP", "crv": "Ed25519", "x": b64(bytes.fromhex(ALICE.key))}
        return OKPKey.import_key(parts | ({"d": b64(ALICE.secret_bytes)} if private else {}))

    def test_another_implementation_verifies_ours(self):
        """joserfc reads what we sign, and finds the paper in it."""
        read = jws.deserialize_compact(
            sign(ALICE, INVITATION), self.key(private=False), registry=REGISTRY
        )
        assert json.loads(read.payload) == INVITATION.model_dump(mode="json")
        assert read.headers() == {"alg": "Ed25519", "typ": Invitation.kind, "kid": ALICE.key}

    def test_we_verify_another_implementations(self):
        """What joserfc signs is a document."""
        header = {"kid": ALICE.key, "typ": Invitation.kind, "alg": "Ed25519"}
        document = jws.serialize_compact(
            header, INVITATION.model_dump_json(), self.key(), registry=REGISTRY
        )
        assert verify(document, Invitation, ALICE.key, NOW) == INVITATION

    def test_a_signature_has_one_form(self):
        """The bits that base64 leaves over are nought, so that nobody makes a twin of a text."""
        document = sign(ALICE, INVITATION)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        twin = document[:-1] + letters[letters.index(document[-1]) + 1]
        assert base64.urlsafe_b64decode(twin.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(
            document.rpartition(".")[2] + "=="
        )
        with pytest.raises(Forbidden, match="wrong"):
            verify(twin, Invitation, ALICE.key, NOW)


def b64(content):
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


REGISTRY = jws.JWSRegistry(algorithms=["Ed25519"])
