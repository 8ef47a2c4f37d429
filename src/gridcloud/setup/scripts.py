"""The shell scripts that are run on machines: POSIX sh, on any Linux."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent


class Script(StrEnum):
    """What there is: each file says what it does, and which arguments it takes."""

    END = "end.sh"
    PREPARE = "prepare.sh"
    MOUNT = "mount.sh"
    BOOT_STATUS = "boot_status.sh"


@cache
def text_of(script: Script) -> str:
    """Return a script without its comments, which are for those who read it here."""
    lines = (_HERE / script).read_text().splitlines()
    kept = (line for line in lines if not line.lstrip().startswith("# ") and line.strip())
    return "".join(f"{line}\n" for line in kept)
