"""What goes into a job folder and what comes out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from gridcloud.data.at_once import each
from gridcloud.data.files import Files
from gridcloud.errors import Forbidden, InvalidSpec


def check_inputs(paths: Iterable[str]) -> None:
    """Refuse inputs that are missing, unreadable or neither file nor folder. Blocks.

    Raises `InvalidSpec` naming the first culprit, so that nothing is queued that cannot start.
    """
    for path in paths:
        for found in _walk(Path(path), ()):
            shown = os.fsencode(found).decode(errors="replace")
            try:
                mode = found.stat().st_mode
            except OSError as error:
                raise InvalidSpec(f"The input {shown} cannot be used: {error.strerror}.") from error
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InvalidSpec(f"The input {shown} is neither a file nor a folder.")
            wanted = os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)
            if not os.access(found, wanted):
                raise InvalidSpec(f"The input {shown} may not be read by this site.")


def total_bytes(paths: Iterable[str]) -> int:
    """Return the size of all files in some inputs. Blocks; what cannot be looked at counts 0."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError, InvalidSpec):  # it fails, with its cause, when copied
            total += sum(found.stat().st_size for found in _walk(Path(path), ()) if found.is_file())
    return total


def check_into(path: str) -> None:
    """Refuse a place for outputs that cannot be written to. Blocks. Raises `InvalidSpec`."""
    into = Path(path)
    there = next(folder for folder in (into, *into.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise InvalidSpec(f"Outputs cannot go into {into}: {there} is not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidSpec(f"Outputs cannot go into {into}: this site may not write to {there}.")


def _walk(path: Path, around: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield a path and all in it, links followed; ``around`` tells the folders it is in."""
    yield path
    if path.is_dir():
        found = path.stat()
        if (me := (found.st_dev, found.st_ino)) in around:
            shown = os.fsencode(path).decode(errors="replace")
            raise InvalidSpec(f"The input {shown} is a link that leads round in a circle.")
        for inner in path.iterdir():
            yield from _walk(inner, (*around, me))


async def stage_in(files: Files, inputs: Iterable[str], work: str) -> None:
    """Copy every input into the work folder. Idempotent: what is there is written again."""
    for path in inputs:
        await files.put(Path(path), work)


async def stage_out(
    files: Files,
    work: str,
    outputs: Sequence[tuple[str, int]],
    into: Path,
    patterns: Sequence[str],
) -> None:
    """Copy outputs, named relative to ``work``, to the same names below ``into``.

    Each appears whole or not at all. Raises `Forbidden`, before anything is copied, for a name
    that no pattern asked for or that would leave ``into``: the list comes from the machine, which
    may not be ours.
    """
    if not outputs:
        return
    for name, _ in outputs:
        if not any(asked_for(pattern, name) for pattern in patterns):
            raise Forbidden(f"The machine sent {name!r}, which was not asked for.")
    targets = await asyncio.to_thread(_targets, work, outputs, into)

    async def fetch(one: tuple[str, Path, int]) -> None:
        await files.get(*one)

    await each(targets, fetch)


def _targets(
    work: str, outputs: Iterable[tuple[str, int]], into: Path
) -> list[tuple[str, Path, int]]:
    """Return what is copied from where to where. Blocks."""
    targets = [(f"{work}/{name}", confined(into, name), size) for name, size in outputs]
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Forbidden(f"The folder {into} for outputs cannot be made: {error.strerror}.") from (
            error
        )
    return targets


def asked_for(pattern: str, name: str) -> bool:
    """Whether an output of that name is what the pattern asks for, or lies beneath that.

    By the supervisor's own rules: ``**`` stands for any folders, ``*`` and ``?`` for no leading
    dot. Checked again here, since the names come from a machine that may not be ours.
    """
    return _matches([part for part in pattern.split("/") if part not in ("", ".")], name.split("/"))


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return True
    if not path:
        return all(part == "**" for part in pattern)
    first, rest = pattern[0], pattern[1:]
    hidden = path[0].startswith(".") and not first.startswith(".")
    if first == "**":
        return _matches(rest, path) or (not hidden and _matches(pattern, path[1:]))
    here = first == path[0] or (not hidden and fnmatchcase(path[0], first))
    return here and _matches(rest, path[1:])


def confined(into: Path, name: str) -> Path:
    """Return ``into/name``; raises `Forbidden` unless it stays inside, links resolved."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise Forbidden(f"The machine names an output {name!r} that leaves the folder {into}.")
    target = into / path
    inside = os.path.realpath(into)
    if os.path.commonpath([inside, os.path.realpath(target.parent)]) != inside:
        raise Forbidden(f"{target.parent} is a link that leads out of {into}; nothing was written.")
    return target
