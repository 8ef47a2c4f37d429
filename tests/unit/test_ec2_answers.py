"""What the EC2 provider decides without a network: credentials, errors, parameters, permissions."""

import json
import re
import sys
from pathlib import Path

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.providers.libcloud import asking, servers
from gridcloud.providers.libcloud.asking import flattened
from gridcloud.providers.libcloud.credentials import Source
from gridcloud.providers.libcloud.errors import Refused, as_needed, translated

ROOT = Path(__file__).parents[2]


@pytest.fixture
def aws(tmp_path, monkeypatch):
    """Give a home without credentials, and a function that writes one of its files."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return lambda name, text: (tmp_path / name).write_text(text)


def test_the_environment_goes_before_the_default_profile(aws, monkeypatch):
    """As with AWS's own tools; but a profile that the settings name goes before both."""
    aws("credentials", "[default]\naws_access_key_id=A\naws_secret_access_key=a\n[own]\n"
        "aws_access_key_id=O\naws_secret_access_key=o\naws_session_token=t\n")  # fmt: skip
    assert Source().credentials().key == "A"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "e")
    assert Source().credentials().key == "E"
    own = Source("own").credentials()
    assert (own.key, own.secret, own.token) == ("O", "o", "t")


def test_the_profile_of_the_environment_is_used(aws, monkeypatch):
    """Its keys may be in the config file, where profiles are named otherwise; so is its region."""
    aws("config", "[profile lab]\nregion = eu-north-1\naws_access_key_id=L\n"
        "aws_secret_access_key=l\n")  # fmt: skip
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert (Source().credentials().key, Source().region()) == ("L", "eu-north-1")


def test_a_credential_process_is_asked_once_while_its_answer_holds(aws, tmp_path):
    """It is run without a shell; what it prints is kept until shortly before its end."""
    program = tmp_path / "print.py"
    program.write_text(
        "import json, pathlib\n"
        f"asked = pathlib.Path({str(tmp_path / 'asked')!r})\n"
        "asked.open('a').write('x')\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': 'P', 'SecretAccessKey': 'p',"
        " 'SessionToken': 't', 'Expiration': '2999-01-01T00:00:00Z'}))\n"
    )
    aws("config", f"[default]\ncredential_process = {sys.executable} '{program}'\n")
    source = Source()
    assert [source.credentials().token, source.credentials().token] == ["t", "t"]
    assert (tmp_path / "asked").read_text() == "x"


def test_a_credential_process_that_fails_is_told(aws):
    """With what it said."""
    aws("config", '[default]\ncredential_process = sh -c "echo log in again >&2; exit 3"\n')
    with pytest.raises(Forbidden, match="log in again"):
        Source().credentials()


@pytest.mark.parametrize(
    ("config", "error", "hint"),
    [
        ("", Forbidden, "aws configure"),
        ("[default]\nsso_session = x\n", Forbidden, "export-credentials --profile default"),
        ("[default]\nrole_arn = x\n", Forbidden, "credential_process"),
        ("no section = secret-word\n", InvalidSpec, "Mend it"),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(aws, config, error, hint):
    """And no line of a file is shown, since it may be a secret."""
    aws("config", config)
    with pytest.raises(error) as refused:
        Source().credentials()
    assert hint in refused.value.hint
    assert "secret-word" not in str(refused.value)


def test_no_region_is_told(aws):
    """Neither in the settings, nor anywhere else."""
    with pytest.raises(InvalidSpec, match="regions"):
        Source().region()


def test_secrets_are_not_printed(aws):
    """Credentials that end in a log show nothing but the key's name."""
    aws("credentials", "[default]\naws_access_key_id=A\naws_secret_access_key=hidden\n")
    assert "hidden" not in repr(Source().credentials())


def refused(code, status=400, message="It said why.", **headers):
    """Return EC2's refusal as it is told to people."""
    body = f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message>"
    body += "</Error></Errors></Response>"
    error = Refused.read(status, body, {k.replace("_", "-"): v for k, v in headers.items()})
    return translated(error, "RunInstances")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("InsufficientInstanceCapacity", 500, NoCapacity),
        ("Unsupported", 400, NoCapacity),
        ("VcpuLimitExceeded", 400, NoCapacity),
        ("InstanceLimitExceeded", 400, NoCapacity),
        ("VpcLimitExceeded", 400, NoCapacity),
        ("MaxSpotInstanceCountExceeded", 400, NoCapacity),
        ("RequestLimitExceeded", 503, Throttled),
        ("Throttling", 400, Throttled),
        ("AuthFailure", 401, Forbidden),
        ("UnauthorizedOperation", 403, Forbidden),
        ("ExpiredToken", 400, Forbidden),
        ("InvalidAMIID.NotFound", 400, NotFound),
        ("InvalidAMIID.Malformed", 400, NotFound),
        ("InvalidInstanceID.NotFound", 400, NotFound),
        ("DependencyViolation", 400, Conflict),
        ("InvalidGroup.Duplicate", 400, Conflict),
        ("InternalError", 500, Unavailable),
        ("Unavailable", 503, Unavailable),
        ("InvalidParameterValue", 400, InvalidSpec),
        ("", 429, Throttled),
        ("", 502, Unavailable),
    ],
)
def test_what_errors_of_ec2_mean(code, status, kind):
    """Each is told as the kind that says whether another attempt, or place, may help."""
    told = refused(code, status)
    assert type(told) is kind
    assert "It said why" in told.message
    assert told.hint


def test_how_long_to_wait_is_read_where_it_is_told():
    """A date instead of seconds is as if nothing was said."""
    assert refused("", 429, retry_after="7").after_seconds == 7
    assert refused("", 429, retry_after="Fri, 21 Nov 2026").after_seconds == 0


def test_what_a_create_needs_and_is_gone_is_asked_for_again():
    """A network that was removed a moment ago is no reason to give up; an image is."""
    for code, kind in (
        ("InvalidSubnetID.NotFound", Unavailable),
        ("InvalidAMIID.NotFound", NotFound),
    ):
        told = translated(cause := Refused(400, code, "It is gone.", {}), "RunInstances")
        told.__cause__ = cause
        assert type(as_needed(told)) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (requests.exceptions.ReadTimeout("slow"), TimedOut),
        (requests.exceptions.ConnectionError("Connection aborted."), TimedOut),
        (requests.exceptions.ConnectionError("NewConnectionError: refused"), Unavailable),
        (Exception("anything"), Unavailable),
    ],
)
def test_a_broken_connection_leaves_open_what_was_done(error, kind):
    """Only where nothing can have been sent is it certain that nothing was done."""
    assert type(translated(error, "RunInstances")) is kind


@given(st.text(), st.integers(400, 599))
def test_no_answer_is_misunderstood(body, status):
    """Whatever an error's body holds, it becomes an error that can be told, in a line."""
    told = translated(Refused.read(status, body, {}), "RunInstances")
    assert isinstance(told, GridcloudError)
    assert "\n" not in told.message
    assert len(told.message) < 1000


def test_parameters_are_numbered_as_ec2_has_them():
    """Lists from 1, dictionaries by dots, truth in lowercase."""
    told = flattened({"Filter": [{"Name": "a", "Value": ["x", "y"]}], "Max": 5, "Yes": True})
    assert told == {
        "Filter.1.Name": "a",
        "Filter.1.Value.1": "x",
        "Filter.1.Value.2": "y",
        "Max": "5",
        "Yes": "true",
    }


def ended(code, message="Server.InternalError: it broke"):
    """Return a machine that has ended."""
    reason = {"code": code, "message": message}
    return {"instanceId": "i-1", "instanceState": {"name": "terminated"}, "stateReason": reason}


def test_only_an_end_that_nobody_wanted_is_a_failure():
    """EC2 shows what has ended for an hour; what we or the machine ended is simply gone."""
    assert servers.failure(ended("Server.InternalError")).reason == "Server.InternalError: it broke"
    assert servers.failure(ended("Client.UserInitiatedShutdown")) is None
    assert servers.failure(ended("Client.InstanceInitiatedShutdown")) is None
    assert servers.failure({"instanceId": "i-1", "instanceState": {"name": "running"}}) is None


def test_the_policy_in_the_docs_names_all_that_is_asked():
    """Every call in the code is permitted there, and nothing else."""
    folder = Path(asking.__file__).parent
    text = "".join((folder / name).read_text() for name in (
        "ec2.py", "images.py", "instance_types.py", "named_networks.py", "networks.py",
        "servers.py", "tagging.py", "volumes.py",
    ))  # fmt: skip
    verbs = "Describe|Run|Create|Delete|Attach|Detach|Terminate|Authorize|GetConsole"
    asked = set(re.findall(rf'"((?:{verbs})[A-Z]?[A-Za-z]+)"', text))
    policy = json.loads((ROOT / "docs/how-to/ec2-policy.json").read_text())
    allowed = {a.removeprefix("ec2:") for part in policy["Statement"] for a in part["Action"]}
    assert asked - {"DeleteOnTermination"} == allowed
