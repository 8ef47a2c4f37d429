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
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gridcloud.errors import InvalidSpec
from gridcloud.model.choice import Order, Strategy
from gridcloud.model.countries import CountryCode
from gridcloud.model.frozen import Frozen
from gridcloud.model.hours import Hours, parse_hours
from gridcloud.model.identifiers import RelayUrl
from gridcloud.model.prices import Prices
from gridcloud.model.quantities import (
    format_bytes,
    format_duration,
)
from gridcloud.model.written import Bytes, Duration, as_written

SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
#: A community's name, with its founder's key or the first 8 digits of it to tell two apart.
CommunityPattern = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}(\.[0-9a-f]{8,64})?$")]


def _people(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9._-]{1,64}|\*)@([a-z0-9][a-z0-9-]{0,62}|\*)", text):
        raise InvalidSpec(
            "this is no pattern of people.",
            hint='Write user@site, as "alice@university", "*@university" or "alice@*".',
        )
    return text


#: ``user@site``, where ``*`` stands for everybody or every site.
PeoplePattern = Annotated[str, as_written(_people)]


class GridSettings(Frozen):
    """How this site takes part in the overlay. ``listen`` is loopback until asked otherwise.

    ``tls_listen`` is a TCP address beside it, for peers that UDP does not reach. With ``relay``
    the site passes on what members cannot send one another directly, ``relay_rate`` bytes a second
    at most. ``iroh_relays`` are URLs of relays of one's own.
    """

    listen: str = "127.0.0.1:0"
    advertise: tuple[str, ...] = ()
    tls_listen: str = ""
    tls_advertise: tuple[str, ...] = ()
    iroh_relays: Annotated[tuple[RelayUrl, ...], Field(max_length=4)] = ()
    relay: bool = False
    relay_rate: Annotated[Bytes, Field(ge=1024)] = 1024**2


class GatewaySettings(Frozen):
    """The one SSH port through which leased capacity is reached."""

    listen: str = "127.0.0.1:0"
    advertise: str = ""


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Quota(Frozen):
    """What one person, or one site, may have: CPUs at a time, CPU-hours within ``period``."""

    cpus: Annotated[int, Field(ge=1)] | None = None
    cpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    period: Annotated[Duration, Field(ge=timedelta(hours=1), le=timedelta(days=366))] = timedelta(
        days=30
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.cpus is None and self.cpu_hours is None:
            raise ValueError("needs cpus, cpu_hours or both")
        return self


class LendingRule(Frozen):
    """To whom, and what of it. What is left out is bounded by `LendingSettings` alone.

    It is for members of ``community`` that have any of ``roles``, and there for ``people``; what
    is left out of these three is for everybody. ``cpus``, ``memory`` and ``gpus`` bound all its
    loans together. With a ``notice`` its loans may be recalled, that long ahead.
    """

    community: CommunityPattern | None = None
    roles: tuple[Literal["provider", "consumer", "manager"], ...] = ()
    people: tuple[PeoplePattern, ...] = ()
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    max_time: Annotated[Duration, Field(ge=timedelta(seconds=1))] | None = None
    hours: Annotated[
        tuple[Annotated[Hours, as_written(parse_hours)], ...], BeforeValidator(_listed)
    ] = ()
    network: bool | None = None
    software: tuple[Path, ...] | None = None
    prices: Prices = Prices()
    notice: Annotated[Duration, Field(ge=timedelta(0))] | None = None
    per_person: Quota | None = None
    per_site: Quota | None = None

    def covers(self, other: LendingRule) -> bool:
        """Whether this rule takes everybody that ``other`` is for."""
        return (
            self.community in (None, other.community)
            and (not self.roles or (bool(other.roles) and {*other.roles} <= {*self.roles}))
            and (not self.people or (bool(other.people) and {*other.people} <= {*self.people}))
        )


#: What confines guests, other than a provider's name.
AUTO, SANDBOX, CONTAINER = "auto", "bubblewrap", "container"


class LendingSettings(Frozen):
    """What peers may use of this host: nothing, until ``enabled``.

    The first of ``rules`` that is for the asker says what it gets; with rules of which none is,
    nothing. Without rules everybody in ``communities`` (empty: all) gets what there is.
    ``cpus``, ``memory`` and ``gpus`` bound what is lent in all; None means all the host provider
    has. ``software`` names folders shown read-only to guests, with the ``bin`` of each on their
    PATH. ``isolation`` says what confines them: ``auto`` (bubblewrap where that works, else the
    first provider of containers that does), ``bubblewrap``, ``container``, or a provider's name.
    ``half_life`` says how fast what somebody used is forgotten when several want the same.
    """

    enabled: bool = False
    country: CountryCode | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    disk: Annotated[Bytes, Field(ge=2**20)] = 10 * 1024**3
    processes: Annotated[int, Field(ge=8)] = 512
    max_time: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=365))] = (
        timedelta(hours=24)
    )
    network: bool = False
    software: tuple[Path, ...] = ()
    isolation: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = AUTO
    communities: tuple[CommunityPattern, ...] = ()
    half_life: Annotated[Duration, Field(ge=timedelta(minutes=1))] = timedelta(days=7)
    rules: Annotated[tuple[LendingRule, ...], Field(max_length=256)] = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for number, rule in enumerate(self.rules):
            for field, problem in self._contradictions(number, rule):
                # Where it stands cannot be told otherwise from a check that sees several fields.
                at = ["rules", number, *([field] if field else [])]
                raise PydanticCustomError(
                    "contradiction", "{problem}", {"problem": problem, "at": at}
                )
        return self

    def _contradictions(self, number: int, rule: LendingRule) -> list[tuple[str, str]]:
        """Return what a rule says that can never be, each with the field that says it."""
        found = []
        for field in ("cpus", "memory", "gpus", "max_time"):
            most, wanted = getattr(self, field), getattr(rule, field)
            if most is not None and wanted is not None and wanted > most:
                found.append(
                    (
                        field,
                        f"{_shown(field, wanted)} is more than the {_shown(field, most)} of "
                        f"lending.{field}",
                    )
                )
        longest = rule.max_time or self.max_time
        if rule.notice is not None and rule.notice > longest:
            found.append(
                (
                    "notice",
                    f"{format_duration(rule.notice)} is longer than the longest loan, "
                    f"{format_duration(longest)}",
                )
            )
        found += [
            ("software", f"{folder} is not among lending.software")
            for folder in rule.software or ()
            if folder not in self.software
        ]
        if rule.community and self.communities and rule.community not in self.communities:
            found.append(("community", f"{rule.community} is not among lending.communities"))
        for earlier, one in enumerate(self.rules[:number], start=1):
            if one.covers(rule):
                found.append(
                    ("", f"rule {earlier} takes everybody that this one is for, so it never counts")
                )
        return found


def _shown(field: str, value: int | timedelta) -> str:
    if isinstance(value, timedelta):
        return format_duration(value)
    return format_bytes(value) if field == "memory" else str(value)


class JobSettings(Frozen):
    """How this site's own jobs are placed: the strategy that ranks offers for those that name
    none, the order of those that wait, how often a lost one is sent out again, and how long the
    place of a running job may be out of reach before it counts as lost."""

    strategy: Strategy = Strategy.FIRST_FIT
    order: Order = Order.FIFO
    resubmit: Annotated[int, Field(ge=0, le=100)] = 2
    patience: Annotated[Duration, Field(gt=timedelta(0))] = timedelta(minutes=2)


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
    jobs: JobSettings = JobSettings()
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
        keys = [*first["loc"], *first.get("ctx", {}).get("at", ())]
        line = _line_of(text, [str(key) for key in keys])
        where = f"{path}, line {line}" if line else str(path)
        raise InvalidSpec(f"{where}: {_name(keys)}: {_expected(first)}.") from error


def _name(keys: Sequence[str | int]) -> str:
    """Return a place as a person would say it: list items are counted from 1."""
    return ".".join(str(key + 1) if isinstance(key, int) else key for key in keys)


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such setting; check its spelling"
    text = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return text if error["type"] == "contradiction" else f"{text} (found {error['input']!r})"


def _line_of(text: str, keys: list[str]) -> int | None:
    """Return the line where the last of ``keys`` is set within its section, if it is there.

    Items of a list of sections (``[[lending.rules]]``) are numbered from 0 in ``keys``.
    """
    section: list[str] = []
    seen: dict[str, int] = {}
    best = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[{1,2})\s*([^\[\]]+?)\s*\]", line):
            section = []
            for part in header.group(2).split("."):
                section.append(part.strip(" \"'"))
                if (name := ".".join(section)) in seen:
                    section.append(str(seen[name]))
            if header.group(1) == "[[":
                if section[-1].isdigit():
                    section.pop()
                name = ".".join(section)
                seen[name] = seen.get(name, -1) + 1
                section.append(str(seen[name]))
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
