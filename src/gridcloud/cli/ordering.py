"""Options that say what is asked of a machine besides its size."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.model.machine import MachineOrder, Playbook, VolumeMount

F = TypeVar("F", bound=Callable[..., Any])
_MOST_USER_DATA_BYTES = 700_000


def order_options(command: F) -> F:
    """Add the options that say what is asked of a machine that is made."""
    for option in (
        click.option("--spot", is_flag=True, help="Capacity that the cloud may take back."),
        click.option(
            "--volume",
            "volumes",
            multiple=True,
            metavar="NAME:SIZE:/MOUNT",
            help="Mount this volume, made if there is none, as data:20G:/data. Repeatable.",
        ),
        click.option(
            "--var",
            "variables",
            multiple=True,
            metavar="NAME=VALUE",
            help="A variable for the playbooks. Repeatable.",
        ),
        click.option(
            "--playbook",
            "playbooks",
            multiple=True,
            metavar="FILE",
            help="Run this Ansible playbook on it once it is there. Repeatable.",
        ),
        click.option(
            "--user-data",
            metavar="FILE",
            help="What cloud-init is to do at its first boot: a script, cloud-config, ...",
        ),
        click.option("--image", default="", help="The image to boot.  [default: the provider's]"),
    ):
        command = option(command)
    return command


def make_order(
    name: str,
    image: str,
    user_data: str | None,
    playbooks: tuple[str, ...],
    variables: tuple[str, ...],
    volumes: tuple[str, ...],
    *,
    spot: bool,
) -> MachineOrder:
    """Return the order that the options say, or end with an error that names the culprit."""
    from pydantic import ValidationError

    from gridcloud.model.machine import MachineOrder

    try:
        return MachineOrder(
            name=name,
            image=image,
            user_data=read_user_data(Path(user_data).expanduser(), f"--user-data {user_data}")
            if user_data
            else "",
            playbooks=_playbooks(playbooks, variables),
            volumes=tuple(map(_volume, volumes)),
            spot=spot,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).removesuffix("s").replace("_", "-")
        message = str(first["msg"]).removeprefix("Value error, ")
        hint = "A name has small letters, digits and '-', and at most 63 of them."
        raise InvalidSpec(
            f"--{option}: {message}.", hint=hint if option == "name" else ""
        ) from error


def read_user_data(path: Path, said: str) -> str:
    """Return a file's text; what is no text goes as base64, as `MachineOrder` says.

    ``said`` is how errors speak of it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidSpec(f"{said}: {error.strerror}.") from error
    if len(data) > _MOST_USER_DATA_BYTES:
        raise InvalidSpec(
            f"{said} has {len(data)} bytes; no cloud takes so much.",
            hint="Let it fetch what is large: '#include' and an address.",
        )
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()


def _playbooks(paths: tuple[str, ...], variables: tuple[str, ...]) -> tuple[Playbook, ...]:
    from gridcloud.model.machine import Playbook

    values: dict[str, str] = {}
    for variable in variables:
        name, given, value = variable.partition("=")
        if not given or not name:
            raise InvalidSpec(f"--var {variable}: write NAME=VALUE.")
        values[name] = value
    if values and not paths:
        raise InvalidSpec("--var is for a playbook, and there is none.", hint="Add --playbook.")
    found = []
    for path in paths:
        absolute = Path(os.path.normpath(Path.cwd() / Path(path).expanduser()))
        if not absolute.is_file():
            raise InvalidSpec(f"--playbook {path}: there is no such file.")
        found.append(Playbook(path=str(absolute), variables=values))
    return tuple(found)


def _volume(text: str) -> VolumeMount:
    from pydantic import ValidationError

    from gridcloud.model.machine import VolumeMount
    from gridcloud.model.quantities import parse_bytes

    hint = "Write NAME:SIZE:/MOUNT as data:20G:/data, or NAME:/MOUNT for one that is there."
    name, _, rest = text.partition(":")
    size, _, path = rest.rpartition(":")
    try:
        return VolumeMount(name=name, size_bytes=parse_bytes(size) if size else 0, path=path)
    except (ValidationError, InvalidSpec) as error:
        raise InvalidSpec(f"--volume {text} is no volume.", hint=hint) from error
