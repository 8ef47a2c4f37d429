"""Credentials for AWS, from where its users have them; read when used, and never copied.

In this order, as AWS's own tools: the variables ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``
and ``AWS_SESSION_TOKEN``, unless the settings name a profile; the profile of the settings, of
``AWS_PROFILE``, or ``default``, in ``~/.aws/credentials`` and ``~/.aws/config`` (or where
``AWS_SHARED_CREDENTIALS_FILE`` and ``AWS_CONFIG_FILE`` say), with its keys or what its
``credential_process`` prints. Single sign-on and roles come through the latter.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gridcloud.errors import Forbidden, InvalidSpec

_PROCESS_SECONDS = 60.0
_LONGEST_ANSWER = 64 * 1024
#: Credentials of a process are asked for again so long before they end, or after they were got.
_BEFORE_END, _KEPT_FOR = timedelta(minutes=5), timedelta(minutes=15)
_ELSEWHERE = ("role_arn", "sso_session", "sso_start_url", "web_identity_token_file")


@dataclass(frozen=True)
class Credentials:
    """An access key. Its secrets are not shown when it is printed."""

    key: str
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)


class Source:
    """Where one account's credentials are. Its methods block; threads may share it."""

    def __init__(self, profile: str = "") -> None:
        self._wanted = profile
        self._lock = threading.Lock()
        self._printed: tuple[datetime, Credentials] | None = None

    def credentials(self) -> Credentials:
        """Return those that hold now; raises `Forbidden` if there are none."""
        if not self._wanted and (found := _from(os.environ, str.upper)):
            return found
        profile = self._profile()
        if found := _from(profile, str):
            return found
        if command := profile.get("credential_process"):
            with self._lock:
                return self._process(command)
        if any(key in profile for key in _ELSEWHERE):
            raise Forbidden(
                f"The AWS profile {self._name()!r} gets credentials by single sign-on or a role.",
                hint="Make a profile with credential_process = "
                f'"aws configure export-credentials --profile {self._name()}", and name that one.',
            )
        raise Forbidden(
            f"Neither the AWS profile {self._name()!r} nor the environment has credentials.",
            hint="Run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )

    def region(self) -> str:
        """Return the region that the user has chosen; raises `InvalidSpec` if there is none."""
        told = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region := (not self._wanted and told) or self._profile().get("region") or told:
            return region
        raise InvalidSpec(
            "No region is named.",
            hint='Name some in the settings, as regions = ["eu-central-1"], or in ~/.aws/config.',
        )

    def _name(self) -> str:
        return self._wanted or os.environ.get("AWS_PROFILE") or "default"

    def _profile(self) -> Mapping[str, str]:
        name = self._name()
        found: dict[str, str] = {}
        folder = Path.home() / ".aws"
        for variable, usual, section in (
            ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
        ):
            path = Path(os.environ.get(variable) or folder / usual).expanduser()
            read = configparser.RawConfigParser()
            try:
                read.read(path, encoding="utf-8")
            except (configparser.Error, UnicodeDecodeError) as error:
                # The error would show the line, which may be a secret.
                raise InvalidSpec(f"{path} cannot be read.", hint="Mend it.") from error
            if read.has_section(section):
                found |= dict(read.items(section))
        if not found and self._wanted:
            raise InvalidSpec(
                f"There is no AWS profile {name!r}.", hint="`aws configure list-profiles` tells."
            )
        return found

    def _process(self, command: str) -> Credentials:
        now = datetime.now(UTC)
        if self._printed and now < self._printed[0]:
            return self._printed[1]
        try:
            done = subprocess.run(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=_PROCESS_SECONDS,
            )
            told = json.loads(done.stdout[:_LONGEST_ANSWER])
            found = Credentials(
                told["AccessKeyId"], told["SecretAccessKey"], told.get("SessionToken") or ""
            )
            ends = _time(told)
        except subprocess.CalledProcessError as error:
            said = " ".join(error.stderr.decode(errors="replace").split())[-300:]
            raise _failed(said or f"its status is {error.returncode}") from error
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
            raise _failed(type(error).__name__) from None
        self._printed = (ends - _BEFORE_END if ends else now + _KEPT_FOR, found)
        return found


def _from(told: Mapping[str, str], case: Any) -> Credentials | None:
    key = told.get(case("aws_access_key_id"))
    secret = told.get(case("aws_secret_access_key"))
    if not key or not secret:
        return None
    return Credentials(key, secret, told.get(case("aws_session_token")) or "")


def _time(told: Mapping[str, Any]) -> datetime | None:
    ends = told.get("Expiration")
    return datetime.fromisoformat(ends.replace("Z", "+00:00")) if ends else None


def _failed(why: str) -> Forbidden:
    return Forbidden(
        f"The credential_process of the AWS profile gave no credentials: {why.rstrip('.')}.",
        hint="Try it by hand; with single sign-on, log in again: `aws sso login`.",
    )
