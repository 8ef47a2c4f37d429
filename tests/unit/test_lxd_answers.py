"""What the LXD provider makes of answers, images and settings, without an LXD."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import (
    Conflict,
    Forbidden,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    Unavailable,
)
from gridcloud.model.identifiers import new_id
from gridcloud.providers.cloud.clouds import Condition
from gridcloud.providers.lxd import LXDProvider, api, connecting, images, instances
from gridcloud.providers.lxd.connecting import Remotes
from gridcloud.providers.lxd.section import InstanceType


def image(fingerprint, created, *aliases, **more):
    return {
        "fingerprint": fingerprint * 8,
        "created_at": created,
        "type": "container",
        "architecture": "x86_64",
        "aliases": [{"name": alias} for alias in aliases],
        "properties": {"os": "Debian", "description": "Debian 12"},
        **more,
    }


@pytest.mark.parametrize(
    ("status", "text", "error"),
    [
        (500, 'Reached maximum number of instances in project "p"', NoCapacity),
        (500, 'Reached maximum aggregate value "1GiB" for "limits.memory"', NoCapacity),
        (500, "write /x: no space left on device", NoCapacity),
        (500, "Instance is busy running a create operation", Conflict),
        (400, 'Instance "x" already exists', Conflict),
        (412, "ETag doesn't match: 1 vs 2", Conflict),
        (403, "not authorized", Forbidden),
        (400, 'Invalid devices: Device validation failed for "eth0"', InvalidSpec),
        (400, "something that nobody knows", InvalidSpec),
        (404, "Instance not found", NotFound),
        (503, "LXD daemon is starting", Unavailable),
        (500, "something that nobody knows", Unavailable),
        (500, "dial tcp: lookup images.example: no such host", Unavailable),
        (429, "slower", Throttled),
    ],
)
def test_what_lxd_refuses_is_told_by_what_it_means(status, text, error):
    """Its words decide where its status does not, and are passed on."""
    with pytest.raises(error) as refused:
        api._refuse(status, "7", json.dumps({"error": text}).encode())
    assert type(refused.value) is error
    assert text in refused.value.message
    assert refused.value.hint
    if error is Throttled:
        assert refused.value.after_seconds == 7


@given(st.integers(400, 599), st.binary(max_size=100), st.text(max_size=10))
def test_any_refusal_is_an_error_of_the_tree(status, raw, retry_after):
    """Whatever stands in it."""
    with pytest.raises(Exception) as refused:
        api._refuse(status, retry_after, raw)
    assert refused.value.message.startswith("LXD says: ")


def test_the_newest_of_several_images_is_taken():
    """Of this kind of instance, by alias, pattern, description or fingerprint."""
    known = [
        image("aaaaaaaa", "2025", "debian/12"),
        image("bbbbbbbb", "2026", "debian/12/cloud"),
        image("cccccccc", "2027", "debian/13", type="virtual-machine"),
    ]
    for wanted in ("debian/12/cloud", "debian/*", "Debian 12", "bbbbbb"):
        assert images.found(known, wanted, InstanceType.CONTAINER).id == "bbbbbbbb" * 8
    with pytest.raises(NotFound) as refused:
        images.found(known, "debian/13", InstanceType.CONTAINER)
    assert "debian/12" in refused.value.hint
    with pytest.raises(InvalidSpec, match="No image is named"):
        images.found(known, "", InstanceType.CONTAINER)


def test_an_image_to_be_fetched_names_its_server():
    """`ubuntu:24.04` is what `lxc` would launch."""
    remotes = Remotes({"LXD_CONF": "/nowhere"})
    found = images.fetched(remotes, "ubuntu:24.04", "x86_64")
    assert found.user == "ubuntu"
    told = images.source(remotes, found)
    assert told["server"] == "https://cloud-images.ubuntu.com/releases"
    assert (told["protocol"], told["alias"], told["mode"]) == ("simplestreams", "24.04", "pull")
    assert images.fetched(remotes, "images:debian/12/cloud", "x86_64").user == "debian"


@given(st.integers(1, 30))
def test_the_name_of_an_instance_tells_its_lease(length):
    """And no other name does."""
    lease_id = new_id(length)
    assert instances.lease_of(instances.name_of(lease_id)) == lease_id
    assert instances.lease_of("web") == ""


def test_an_instance_is_off_only_when_it_was_on():
    """One that was never started is none yet; one that is has the address that others reach."""
    never = {"name": "i", "status": "Stopped", "last_used_at": "1970-01-01T00:00:00Z"}
    assert not instances.started_before(never)
    off = never | {"last_used_at": "2026-11-21T00:00:00Z"}
    assert instances.started_before(off)
    assert instances.server_of(off).condition is Condition.STOPPED
    cards = {
        "docker0": {"type": "broadcast", "addresses": [{"address": "172.17.0.1"}]},
        "eth0": {
            "type": "broadcast",
            "host_name": "veth1",
            "addresses": [
                {"address": "fe80::1"},
                {"address": "fd00::5"},
                {"address": "10.0.0.5"},
            ],
        },
        "lo": {"type": "loopback", "addresses": [{"address": "127.0.0.1"}]},
    }
    on = never | {"status": "Running", "state": {"network": cards}}
    assert instances.server_of(on).address == "10.0.0.5"
    assert instances.server_of(on | {"state": None}).address == ""
    assert instances.server_of(never | {"status": "Error"}).condition is Condition.FAILED


def test_who_adds_one_is_asked_for_what_lxc_knows(tmp_path, monkeypatch):
    """This host's LXD first if there is one, then the remotes."""
    (tmp_path / "config.yml").write_text("remotes: {far: {addr: 'https://far.example:8443'}}")
    monkeypatch.setenv("LXD_CONF", str(tmp_path))
    monkeypatch.setenv("LXD_SOCKET", "/run/mine.socket")
    remote = LXDProvider.questions()[0]
    assert (remote.default, remote.choices) == ("local", ("local", "far"))
    monkeypatch.delenv("LXD_SOCKET")
    monkeypatch.delenv("LXD_DIR", raising=False)
    monkeypatch.setattr(connecting, "_SOCKETS", (str(tmp_path / "none"),))
    remote = LXDProvider.questions()[0]
    assert (remote.default, remote.choices) == ("", ("far",))


def test_remotes_are_those_of_lxc(tmp_path):
    """A server of images makes no machines; an unknown one, or one without a key, is told."""
    (tmp_path / "config.yml").write_text(
        "remotes:\n"
        "  here: {addr: 'unix:///run/x.socket', project: grid}\n"
        "  pictures: {addr: 'https://images.example', protocol: simplestreams, public: true}\n"
        "  far: {addr: 'https://far.example:8443'}\n"
    )
    remotes = Remotes({"LXD_CONF": str(tmp_path), "LXD_SOCKET": "/run/mine.socket"})
    assert str(remotes.way("", None)) == "/run/mine.socket"
    assert str(remotes.way("here", None)) == "/run/x.socket"
    assert remotes.way("here", None).project == "grid"
    assert remotes.names() == ("far", "here")
    assert remotes.image_server("pictures") == ("https://images.example", "simplestreams")
    with pytest.raises(InvalidSpec, match="makes no machines"):
        remotes.way("pictures", None)
    with pytest.raises(NotFound, match="no remote 'nowhere'") as refused:
        remotes.way("nowhere", None)
    assert "far" in refused.value.hint
    with pytest.raises(NotFound, match=r"no client\.crt"):
        remotes.way("far", None)
    (tmp_path / "config.yml").write_text("remotes: [")
    with pytest.raises(InvalidSpec, match="cannot be read"):
        remotes.way("far", None)
