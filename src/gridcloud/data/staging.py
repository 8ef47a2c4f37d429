"""What goes into a job folder and what comes out of it."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
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
    files: Files, work: str, outputs: Sequence[tuple[str, int]], into: Path
) -> None:
    """Copy outputs, named relative to ``work``, to the same names below ``into``.

    Each appears whole or not at all. Raises `Forbidden` when a name would leave ``into``: the
    list comes from the machine, which may not be ours.
    """
    if not outputs:
        return
    targets = await asyncio.to_thread(_targets, work, outputs, into)

    async def fetch(one: tuple[str, Path, int]) -> None:
        await files.get(*one)

    await each(targets, fetch)


def _targets(
    work: str, outputs: Iterable[tuple[str, int]], into: Path
) -> list[tuple[str, Path, int]]:
    """Return what is copied from where to where. Blocks."""
    targets = [(f"{work}/{name}", confined(into, name), size) for name, size in outputs]
    into.mkdir(parents=True, exist_ok=True)
    return targets


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
