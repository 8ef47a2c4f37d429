"""User-data of all kinds: what cloud-init would not understand is told before anything starts."""

import base64
import gzip
import json
import string
import tracemalloc
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.errors import InvalidSpec
from gridcloud.setup import documents
from gridcloud.setup.documents import decoded, read_user_data
from gridcloud.setup.parts import Kind

CONFIG = "#cloud-config\npackages: [git]\n"
SCRIPT = "#!/bin/sh\necho here\n"
ARCHIVE = (
    f"#cloud-config-archive\n- {json.dumps(CONFIG)}\n"
    f"- type: text/x-shellscript\n  content: {json.dumps(SCRIPT)}\n"
)


def archive(*contents):
    return "#cloud-config-archive\n" + "".join(
        f"- content: {base64_yaml(content)}\n" for content in contents
    )


def base64_yaml(text):
    return f"!!binary {base64.b64encode(text.encode()).decode()}"


def multipart(*parts, **headers):
    message = MIMEMultipart()
    for text, kind in parts:
        part = MIMEText(text, kind.removeprefix("text/"))
        for name, value in headers.items():
            part[name.replace("_", "-")] = value
        message.attach(part)
    return message.as_bytes()


def kinds(data):
    return [part.content_type for part in read_user_data(data)]


def refusal(data):
    with pytest.raises(InvalidSpec) as caught:
        read_user_data(data if isinstance(data, bytes) else data.encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (SCRIPT, Kind.SCRIPT),
        (CONFIG, Kind.CLOUD_CONFIG),
        ("#include\nhttps://example.org/a\n# and\nhttp://example.org/b\n", Kind.INCLUDE),
        ("#include-once https://example.org/a\n", Kind.INCLUDE_ONCE),
        ("#cloud-boothook\n#!/bin/sh\ntrue\n", Kind.BOOTHOOK),
        ("#part-handler\ndef list_types(): ...\ndef handle_part(*a): ...\n", Kind.PART_HANDLER),
        ("## template: jinja\n#cloud-config\nhostname: {{ v1.local_hostname }}\n", Kind.TEMPLATE),
        ('#cloud-config-jsonp\n[{"op": "add", "path": "/a", "value": 1}]\n', Kind.PATCH),
    ],
)
def test_each_kind_is_known_by_its_beginning(text, kind):
    """Every kind is read, plain, packed by gzip, in a multipart and in an archive."""
    assert kinds(text.encode()) == [kind]
    assert kinds(gzip.compress(text.encode())) == [kind]
    assert kinds(multipart((text, "text/plain"))) == [kind]
    assert kinds(archive(text).encode()) == [kind]


def test_no_user_data_is_none():
    """Nothing, and only blanks, are no parts."""
    assert read_user_data(b"") == read_user_data(b" \n") == ()


def test_packed_user_data_is_written_as_base64():
    """Binary user-data in an order is what follows ``base64:``; anything else there is told."""
    packed = gzip.compress(CONFIG.encode())
    assert decoded("base64:" + base64.b64encode(packed).decode()) == packed
    assert decoded(CONFIG) == CONFIG.encode()
    with pytest.raises(InvalidSpec, match="no base64"):
        decoded("base64:***")


def test_parts_keep_their_order_and_what_is_said_beside_them():
    """A multipart's parts come in order, with how they are merged."""
    data = multipart((CONFIG, Kind.CLOUD_CONFIG), (SCRIPT, Kind.SCRIPT), X_Merge_Type="list()")
    parts = read_user_data(data)
    assert [part.content_type for part in parts] == [Kind.CLOUD_CONFIG, Kind.SCRIPT]
    assert parts[0].headers == {"X-Merge-Type": "list()"}
    assert kinds(ARCHIVE.encode()) == [Kind.CLOUD_CONFIG, Kind.SCRIPT]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#cloud-config\npackages:\n  - a\n bad\n", ["line 4", "not YAML"]),
        ("#cloud-config\nruncmd:\n\t- x\n", ["line 3", "tabs"]),
        ("#cloud-config\nruncmds: [ls]\n", ["line 2", "did you mean 'runcmd'"]),
        ("#cloud-config\n\npackages: git\n", ["line 3", "must be a list", "packages: git"]),
        ("#cloud-config\npackages: [a]\npackages: [b]\n", ["line 3", "second time"]),
        ("#cloud-config\n- a\n", ["is a mapping"]),
        ("#cloud-config\n", ["empty"]),
        ("#cloud-config\nrun: &a [*a]\n", ["contains itself"]),
        ("#cloud-config\nexpire: 2026-99-99\n", ["Put quotes"]),
        ("#cloud-config\npower_state: {mode: sleep}\n", ["one of poweroff"]),
        ("echo hello\n", ["no kind that cloud-init knows"]),
        ("#cloud-confg\npackages: [a]\n", ["Did you mean #cloud-config"]),
        ("\ufeff#cloud-config\npackages: [a]\n", ["byte order mark"]),
        ("\n#!/bin/sh\n", ["very first line"]),
        ("#!bash\n", ["very first line"]),
        ("#cloud-boothook\necho\n", ["very first line"]),
        ("#include\nfile:///etc/shadow\n", ["line 2", "no http"]),
        ("#include\nhttp://[::1\n", ["line 2", "no http"]),
        ("#include\n", ["includes nothing"]),
        ("#part-handler\ndef list_types(): ...\n", ["handle_part"]),
        ("## template: jinja\nhello\n", ["template of nothing"]),
        ("#cloud-config-jsonp\n{}\n", ["no JSON patch"]),
        ("#cloud-config-jsonp\n[1\n", ["not JSON"]),
        ("#cloud-config-archive\na: b\n", ["list of parts"]),
        ("#cloud-config-archive\n- type: text/x-shellscript\n", ["line 2", "no content"]),
        ("#!/bin/sh\n\x00", ["NUL"]),
    ],
)
def test_what_cannot_work_is_told_with_its_line(text, words):
    """Each mistake is an error that says where and what, not a warning in a machine's log."""
    told = refusal(text)
    assert all(word in told for word in words), told


def test_every_mistake_is_told_at_once():
    """Several mistakes in one configuration come in one error, each with its line."""
    told = refusal("#cloud-config\npackages: 1\nruncmd: 2\n")
    assert "line 2" in told and "line 3" in told


def test_values_are_not_repeated_in_what_is_told():
    """A wrong value may be a secret; only the line that is at fault first is shown."""
    told = refusal("#cloud-config\nruncmd: 1\nchpasswd: {users: [{name: a, pasword: geheim}]}\n")
    assert "geheim" not in told


def test_bombs_stay_small():
    """What grows when it is unpacked or its aliases are followed is refused early."""
    bomb = gzip.compress(b"#!/bin/sh\n" + b"#" * 50_000_000)
    tracemalloc.start()
    try:
        assert "KiB" in refusal(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10 * documents.MOST_BYTES
    finally:
        tracemalloc.stop()
    nested = gzip.compress(gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"#!/bin/sh")))))
    assert "deep" in refusal(gzip.compress(nested))
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    assert "stand for too much" in refusal(f"#cloud-config\na0: &a0 [x]\n{laughs}")
    assert "deep" in refusal("#cloud-config\na: " + "[" * 20_000)
    assert "parts" in refusal(multipart(*[(SCRIPT, Kind.SCRIPT)] * 65))


def test_damaged_wrappings_are_told():
    """What was cut off on its way is not taken for the whole."""
    packed = gzip.compress(SCRIPT.encode() * 99)
    assert "cut off" in refusal(packed[:-9])
    assert "damaged" in refusal(packed[:20] + b"xxxx" + packed[24:])
    whole = multipart((SCRIPT, Kind.SCRIPT))
    assert "broken MIME" in refusal(whole[: whole.rindex(b"--=")])


def test_unknown_types_need_a_part_handler():
    """A type of its own is taken when a part handler for it comes along, and told when not."""
    own = ("hello", "text/x-own")
    handler = (
        "#part-handler\ndef list_types(): ...\ndef handle_part(*a): ...\n",
        Kind.PART_HANDLER,
    )
    assert "does not know" in refusal(multipart(own))
    assert kinds(multipart(handler, own)) == [Kind.PART_HANDLER, "text/x-own"]


MIME = b"MIME-Version: 1.0\nContent-Type: "
BEGINNINGS = st.sampled_from(
    [
        *(b"", b"#cloud-config\n", b"#cloud-config-archive\n- ", b"#include\n", b"#!/bin/sh\n"),
        *(b"#cloud-config-jsonp\n", MIME + b"multipart/mixed; boundary=a\n\n", b"\x1f\x8b\x08"),
        MIME + b"text/cloud-config\nContent-Transfer-Encoding: base64\n\n",
        *(b"## template: jinja\n", b"#cloud-config\n!!timestamp ", b"#cloud-boothook"),
    ]
)
YAML = st.text("ab:-[]{}&*!<>|'\"# \n\t01%,?@`\\~", max_size=80).map(str.encode)


@settings(deadline=None)
@given(BEGINNINGS, st.binary(max_size=120) | YAML)
def test_nothing_but_our_own_errors_come_out(beginning, rest):
    """Whatever somebody sends, it is parts or an `InvalidSpec`; nothing else escapes."""
    try:
        parts = read_user_data(beginning + rest)
    except InvalidSpec:
        return
    assert sum(len(part.data) for part in parts) <= documents.MOST_BYTES


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["runcmd", "packages", "x", "users", "hostname"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(string.ascii_letters),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=6,
        ),
        min_size=1,
    )
)
def test_a_configuration_is_judged_the_same_in_every_wrapping(config):
    """Plain, packed or in a multipart, a configuration is accepted or refused alike."""
    text = "#cloud-config\n" + json.dumps(config)

    def verdict(data):
        try:
            return [part.data.strip() for part in read_user_data(data)]
        except InvalidSpec:
            return None

    plain = verdict(text.encode())
    assert verdict(gzip.compress(text.encode())) == plain
    assert verdict(multipart((text, Kind.CLOUD_CONFIG))) == plain
