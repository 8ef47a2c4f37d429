"""Changing the settings file while keeping its comments and order. Blocks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from gridcloud.errors import InvalidSpec, NotFound, Unavailable


def add_provider(file: Path, name: str, section: dict[str, Any]) -> None:
    """Write ``[providers.NAME]`` into the settings file, which is made if missing."""
    document = _read(file)
    providers = document.setdefault("providers", tomlkit.table(is_super_table=True))
    table = tomlkit.table()
    for key, value in section.items():
        table[key] = value
    providers[name] = table
    _write(file, document)


def remove_provider(file: Path, name: str) -> None:
    """Take ``[providers.NAME]`` out of the settings file."""
    document = _read(file)
    try:
        del document["providers"][name]
    except KeyError as error:
        raise NotFound(f"{file} has no [providers.{name}].") from error
    _write(file, document)


def _read(file: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return tomlkit.document()
    except (OSError, TOMLKitError) as error:
        raise InvalidSpec(f"{file} cannot be changed: {error}.") from error


def _write(file: Path, document: tomlkit.TOMLDocument) -> None:
    partial = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(tomlkit.dumps(document))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise Unavailable(f"{file} cannot be written: {error.strerror}.") from error
