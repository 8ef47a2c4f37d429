"""SSH keys in files, and certificates that are good for one lease alone."""

import os
import threading
from datetime import UTC, datetime, timedelta

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.access import keys
from gridcloud.access.certificates import BACKDATE, UserCA, parse_certificate
from gridcloud.errors import Forbidden, InvalidSpec

NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@pytest.fixture(scope="module")
def ca():
    return UserCA(keys.ephemeral())


@pytest.fixture(scope="module")
def line():
    return keys.public_line(keys.ephemeral(), "someone")


def details(certificate_line):
    certificate = parse_certificate(certificate_line)
    return certificate, certificate.options


def test_certificate_names_its_lease_and_ends_with_it(ca, line):
    """A certificate is bound to the lease: key id, only principal, and end."""
    certificate, options = details(ca.issue(line, "lease1", NOW, LATER))
    assert certificate.principals == ["lease1"]
    assert certificate._key_id == "lease1"
    assert certificate._valid_before == LATER.timestamp()
    assert certificate._valid_after == (NOW - BACKDATE).timestamp()
    assert certificate.signing_key == keys.parse_public(ca.public_line)
    assert keys.public_line(certificate.key) == " ".join(line.split()[:2])
    assert set(options) == {"permit-pty"}


def test_certificate_permits_forwarding_only_if_asked(ca, line):
    """Forwarding ports is for jumping through a gateway, and never comes by itself."""
    _, options = details(ca.issue(line, "lease1", NOW, LATER, port_forwarding=True))
    assert set(options) == {"permit-pty", "permit-port-forwarding"}


def test_certificate_may_be_bound_to_an_address(ca, line):
    """A stolen certificate is of no use elsewhere when its source is told."""
    _, options = details(ca.issue(line, "lease1", NOW, LATER, source_address=["192.0.2.0/24"]))
    assert [str(network) for network in options["source-address"]] == ["192.0.2.0/24"]


def test_serials_differ(ca, line):
    """Each certificate can be told apart from every other."""
    found = {details(ca.issue(line, "lease1", NOW, LATER))[0]._serial for _ in range(20)}
    assert len(found) == 20


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"principals": ()}, "needs a principal"),
        ({"principals": ("a,b",)}, "cannot be named"),
        ({"principals": ('a" ssh-rsa',)}, "cannot be named"),
        ({"lease_id": ""}, "cannot be named"),
        ({"lease_id": "*"}, "cannot be named"),
        ({"valid_until": NOW}, "ended before"),
        ({"valid_until": LATER.replace(tzinfo=None)}, "time zone"),
        ({"source_address": ()}, "no source address"),
        ({"source_address": ("nowhere",)}, "Not an address"),
        ({"public_key_line": "ssh-ed25519 AAAA"}, "not an OpenSSH public key"),
        ({"public_key_line": ""}, "not an OpenSSH public key"),
    ],
)
def test_nonsense_gets_no_certificate(ca, line, change, cause):
    """What would be good for anybody, or nobody, is refused with the cause."""
    asked = {"public_key_line": line, "lease_id": "lease1", "valid_from": NOW} | {
        "valid_until": LATER
    }
    with pytest.raises(InvalidSpec, match=cause):
        ca.issue(**(asked | change))


def test_private_key_line_is_no_public_key(ca):
    """A private key pasted by mistake is not taken, nor shown in full."""
    secret = keys.ephemeral().export_private_key("openssh").decode()
    with pytest.raises(InvalidSpec) as failed:
        ca.issue(secret, "lease1", NOW, LATER)
    assert secret.splitlines()[2] not in str(failed.value)


def test_trusted_line_says_for_whom(ca):
    """A server trusts the CA as a whole, or only for the principals told."""
    assert ca.trusted_line() == ca.public_line
    assert ca.trusted_line("a", "b") == f'cert-authority,principals="a,b" {ca.public_line}'
    with pytest.raises(InvalidSpec):
        ca.trusted_line('a",no-pty ssh-rsa')


@given(st.text(max_size=60))
def test_any_text_is_a_key_or_refused(text):
    """Text from outside never raises anything but our own error."""
    try:
        keys.parse_public(text)
    except InvalidSpec as error:
        assert "not an OpenSSH public key" in error.message


def test_key_file_is_made_once_and_private(tmp_path):
    """The key survives restarts, and nobody else can read it."""
    path = tmp_path / "deep" / "key"
    first = keys.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert keys.public_line(keys.load_or_create(path)) == keys.public_line(first)
    assert list(path.parent.iterdir()) == [path]


def test_key_made_by_many_at_once_is_one_key(tmp_path):
    """Processes that race to make the key all end up with the same one."""
    found = []
    start = threading.Barrier(8)

    def make():
        start.wait()
        found.append(keys.public_line(keys.load_or_create(tmp_path / "key")))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_key_open_to_others_is_refused(tmp_path, mode):
    """A key that others may have read or replaced is not used, and the remedy is told."""
    path = tmp_path / "key"
    keys.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(Forbidden, match="chmod 600"):
        keys.load_or_create(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_key_of_another_user_is_refused(tmp_path):
    """A key planted by another user is not ours."""
    path = tmp_path / "key"
    keys.load_or_create(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(Forbidden, match="another user"):
        keys.load(path)


def test_unusable_key_files_say_why(tmp_path):
    """Missing, garbled, locked and misplaced keys each have their own cause."""
    with pytest.raises(InvalidSpec, match="There is no SSH key"):
        keys.load(tmp_path / "missing")
    with pytest.raises(InvalidSpec, match="is a folder"):
        keys.load(tmp_path)
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("nonsense")
    with pytest.raises(InvalidSpec, match="no private key"):
        keys.load(path)
    locked = keys.ephemeral().export_private_key("pkcs8-pem", passphrase="secret")
    path.write_bytes(locked)
    with pytest.raises(InvalidSpec, match="passphrase"):
        keys.load(path)


def test_fingerprint_is_that_of_openssh():
    """People compare fingerprints by eye: ours read as ssh-keygen's do."""
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
    assert keys.fingerprint(line) == "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU"
    assert isinstance(keys.parse_public(line), asyncssh.SSHKey)
