"""What goes into a job folder and what comes out of it."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from gridcloud.data.files import Files
from gridcloud.errors import Forbidden, InvalidSpec

_COPIES_AT_ONCE = 8


def check_inputs(paths: Iterable[str]) -> None:
    """Refuse inputs that are missing, unreadable or neither file nor folder. Blocks.

    Raises `InvalidSpec` naming the first culprit, so that nothing is queued that cannot start.
    """
    for path in paths:
        for found in _walk(Path(path)):
            try:
                mode = found.stat().st_mode
            except OSError as error:
                raise InvalidSpec(f"The input {found} cannot be used: {error.strerror}.") from error
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InvalidSpec(f"The input {found} is neither a file nor a folder.")
            wanted = os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)
            if not os.access(found, wanted):
                raise InvalidSpec(f"The input {found} may not be read by this site.")


def _walk(top: Path) -> Iterator[Path]:
    yield top
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        identity = Path(folder).stat()
        if (key := (identity.st_dev, identity.st_ino)) in seen:
            raise InvalidSpec(f"The input {top} holds a link that leads round in a circle.")
        seen.add(key)
        yield from (Path(folder) / name for name in (*folders, *files))


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
    targets = [(f"{work}/{name}", confined(into, name), size) for name, size in outputs]
    if targets:
        await asyncio.to_thread(into.mkdir, parents=True, exist_ok=True)
    gate = asyncio.Semaphore(_COPIES_AT_ONCE)

    async def fetch(source: str, target: Path, size: int) -> None:
        async with gate:
            await files.get(source, target, size)

    try:
        async with asyncio.TaskGroup() as group:
            for source, target, size in targets:
                group.create_task(fetch(source, target, size))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


def confined(into: Path, name: str) -> Path:
    """Return ``into/name``; raises `Forbidden` unless it stays inside, links resolved."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise Forbidden(f"The machine names an output {name!r} that leaves the folder {into}.")
    target = into / path
    inside = os.path.realpath(into)
    if not os.path.realpath(target.parent).startswith((inside + "/", inside)):
        raise Forbidden(f"{target.parent} is a link that leads out of {into}; nothing was written.")
    return target
