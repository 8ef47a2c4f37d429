"""Reads a stack's file, and the files that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.model.stack import Stack

_MOST_BYTES = 2**20


def read_stack(path: str) -> tuple[Stack, dict[str, str]]:
    """Return a stack, and for each file that it names what `StackMachine.order` needs of it.

    Raises `InvalidSpec` with the line or the place of what is wrong.
    """
    from gridcloud.cli.ordering import read_user_data
    from gridcloud.model.stack import Stack, StackFile

    file = Path(path).expanduser()
    found = Stack.of(StackFile.read(_parsed(file)))
    files: dict[str, str] = {}
    for machine in found.machines:
        if machine.user_data:
            beside = file.parent / machine.user_data
            said = f"machines.{machine.name}.user-data {machine.user_data}"
            files[machine.user_data] = read_user_data(beside, said)
        for playbook in machine.playbooks:
            beside = (file.parent / playbook).absolute()
            if not beside.is_file():
                raise InvalidSpec(
                    f"machines.{machine.name}.playbooks: there is no {playbook!r} beside {path}."
                )
            files[playbook] = str(beside)
    return found, files


def _parsed(file: Path) -> object:
    import tomllib

    import yaml

    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InvalidSpec(f"{file} is too large for a stack.")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidSpec(f"{file} cannot be read: {cause}.") from error
    try:
        return tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpec(f"{file}: {error}.") from error
    except yaml.YAMLError as error:
        raise InvalidSpec(f"{file}: {' '.join(str(error).split())}.") from error
