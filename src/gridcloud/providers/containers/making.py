"""Containers by their leases: made, started, entered and removed, each step idempotent.

A container's name is made of this site's key and the lease, so that a step can be done again
when no answer came; its labels say whose it is, to a site that has lost all else.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from gridcloud.errors import (
    Conflict,
    GridcloudError,
    InvalidSpec,
    NotFound,
    TimedOut,
    Unavailable,
)
from gridcloud.model.machine import VolumeMount
from gridcloud.model.things import SITE_TAG, Tags
from gridcloud.providers.containers import recipe
from gridcloud.providers.containers.engine import TRIES, Engine
from gridcloud.providers.containers.finding import find_engine
from gridcloud.providers.containers.recipe import Host
from gridcloud.providers.containers.streams import join
from gridcloud.providers.containers.volumes import Volumes

_START_SECONDS, _REMOVE_SECONDS = 20.0, 60.0
_POLL_SECONDS = 0.02
_PULL_TRIES = 3
NEEDS_PYTHON = "Use an image with Python 3.8 or newer, such as docker.io/library/python:3.12-slim."


class Containers:
    """The containers of one site at one engine, which is found when it is first needed.

    Nothing blocks; all errors are `GridcloudError`. Close it in the end.
    """

    def __init__(self, site_key: str, engine: str) -> None:
        self._site_key = site_key
        self._told = engine
        self._engine: Engine | None = None
        self._closed = False
        self._host: tuple[Host, dict[str, Any]] | None = None
        #: The named volumes of the site, to be listed, made and removed.
        self.volumes = Volumes(self.reach, site_key)

    async def close(self) -> None:
        """Let go of the engine, for good; containers go on. Idempotent."""
        self._closed = True
        if self._engine is not None:
            await self._engine.close()

    async def look(self) -> tuple[str, dict[str, Any]]:
        """Return where the engine is and its words about itself, having asked it once just now."""
        engine = await self.reach()
        try:
            _, info = await self.learn(tries=1)
            await engine.greet(tries=1)
        except GridcloudError:
            self._host = None  # what comes back may be another
            raise
        return str(engine.address), info

    async def enter(
        self,
        lease_id: str,
        command: str,
        descriptors: tuple[int, int, int],
        env: Mapping[str, str],
        user: str,
        folder: str,
    ) -> int:
        """Run a command line in a container on these descriptors; return its status."""
        engine = await self.reach()
        request = {
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "User": user,
            "Env": [f"{name}={value}" for name, value in env.items()],
            "WorkingDir": folder,
            "Cmd": ["/bin/sh", "-c", command],
        }
        try:
            made = await engine.call("POST", f"{self._path(lease_id)}/exec", body=request)
            exec_id = str(made["Id"])
            await join(*await engine.attach(exec_id), descriptors)
            return await self._exit_status(engine, exec_id)
        except (LookupError, TypeError, ValueError) as error:
            raise Unavailable("The container engine's answer makes no sense.") from error

    async def has_image(self, image: str, *, tries: int = TRIES) -> bool:
        """Whether an image is here."""
        try:
            await (await self.reach()).call("GET", f"/images/{image}/json", tries=tries)
        except NotFound:
            return False
        return True

    async def learn(self, tries: int = TRIES) -> tuple[Host, dict[str, Any]]:
        """Return what the engine and this process are, and the engine's own words; asked once."""
        if self._host is None:
            engine = await self.reach()
            called = await engine.greet(tries)
            info = await engine.call("GET", "/info", tries=tries)
            if not isinstance(info, dict):
                raise Unavailable("The container engine's answer makes no sense.")
            security = [str(each) for each in info.get("SecurityOptions") or ()]
            host = Host(
                uid=os.geteuid(),
                gid=os.getegid(),
                rootless=any(each.startswith("name=rootless") for each in security),
                podman="libpod" in called.lower(),
                selinux=any(each.startswith("name=selinux") for each in security),
                open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
                tasks=resource.getrlimit(resource.RLIMIT_NPROC)[1],
            )
            self._host = host, info
        return self._host

    async def sites(self) -> set[str]:
        """Return the sites of which there is a container or a volume."""
        engine = await self.reach()
        query = {"all": "true", "filters": json.dumps({"label": [SITE_TAG]})}
        found = await engine.call("GET", "/containers/json", query=query)
        there = found if isinstance(found, list) else []
        labels = [one.get("Labels") for one in there if isinstance(one, dict)]
        tags = [Tags.read(each) for each in labels if isinstance(each, dict)]
        return {each.site for each in tags if each} | await self.volumes.sites()

    async def ours(self) -> list[tuple[Tags, dict[str, str]]]:
        """Return tags and labels of every container of this site, running or not."""
        engine = await self.reach()
        site = Tags.of(self._site_key, "").site
        query = {"all": "true", "filters": json.dumps({"label": [f"{SITE_TAG}={site}"]})}
        found = await engine.call("GET", "/containers/json", query=query)
        ours = []
        for one in found if isinstance(found, list) else []:
            labels = one.get("Labels") or {} if isinstance(one, dict) else {}
            tags = Tags.read(labels)
            if tags is not None and tags.site == site:
                ours.append((tags, labels))
        return ours

    async def create(self, lease_id: str, request: dict[str, Any]) -> None:
        """Make a container, or find the one that was made before.

        Raises `NotFound` while its image (or what else it names) is not here, `Conflict` where its
        name is taken by a container that is not this site's.
        """
        engine = await self.reach()
        name = self._path(lease_id).rpartition("/")[2]
        try:
            await engine.call("POST", "/containers/create", query={"name": name}, body=request)
        except (Conflict, Unavailable) as error:
            # Made before, by a try of which no answer came; podman answers that with a 500.
            found = await self._inspect(lease_id)
            if found is None:
                raise
            if not self._is_mine(found, lease_id):
                raise Conflict(
                    f"There is a container {name} that is not this site's.",
                    hint="Remove or rename it.",
                ) from error

    async def start(self, lease_id: str, image: str) -> None:
        """Start a container; return when it runs. Raises `InvalidSpec` if it has no shell."""
        engine = await self.reach()
        try:
            await engine.call("POST", f"{self._path(lease_id)}/start", fine=(304,))
            give_up = monotonic() + _START_SECONDS
            while True:
                state = await self.state(lease_id)
                if state is None or state.get("Status") in ("exited", "dead", "removing"):
                    raise InvalidSpec(
                        f"A container of {image} ended as soon as it began.",
                        hint="The image must have /bin/sh with the programs date and sleep.",
                    )
                if state.get("Running"):
                    return
                if monotonic() > give_up:
                    raise TimedOut(
                        f"A container of {image} was not up within {_START_SECONDS:g} s.",
                        hint="Look at the engine's own log.",
                    )
                await asyncio.sleep(_POLL_SECONDS)
        except GridcloudError as error:
            # One that cannot be started removes itself, so that it is missing at the next try.
            cause = error.__cause__ if isinstance(error, NotFound) else None
            error = cause if isinstance(cause, GridcloudError) else error
            words = error.message.lower()
            if "/bin/sh" in words and ("not found" in words or "no such file" in words):
                raise InvalidSpec(
                    f"The image {image} has no /bin/sh, by which things are started in it.",
                    hint=NEEDS_PYTHON,
                ) from error
            raise error

    async def remove(self, lease_id: str) -> None:
        """Kill and remove a container; return when the engine knows it no more. Idempotent.

        One of that name that is not this site's is left alone.
        """
        engine = await self.reach()
        found = await self._inspect(lease_id)
        if found is not None and not self._is_mine(found, lease_id):
            return
        give_up = monotonic() + _REMOVE_SECONDS
        query = {"force": "true", "v": "true"}
        while True:
            try:
                await engine.call("DELETE", self._path(lease_id), query=query)
            except NotFound:
                return
            except Conflict:
                await asyncio.sleep(_POLL_SECONDS)  # it is being removed
            if monotonic() > give_up:
                raise TimedOut(
                    f"The container of {lease_id} could not be removed in {_REMOVE_SECONDS:g} s.",
                    hint="Look at the engine; it is tried again.",
                )

    async def state(self, lease_id: str) -> dict[str, Any] | None:
        """Return the engine's word on a container's state; None if there is none."""
        found = await self._inspect(lease_id)
        return None if found is None else found.get("State") or {}

    async def have_volume(self, tags: Tags, volume: VolumeMount) -> None:
        """Make a volume unless it is there; raises `InvalidSpec` for one to be found that is not.

        The engine does not bound its size.
        """
        engine = await self.reach()
        name = recipe.volume_name(tags, volume.name)
        try:
            await engine.call("GET", f"/volumes/{name}")
        except NotFound as error:
            if not volume.size_bytes:
                raise InvalidSpec(
                    f"There is no volume {volume.name!r} to be mounted at {volume.path}.",
                    hint=f"Give it a size to have it made, as in {volume.name}:10G:{volume.path}.",
                ) from error
            await self.volumes.make(volume.name, volume.size_bytes)

    async def fetch(self, image: str, seconds: float, tell: Callable[[str], None]) -> None:
        """Have the engine fetch an image, telling its progress. Idempotent.

        Raises `NotFound` with its registry's words, `TimedOut`.
        """
        engine = await self.reach()
        for tries_left in reversed(range(_PULL_TRIES)):
            try:
                return await engine.pull(image, tell, seconds)
            except GridcloudError:
                if await self.has_image(image):
                    return None  # it is here, whatever was said
                if not tries_left:
                    raise
        return None

    async def _exit_status(self, engine: Engine, exec_id: str) -> int:
        give_up = monotonic() + _START_SECONDS
        while True:
            found = await engine.call("GET", f"/exec/{exec_id}/json")
            if not found["Running"] and found.get("ExitCode") is not None:
                return int(found["ExitCode"])
            if monotonic() > give_up:
                raise Unavailable("The container engine does not say how the command ended.")
            await asyncio.sleep(_POLL_SECONDS)

    async def _inspect(self, lease_id: str) -> dict[str, Any] | None:
        engine = await self.reach()
        try:
            found = await engine.call("GET", f"{self._path(lease_id)}/json")
        except NotFound:
            return None
        if not isinstance(found, dict):
            raise Unavailable("The container engine's answer makes no sense.")
        return found

    async def reach(self) -> Engine:
        """Return the engine, found and not asked yet."""
        if self._engine is None:
            address = await asyncio.to_thread(find_engine, self._told)
            self._engine = self._engine or Engine(address)
            if self._closed:
                await self._engine.close()
        return self._engine

    def _is_mine(self, found: dict[str, Any], lease_id: str) -> bool:
        tags = Tags.read((found.get("Config") or {}).get("Labels") or {})
        mine = Tags.of(self._site_key, lease_id)
        return tags is not None and (tags.site, tags.lease) == (mine.site, mine.lease)

    def _path(self, lease_id: str) -> str:
        return f"/containers/gridcloud-{self._site_key[:12]}-{lease_id}"
