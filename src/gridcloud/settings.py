"""Settings: one frozen, typed tree. Defaults < file < environment < flags; read once, passed on.

The file is TOML (``gridcloud site show`` says where). Each provider owns its section under
``[providers.NAME]``; its fields are checked by the provider itself, named by ``kind``.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.model.quantities import parse_bytes, parse_duration


def _as_written(parse: Callable[[str], object]) -> BeforeValidator:
    """Let a text stand for a quantity; a bad one becomes an error that names its place."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except InvalidSpec as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(read)


Duration = Annotated[timedelta, _as_written(parse_duration)]
Bytes = Annotated[int, _as_written(parse_bytes)]
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]


class GridSettings(Frozen):
    """How this site takes part in the overlay. ``listen`` is loopback until asked otherwise."""

    listen: str = "127.0.0.1:0"
    advertise: tuple[str, ...] = ()


class GatewaySettings(Frozen):
    """The one SSH port through which leased capacity is reached."""

    listen: str = "127.0.0.1:0"
    advertise: str = ""


class LendingSettings(Frozen):
    """What peers may use of this host: nothing, until ``enabled``.

    ``software`` names folders shown read-only to guests, with the ``bin`` of each on their PATH.
    ``cpus`` and ``memory`` bound what is lent in all; None means all the host provider has.
    """

    enabled: bool = False
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    disk: Annotated[Bytes, Field(ge=2**20)] = 10 * 1024**3
    processes: Annotated[int, Field(ge=1)] = 512
    max_time: Annotated[Duration, Field(gt=timedelta(0))] = timedelta(hours=24)
    network: bool = False
    software: tuple[Path, ...] = ()
    communities: tuple[str, ...] = ()


class ApiSettings(Frozen):
    """The HTTP API: always on a unix socket; on TCP only with an address and a token file."""

    listen: str = ""
    token_file: Path | None = None


class SiteSettings(Frozen):
    """Everything a site is told."""

    name: SiteName
    grid: GridSettings = GridSettings()
    gateway: GatewaySettings = GatewaySettings()
    lending: LendingSettings = LendingSettings()
    api: ApiSettings = ApiSettings()
    providers: dict[str, dict[str, Any]] = {}
    cancel_grace: Annotated[Duration, Field(ge=timedelta(0))] = timedelta(seconds=5)


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return where a site keeps its state: GRIDCLOUD_STATE, or the XDG state folder."""
    if chosen := environ.get("GRIDCLOUD_STATE"):
        return Path(chosen).expanduser().absolute()
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "gridcloud"


def settings_file(environ: Mapping[str, str]) -> Path:
    """Return where a site's settings are: GRIDCLOUD_SETTINGS, or the XDG configuration folder."""
    if chosen := environ.get("GRIDCLOUD_SETTINGS"):
        return Path(chosen).expanduser().absolute()
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "gridcloud" / "settings.toml"


def load(path: Path, environ: Mapping[str, str] = os.environ) -> SiteSettings:
    """Return the settings in ``path`` (a missing file means all defaults).

    Raises `InvalidSpec` naming the file, the line where one is known, and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"{path} cannot be read: {error}.") from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpec(f"{path}: {error}.", hint="Settings are written in TOML.") from error
    if name := environ.get("GRIDCLOUD_SITE_NAME"):
        content["name"] = name
    content.setdefault("name", _default_name())
    try:
        return SiteSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        keys = [str(part) for part in first["loc"]]
        line = _line_of(text, keys)
        where = f"{path}, line {line}" if line else str(path)
        raise InvalidSpec(f"{where}: {'.'.join(keys)}: {_expected(first)}.") from error


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such setting; check its spelling"
    text = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"{text} (found {error['input']!r})"


def _line_of(text: str, keys: list[str]) -> int | None:
    """Return the line where the last of ``keys`` is set within its section, if it is there."""
    section: list[str] = []
    best = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            section = [part.strip(" \"'") for part in header.group(1).split(".")]
            if section == keys[: len(section)]:
                best = number
        elif assignment := re.match(r"\s*([\w\"'-]+)\s*=", line):
            path = [*section, assignment.group(1).strip("\"'")]
            if path == keys[: len(path)]:
                return number
    return best


def _default_name() -> str:
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    user = re.sub(r"[^a-z0-9-]+", "-", getpass.getuser().lower()).strip("-")
    return (f"{user}-{host}" if host else user or "site")[:31].strip("-")
