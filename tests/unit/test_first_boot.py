"""What a machine is told at its first boot: the person's parts joined with the site's."""

import email
import shlex
import subprocess
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.errors import InvalidSpec
from gridcloud.setup.documents import read_user_data
from gridcloud.setup.first_boot import Told, joined, move_command
from gridcloud.setup.parts import Kind
from gridcloud.setup.scripts import Script, text_of

NOW = datetime(2030, 1, 1, tzinfo=UTC)
TOLD = Told(
    lease_id="lease-1",
    user="debian",
    ca_line="ssh-ed25519 AAAAC3Nz",
    host_key="-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----\n",
    hostname="node-01",
    ends_at=NOW + timedelta(hours=2),
    lasts=timedelta(hours=2),
)
CONFIG = b"#cloud-config\nusers: []\nssh: {emit_keys_to_console: false}\n"
LIMIT = 16 * 1024


def parts_of(document):
    return [
        (part.get_content_type(), part.get_payload(decode=True).decode())
        for part in email.message_from_bytes(document).walk()
        if not part.is_multipart()
    ]


def test_ours_is_there_before_and_after_whatever_a_person_says():
    """A boothook comes first, which no cloud-config switches off, and it is done again last."""
    document = joined(read_user_data(CONFIG), TOLD, LIMIT)
    kinds = [kind for kind, _ in parts_of(document)]
    assert kinds == [Kind.BOOTHOOK, Kind.CLOUD_CONFIG, Kind.CLOUD_CONFIG, Kind.SCRIPT]
    assert parts_of(document)[2][1].encode().strip() == CONFIG.strip()
    assert "prepare.sh" in parts_of(document)[3][1]


def test_the_name_of_a_person_wins():
    """Ours says the host name before the person's parts do, so that theirs replaces it."""
    texts = [text for _, text in parts_of(joined(read_user_data(CONFIG), TOLD, LIMIT))]
    assert texts[1].startswith('#cloud-config\nhostname: "node-01"')


def test_the_same_launch_gives_the_same_bytes(monkeypatch):
    """A cloud may refuse to repeat a call with its token and another user-data."""
    parts = read_user_data(CONFIG)
    before = [joined(parts, TOLD, limit) for limit in (LIMIT, 6000)]
    monkeypatch.setattr(time, "time", lambda: 5.0)
    assert [joined(parts, TOLD, limit) for limit in (LIMIT, 6000)] == before


def test_too_much_is_packed_and_then_refused():
    """What is over a provider's limit is packed, part by part, and told if that is not enough."""
    long = read_user_data(CONFIG + b"# a long comment\n" * 1000)
    plain = joined(long, TOLD, 10**6)
    packed = joined(long, TOLD, LIMIT)
    assert len(packed) <= LIMIT < len(plain)
    packed.decode("ascii")
    assert [part.data.strip() for part in read_user_data(packed)] == [
        part.data.strip() for part in read_user_data(plain)
    ]
    with pytest.raises(InvalidSpec, match="takes 2000"):
        joined(long, TOLD, 2000)


def test_what_we_add_leaves_room():
    """On the provider that takes least (16 KiB) most is left to the person."""
    assert len(joined((), TOLD, 8 * 1024)) < 8 * 1024


def test_without_an_end_there_is_no_switch():
    """A machine without an end is never powered off by itself."""
    hook = parts_of(joined((), TOLD.model_copy(update={"ends_at": None, "lasts": None}), LIMIT))[0]
    assert "ends_epoch=''" in hook[1]
    assert "lived" not in hook[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "a b"},
        {"user": "$(id)"},
        {"user": "../x"},
        {"hostname": "a\nruncmd: [x]"},
        {"ca_line": "x\ny"},
        {"lease_id": "x\n"},
    ],
)
def test_names_cannot_smuggle_commands(changes):
    """What names a machine, account or lease is a name; anything else is refused."""
    with pytest.raises(InvalidSpec):
        joined((), TOLD.model_copy(update=changes), LIMIT)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300))
def test_a_part_arrives_as_it_was_written(text):
    """Whatever is in a script, the machine gets just that, packed or not."""
    (part,) = read_user_data(b"#!/bin/sh\n" + text.encode() + b"\n")
    for limit in (10**6, len(joined((part,), TOLD, 10**6)) - 1):
        document = joined((part,), TOLD, limit)
        assert part.data in [found.data for found in read_user_data(document)]


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40))
def test_the_shell_sees_the_authority_as_it_is(line):
    """No character of what is written into the script is anything to its shell."""
    told = TOLD.model_copy(update={"ca_line": line})
    hook = parts_of(joined((), told, LIMIT))[0][1]
    assert f"\nca={shlex.quote(line)}\n" in hook
    assert hook.startswith("#cloud-boothook\n#!/bin/sh\n")


@pytest.mark.parametrize("script", list(Script))
def test_scripts_are_understood_by_a_plain_shell(script):
    """All that runs on machines is POSIX sh, without its comments too."""
    subprocess.run(["sh", "-n"], input=text_of(script), text=True, check=True)


def test_another_end_is_told_by_clock_and_by_duration():
    """The clock of a machine may be wrong, so both are told; root needs no sudo for it."""
    command = move_command("debian", "lease-1", NOW + timedelta(minutes=1), NOW)
    epoch = int((NOW + timedelta(minutes=1)).timestamp())
    assert command == f"sudo -n sh /var/lib/gridcloud/end.sh move {epoch} 60 lease-1"
    past = move_command("root", "lease-1", NOW, NOW + timedelta(hours=1))
    assert past.startswith("sh ") and past.endswith(" 0 lease-1")
