"""What a supervisor sends: JSON frames, one a line, and after an ``output`` frame its bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from gridcloud.errors import Conflict

_CHUNK = 256 * 1024
#: A ``done`` frame names every output; this holds some hundred thousand of them.
MAX_FRAME_BYTES = 32 * 1024 * 1024


class Reader(Protocol):
    """The bytes a supervisor prints."""

    async def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, as soon as there are any; b"" at the end."""
        ...


async def frames(reader: Reader) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
    """Yield each frame, an ``output`` frame once for each part of its bytes, until the end.

    A frame that was cut off is left out. Raises `Conflict` for anything that is no frame: what
    answers so will do it again.
    """
    # Not by the streams' own readline: asyncio's fails at a limit, asyncssh's tears long lines.
    buffer = bytearray()
    looked_at = 0
    while True:
        end = buffer.find(b"\n", looked_at)
        if end < 0:
            looked_at = len(buffer)
            data = await reader.read(_CHUNK)
            if not data or looked_at > MAX_FRAME_BYTES:
                if looked_at and (data or not buffer.startswith(b"{")):
                    raise _not_a_frame(bytes(buffer[:200]))
                return
            buffer += data
            continue
        header = bytes(buffer[: end + 1])
        del buffer[: end + 1]
        looked_at = 0
        # A large one is read beside the loop, which must not wait for it.
        large = len(header) > _CHUNK
        frame, left = await asyncio.to_thread(_parse, header) if large else _parse(header)
        if not left:
            yield frame, b""
        while left > 0:
            data = bytes(buffer[:left]) or await reader.read(min(left, _CHUNK))
            del buffer[:left]
            if not data:
                return
            left -= len(data)
            yield frame, data


def _parse(header: bytes) -> tuple[dict[str, Any], int]:
    """Return a frame, and how many bytes follow it."""
    try:
        frame = json.loads(header)
        return frame, int(frame["size"]) if frame["event"] == "output" else 0
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_a_frame(header[:200]) from error


def _not_a_frame(found: bytes) -> Conflict:
    return Conflict(
        f"The machine answered with something else than the supervisor: {found!r}.",
        hint="Look for what is started at a login there and prints this.",
    )
