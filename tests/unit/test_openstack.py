"""What OpenStack's answers mean: flavors, images, machines, tags and errors."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("openstack", reason="the extra openstack is not installed")

from keystoneauth1 import exceptions as theirs

from gridcloud.errors import (
    Conflict,
    Forbidden,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.model.things import Tags
from gridcloud.providers.cloud.clouds import Condition
from gridcloud.providers.openstack import OpenStackSection, flavors, images, servers, volumes
from gridcloud.providers.openstack.errors import as_needed, translated
from gridcloud.providers.openstack.regions import _fetched
from gridcloud.providers.openstack.tagging import described, of_network

GIB = 1024**3


@pytest.mark.parametrize(
    ("extra", "gpus"),
    [
        ({}, 0),
        ({"resources:VGPU": "2"}, 2),
        ({"resources1:PGPU": "1", "resources2:VGPU": "1"}, 2),
        ({"resources:CUSTOM_NVIDIA_A100": "1"}, 1),
        ({"resources:CUSTOM_FPGA_CARD": "1", "resources:MEMORY_MB": "0"}, 0),
        ({"pci_passthrough:alias": "a100:2"}, 2),
        ({"pci_passthrough:alias": "Tesla-V100:1, nic-x710:2"}, 1),
        ({"pci_passthrough:alias": "gpu"}, 1),
        ({"pci_passthrough:alias": "nvme:4"}, 0),
        ({"accel:device_profile": "gpu-t4"}, 1),
        ({"resources:VGPU": "many"}, 0),
    ],
)
def test_gpus_are_read_from_extra_specs(extra, gpus):
    """As nova documents them; cards that are no GPUs do not count."""
    assert flavors.gpus(extra) == gpus


def test_a_flavor_is_a_shape():
    """Its memory is in MiB, its disk in GiB; the settings tell GPUs and price by its name."""
    flavor = {"name": "gpu.large", "vcpus": 8, "ram": 32768, "disk": 40, "extra_specs": {}}
    section = OpenStackSection(gpus={"gpu.*": 2}, prices={"gpu.*": 1.5, "*": 0.1}, currency="EUR")
    shape = flavors.shape(flavor, "R", section)
    assert (shape.resources.cpus, shape.resources.gpus) == (8, 2)
    assert (shape.resources.memory_bytes, shape.disk_bytes) == (32 * GIB, 40 * GIB)
    assert (shape.price, shape.currency, shape.region) == (1.5, "EUR", "R")
    assert flavors.shape(flavor | {"OS-FLV-DISABLED:disabled": True}, "R", section) is None


@pytest.mark.parametrize("flavor", [{}, {"name": "x"}, {"name": "x", "vcpus": "y", "ram": 1}])
def test_a_flavor_that_is_none_is_the_clouds_error(flavor):
    """Nothing that a cloud answers is trusted to be well-formed."""
    with pytest.raises(Unavailable):
        flavors.shape(flavor, "R", OpenStackSection())


def image(name, owner="o1", visibility="public", created="2026", **more):
    about = {"id": name, "name": name, "status": "active", "owner": owner}
    return about | {"visibility": visibility, "created_at": created} | more


def test_images_are_matched_by_name_owner_and_pattern():
    """A name with a slash is first of all a name; brackets in it are no pattern."""
    egi = image("EGI Image for Debian 12 [Debian/12/KVM]", owner="egi")
    found = [egi, image("debian-12"), image("debian-13", owner="o2"), image("x", status="queued")]
    names = lambda wanted: [one["name"] for one in images.matching(found, wanted)]  # noqa: E731
    assert names(egi["name"]) == [egi["name"]]
    assert names("egi/EGI Image for * [Debian*") == [egi["name"]]
    assert names("debian-*") == ["debian-12", "debian-13"]
    assert names("o2/debian-*") == ["debian-13"]
    assert names("public/debian-12") == ["debian-12"]
    assert names("private/debian-12") == []
    assert names("x") == []


def test_an_image_says_what_it_needs():
    """The user is what it says, or what its makers use."""
    made = images.read(image("Ubuntu 24.04", min_disk=3, min_ram=512, virtual_size=2**30))
    assert (made.user, made.disk_bytes, made.memory_bytes) == ("ubuntu", 3 * GIB, 512 * 2**20)
    assert images.read(image("x", os_admin_user="rocky")).user == "rocky"
    assert images.read(image("x", os_admin_user="$(id)")).user == "gridcloud"
    assert images.read(image("x", hw_architecture="aarch64")).architecture == "aarch64"


def test_a_machine_is_read():
    """Its address is of the kind that is wanted, IPv4 first; a fault is the reason."""
    fixed = {"addr": "10.0.0.4", "OS-EXT-IPS:type": "fixed"}
    six = {"addr": "2001:db8::1", "OS-EXT-IPS:type": "fixed"}
    outer = {"addr": "192.0.2.7", "OS-EXT-IPS:type": "floating"}
    found = {"id": "i", "status": "ACTIVE", "addresses": {"n": [six, fixed, outer, {"addr": "?"}]}}
    assert servers.read(found, floating=False).address == "10.0.0.4"
    assert servers.read(found, floating=True).address == "192.0.2.7"
    assert servers.read({"id": "i", "status": "BUILD"}, floating=False).address == ""
    failed = servers.read(
        {"id": "i", "status": "ERROR", "fault": {"message": "No valid host was found."}},
        floating=False,
    )
    assert (failed.condition, failed.reason) == (Condition.FAILED, "No valid host was found")


@given(
    st.text(alphabet="0123456789abcdef", min_size=32, max_size=32),
    st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567-", min_size=1, max_size=32),
    st.none() | st.datetimes(datetime(2026, 1, 1), datetime(2100, 1, 1)),
)
def test_tags_are_read_back_from_a_description(site, lease, ends_at):
    """Whatever they are, and whatever else is said."""
    ends = ends_at.replace(microsecond=0, tzinfo=UTC) if ends_at else None
    tags = Tags(site=site, lease=lease, ends_at=ends)
    assert of_network({"description": described(tags, ready="yes")}) == tags


@pytest.mark.parametrize("thing", [{}, {"description": None}, {"description": "a router of mine"}])
def test_things_of_others_have_no_tags(thing):
    """So they are never touched."""
    assert of_network(thing) is None


class _Answer:
    def __init__(self, body=None, **headers):
        self.body, self.headers = body, headers

    def json(self):
        if self.body is None:
            raise ValueError("no JSON")
        return self.body


@pytest.mark.parametrize(
    ("status", "said", "kind", "word"),
    [
        (401, "The request you have made requires authentication.", Forbidden, "login"),
        (403, "Policy doesn't allow os_compute_api:servers:create", Forbidden, "os_compute_api"),
        (403, "Quota exceeded for instances: Requested 1, but ...", NoCapacity, "instances"),
        (409, "Quota exceeded for resources: ['floatingip'].", NoCapacity, "floatingip"),
        (413, "VolumeSizeExceedsAvailableQuota: Requested volume exceeds", NoCapacity, "olume"),
        (409, "No more IP addresses available on network 6f.", NoCapacity, "addresses"),
        (400, "The requested availability zone is not available", NoCapacity, "zone"),
        (409, "Port 4 is in use", Conflict, "Port 4"),
        (404, "Flavor x could not be found.", NotFound, "Flavor x"),
        (400, "Invalid input for field user_data", InvalidSpec, "user_data"),
        (500, "Unexpected API Error", Unavailable, "Unexpected"),
        (503, "", Unavailable, "503"),
        (504, "Gateway Timeout", TimedOut, "Gateway"),
    ],
)
def test_answers_mean_what_they_say(status, said, kind, word):
    """Each of nova's, neutron's and cinder's refusals is of the kind that its cure needs."""
    error = translated(theirs.HttpError(said, http_status=status, response=_Answer()), "POST /x")
    assert type(error) is kind
    assert word in str(error)
    assert error.message.endswith(".")
    assert error.hint.endswith(".")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, {"forbidden": {"code": 403, "message": "Quota exceeded for cores: 2"}}),
        (409, {"NeutronError": {"type": "OverQuota", "message": "Quota exceeded for cores"}}),
        (413, {"overLimit": {"code": 413, "message": "Quota exceeded for cores"}}),
    ],
)
def test_each_service_wraps_what_it_says(status, body):
    """keystoneauth looks into keystone's wrapping alone."""
    error = theirs.HttpError("Unrecognized schema", http_status=status, response=_Answer(body))
    assert isinstance(translated(error, "POST /x"), NoCapacity)
    assert "cores" in str(translated(error, "POST /x"))


@pytest.mark.parametrize(("told", "seconds"), [("7", 7.0), ("Wed, 21 Oct", 0.0), ("1e9", 3600.0)])
def test_too_many_requests_say_how_long_to_wait(told, seconds):
    """Bounded, so that a cloud cannot stop us for ever."""
    answer = _Answer(**{"Retry-After": told})
    error = translated(theirs.HttpError("slow", http_status=429, response=answer), "GET /x")
    assert isinstance(error, Throttled)
    assert error.after_seconds == seconds


def test_a_connection_that_broke_leaves_open_what_was_done():
    """One that was refused does not: nothing was sent."""
    refused = theirs.ConnectFailure("Unable to connect: [Errno 111] Connection refused")
    broken = theirs.ConnectFailure("('Connection aborted.', RemoteDisconnected(...))")
    assert type(translated(refused, "x")) is Unavailable
    assert type(translated(broken, "x")) is TimedOut
    assert type(translated(theirs.ConnectTimeout("t"), "x")) is TimedOut


def test_what_a_create_needs_and_is_gone_is_prepared_again():
    """A network that went with the last machine in it is no reason to give up."""
    gone = InvalidSpec("OpenStack does not take this: Network 4f could not be found.")
    assert type(as_needed(gone)) is Unavailable
    unknown = InvalidSpec("OpenStack does not take this: Image 4f could not be found.")
    assert as_needed(unknown) is unknown


def test_a_token_comes_from_a_file_or_a_command(tmp_path):
    """Anew each time; what is no token, and a source that fails, are told without the token."""
    file = tmp_path / "token"
    file.write_text("abc.def\n")
    assert _fetched(OpenStackSection(token_file=file)) == "abc.def"
    assert _fetched(OpenStackSection(token_command=("cat", str(file)))) == "abc.def"
    file.write_text("Usage: oidc-token ...\n")
    for section in (
        OpenStackSection(token_file=file),
        OpenStackSection(token_file=tmp_path / "none"),
        OpenStackSection(token_command=("false",)),
        OpenStackSection(token_command=("surely-no-such-program",)),
    ):
        with pytest.raises(Forbidden) as refused:
            _fetched(section)
        assert "Usage" not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "device"),
    [
        ("/dev/vdb", "/dev/disk/by-id/virtio-01234567-89ab-cdef-0"),
        (
            "/dev/sdb",
            "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_01234567-89ab-cdef-0123-456789abcdef",
        ),
        ("/dev/xvdb", "/dev/xvdb"),
        ("", ""),
    ],
)
def test_a_volume_is_found_by_its_serial_number(told, device):
    """The name of a disk is only a guess of nova's, but KVM's serial number is the volume's id."""
    assert volumes.device(told, "01234567-89ab-cdef-0123-456789abcdef") == device
