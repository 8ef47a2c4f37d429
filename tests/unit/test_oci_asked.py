"""What Oracle Cloud is asked for and what its errors mean, without it."""

import os
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import Forbidden, NoCapacity, NotFound, Throttled, TimedOut, Unavailable
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.shape import Shape
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.contract import assert_telling
from gridcloud.settings import LendingSettings

pytest.importorskip("oci")

import requests
from oci.core.models import Shape as Told
from oci.core.models import ShapeMemoryOptions, ShapeOcpuOptions
from oci.exceptions import RequestException, ServiceError

from gridcloud.providers.oci import OCIProvider, shapes
from gridcloud.providers.oci.credentials import Source
from gridcloud.providers.oci.errors import translated
from gridcloud.providers.oci.section import OCISection

#: OCPUs, memory in GiB, CPUs of an OCPU.
SIZES = {"VM.Standard.E4.Flex": (64, 1024, 2), "VM.Standard.A1.Flex": (80, 512, 1)}


@given(
    name=st.sampled_from(sorted(SIZES)),
    cpus=st.integers(1, 128),
    memory=st.integers(2**20, 1024 * GIB),
)
def test_a_flexible_machine_is_within_bounds_and_has_what_is_needed(name, cpus, memory):
    """Whatever fits a flexible shape is made with OCPUs and memory that OCI takes."""
    ocpus, gib, per_ocpu = SIZES[name]
    room = Resources(cpus=ocpus * per_ocpu, memory_bytes=gib * GIB)
    shape = Shape(name=name, resources=room, flexible=True)
    fitted = shape.fitted(Need(cpus=cpus, memory_bytes=memory))
    if fitted is None:
        return
    told = Told(
        ocpu_options=ShapeOcpuOptions(min=1.0, max=float(ocpus)),
        memory_options=ShapeMemoryOptions(
            min_in_g_bs=1.0,
            max_in_g_bs=float(gib),
            min_per_ocpu_in_gbs=1.0,
            max_per_ocpu_in_gbs=64.0,
        ),
    )
    made = shapes.configured(shape, told, fitted)
    assert 1 <= made.ocpus <= ocpus
    assert made.ocpus == int(made.ocpus)
    assert made.ocpus <= made.memory_in_gbs <= min(gib, made.ocpus * 64)
    assert made.ocpus * per_ocpu >= cpus
    assert made.memory_in_gbs * GIB >= memory


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (500, "InternalError", "Out of host capacity.", NoCapacity),
        (500, "InternalError", "Internal error.", Unavailable),
        (400, "LimitExceeded", "standard-e4-core-count", NoCapacity),
        (401, "NotAuthenticated", "The required information is missing.", Forbidden),
        (404, "NotAuthorizedOrNotFound", "Authorization failed.", NotFound),
        (400, "RelatedResourceNotAuthorizedOrNotFound", "Authorization failed.", NotFound),
        (409, "IncorrectState", "The resource is being changed.", Unavailable),
        (429, "TooManyRequests", "Slow down.", Throttled),
        (504, None, None, TimedOut),
        (503, None, None, Unavailable),
    ],
)
def test_errors_are_told_by_their_kind(status, code, message, kind):
    """What OCI answers is one of gridcloud's errors, with what to do."""
    error = translated(ServiceError(status, code, {"retry-after": "7"}, message), "launch instance")
    assert type(error) is kind
    assert_telling(error)
    if isinstance(error, Throttled):
        assert error.after_seconds == 7


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (requests.exceptions.ReadTimeout("read timed out"), TimedOut),
        (requests.exceptions.ConnectionError("Connection aborted."), TimedOut),
        (requests.exceptions.ConnectionError("Connection refused"), Unavailable),
    ],
)
def test_a_broken_connection_leaves_open_what_was_done(cause, kind):
    """Only what surely was not sent is told as unavailable."""
    assert type(translated(RequestException(cause), "launch instance")) is kind


@pytest.fixture(scope="module")
def key():
    """Give a private key as a file has it."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Give a home with nothing of Oracle's in it, nor in the environment."""
    for name in [name for name in os.environ if name.startswith("OCI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OCI_CLI_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def test_credentials_of_the_environment_need_no_file(home, key, monkeypatch):
    """The variables of Oracle's command line are enough, and a key is not shown."""
    (home / "key.pem").write_bytes(key)
    for name, value in {
        "USER": "ocid1.user.oc1..a",
        "TENANCY": "ocid1.tenancy.oc1..a",
        "FINGERPRINT": "20:3b",
        "KEY_FILE": str(home / "key.pem"),
        "REGION": "eu-zurich-1",
    }.items():
        monkeypatch.setenv(f"OCI_CLI_{name}", value)
    login = Source(OCISection()).login()
    assert (login.tenancy, login.region) == ("ocid1.tenancy.oc1..a", "eu-zurich-1")
    assert "key.pem" not in repr(login)


def test_a_sessions_token_is_read_again_when_it_was_renewed(home, key):
    """Once `oci session refresh` has written a new token, that one is used; else the login is
    kept."""
    (home / "key.pem").write_bytes(key)
    (home / "token").write_text("first")
    lines = ("region=eu-zurich-1", "tenancy=ocid1.tenancy.oc1..a", "fingerprint=20:3b")
    files = (f"key_file={home}/key.pem", f"security_token_file={home}/token")
    (home / "config").write_text("\n".join(["[DEFAULT]", *lines, *files]))
    source = Source(OCISection())
    before = source.login()
    assert before.signer.api_key == "ST$first"
    assert source.login() is before
    (home / "token").write_text("second")
    os.utime(home / "token", ns=(1, 1))
    assert source.login().signer.api_key == "ST$second"


def test_a_missing_sdk_is_told_with_how_to_install_it(home, monkeypatch):
    """The extra is needed when the provider is used, and not before."""
    for name in [name for name in sys.modules if name.startswith("gridcloud.providers.oci.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "oci", None)
    assert OCIProvider.questions()
    context = ProviderContext("5e" * 32, home, LendingSettings(), probe=None)
    with pytest.raises(Unavailable, match="pip install 'gridcloud\\[oci\\]'"):
        OCIProvider("cloud", {}, context)
