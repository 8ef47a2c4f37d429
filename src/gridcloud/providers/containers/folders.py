"""What a container has on this host: a folder for each lease.

    STATE/containers/LEASE/
        home/            mounted as the home; all that outlives a process
        kept/ends-at     seconds since 1970, mounted read-only: when the first process gives up
        facts.json       as whom commands run and where, for a site that was started anew
        seccomp.json     which system calls a guest may make, where the engine does not bound them
        ended.json       why this site ended it, if it did

All functions block for a few small file operations, but `remove` and `home_bytes`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from gridcloud.errors import InvalidSpec, NotFound, Unavailable
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import LeaseRole
from gridcloud.providers.containers.recipe import END_FILE, SECCOMP_FILE
from gridcloud.providers.local.keeper import Ended, folder_bytes
from gridcloud.providers.local.sandbox import remove_tree

_FACTS, _ENDED = "facts.json", "ended.json"
_LEASE_LIMIT = 64


class Facts(Frozen):
    """What must be known of a container to enter and to keep it. ``user`` is as the engine wants
    it, ``home`` where it is inside. An ``open`` one has no end of its own: the site moves it as
    long as it lives. ``disk_bytes`` bounds a guest's home; 0: nothing does."""

    user: str
    home: str
    role: LeaseRole
    open: bool = False
    disk_bytes: Annotated[int, Field(ge=0)] = 0


class _Word(Frozen):
    """Why a container was ended, as `write_ended` keeps it."""

    message: str


class Folder:
    """The folder of one lease; whether it is there or not."""

    def __init__(self, root: Path, lease_id: str) -> None:
        if "/" in lease_id or "\0" in lease_id or lease_id.startswith(".") or not lease_id:
            raise NotFound(f"There is no lease {lease_id[:_LEASE_LIMIT]!r}.")
        self.lease_id = lease_id
        self.path = root / lease_id

    @property
    def home(self) -> Path:
        """Where the home is on this host."""
        return self.path / "home"

    def prepare(self, facts: Facts, ends_at: datetime, owner: tuple[int, int] | None) -> None:
        """Make it, or take it as it is with a new end. Idempotent; raises `Unavailable`."""
        try:
            for path in (self.path, self.home, self.path / "kept"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # What another user reads in the container: nothing else is in it.
            (self.path / "kept").chmod(0o755)
            if owner:
                os.chown(self.home, *owner)
            (self.path / _ENDED).unlink(missing_ok=True)
            self._put(_FACTS, facts.model_dump_json())
        except OSError as error:
            raise Unavailable(
                f"The container's folder could not be made: {error}.",
                hint="Look at the disk, and at whose the site's state folder is.",
            ) from error
        self.move_end(ends_at)

    def move_end(self, ends_at: datetime) -> None:
        """Have the container last until then; it is noticed within seconds.

        Raises `NotFound` if there is none, `InvalidSpec` for a time without a zone.
        """
        if ends_at.tzinfo is None:
            raise InvalidSpec("The end of a lease needs a time zone.")
        if not (self.path / "kept").is_dir():
            raise NotFound(f"There is no container for {self.lease_id!r}.")
        try:
            self._put(f"kept/{END_FILE}", f"{int(ends_at.timestamp())}\n", mode=0o644)
        except OSError as error:
            raise Unavailable(f"The container's end could not be moved: {error}.") from error

    def end(self) -> datetime | None:
        """Return when it ends, None where that is not known."""
        try:
            text = (self.path / "kept" / END_FILE).read_text()
            return datetime.fromtimestamp(int(text), UTC)
        except (OSError, ValueError, OverflowError):
            return None

    def facts(self) -> Facts:
        """Return its facts; raises `NotFound`."""
        try:
            return Facts.model_validate_json((self.path / _FACTS).read_bytes())
        except (OSError, ValidationError) as error:
            raise NotFound(f"There is no container for {self.lease_id!r}.") from error

    def write_seccomp(self, profile: str) -> None:
        """Keep the profile of a guest's system calls, for the engine to read."""
        self._put(SECCOMP_FILE, profile)

    def write_ended(self, message: str) -> None:
        """Keep why this site ended it."""
        self._put(_ENDED, _Word(message=message).model_dump_json())

    def ended(self) -> str:
        """Return why this site ended it, empty if it did not."""
        try:
            return _Word.model_validate_json((self.path / _ENDED).read_bytes()).message
        except (OSError, ValidationError):
            return ""

    def home_bytes(self, pause: float) -> int:
        """Return the disk that its home takes. Blocks; ``pause`` seconds of rest between steps.

        Raises `keeper.Ended` for folders nested too deep to be walked.
        """
        for size in folder_bytes(str(self.home)):
            if size is not None:
                return size
            time.sleep(pause)
        return 0

    def remove(self) -> None:
        """Remove it, however what ran in it left it. Blocks; idempotent; raises `Unavailable`."""
        if not self.path.is_dir() or self.path.is_symlink():
            return
        try:
            remove_tree(self.path)
        except FileNotFoundError:
            return  # somebody else removed it at the same time
        except OSError as error:
            raise Unavailable(
                f"The container's folder could not be removed: {error}.",
                hint="Something may still be mounted there; it is tried again.",
            ) from error

    def over_disk(self, pause: float) -> str:
        """Return in words that the home is larger than its bound; empty if it is not. Blocks."""
        try:
            limit = self.facts().disk_bytes
            used = self.home_bytes(pause) if limit else 0
        except NotFound:
            return ""
        except Ended as ended:
            return str(ended.args[1])
        if used <= limit:
            return ""
        return f"Its files took {used >> 20} MiB of disk; the lease has {limit >> 20} MiB."

    def _put(self, name: str, text: str, mode: int = 0o600) -> None:
        # Replaced at once: no reader ever sees half of it.
        file = self.path / name
        new = file.with_name(f".{file.name}.new")
        new.write_text(text)
        new.chmod(mode)
        new.replace(file)


def folders(root: Path) -> Iterator[Folder]:
    """Yield the folders there are, sorted by lease."""
    if root.is_dir():
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield Folder(root, path.name)
