"""An account at any cloud that Libcloud has a usable driver for."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from libcloud.compute.base import Node, NodeDriver, NodeImage, NodeLocation, NodeSize
from libcloud.compute.providers import get_driver
from libcloud.compute.types import NodeState

from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import MACHINE, Tags, Thing
from gridcloud.providers.cloud.clouds import Build, Cloud, Condition, Image, Server
from gridcloud.providers.libcloud.dialects import arguments, dialect
from gridcloud.providers.libcloud.errors import translated
from gridcloud.providers.libcloud.section import LibcloudSection

T = TypeVar("T")

_MIB = 1024**2
_THREADS = 16
_REQUEST_SECONDS = 30
_LONGEST_SECRET = 64 * 1024
_NEAR = 5
_NAME = re.compile(r"gridcloud-([0-9a-f]{32})-([a-z0-9]+)")
_CONDITIONS = {
    NodeState.RUNNING: Condition.RUNNING,
    NodeState.REBOOTING: Condition.RUNNING,
    NodeState.ERROR: Condition.FAILED,
    NodeState.STOPPED: Condition.STOPPED,
    NodeState.STOPPING: Condition.STOPPED,
    NodeState.SUSPENDED: Condition.STOPPED,
    NodeState.PAUSED: Condition.STOPPED,
}


class LibcloudCloud(Cloud):
    """See `Cloud`. A place is a location of the cloud.

    What the drivers have in common is little: neither tags nor tokens. So a machine's name holds
    its site and lease, its end is kept nowhere, and of two that were made at once the later is
    removed. There are no volumes, and no networks but the cloud's own.
    """

    shows_late_seconds: ClassVar[float] = 5.0

    def __init__(self, section: LibcloudSection, site_key: str) -> None:
        self._section, self._dialect = section, dialect(section.driver)
        self._site = Tags.of(site_key, "").site
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="libcloud")
        self._own = threading.local()
        self._closed = False
        if self._dialect.needs_ssh_key and not section.ssh_key:
            raise InvalidSpec(
                f"{section.driver} makes no machine without an SSH key.",
                hint="Name one with ssh_key in the settings; gridcloud does not use it.",
            )

    @property
    def user_data_limit(self) -> int:  # type: ignore[override] # it depends on the driver
        """The most user-data it takes, in bytes."""
        return self._dialect.user_data_limit

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. The sizes of the settings, in each location that has them."""
        sizes = await self._ask("list_sizes", lambda driver: driver.list_sizes())
        locations = await self._locations()
        return tuple(
            self._shape(size, location)
            for size in sizes
            if any(fnmatchcase(str(size.id), pattern) for pattern in self._section.sizes)
            and self._cpus(size) > 0
            for location in locations
            if self._has(location, size)
        )

    async def headroom(self, region: str) -> Headroom:
        """See `Cloud`. Libcloud knows no quotas; they show when a machine is made."""
        return Headroom()

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """See `Cloud`. The location of the shape."""
        return (shape.region,)

    async def image(self, wanted: str, shape: Shape) -> Image:
        """See `Cloud`. An image's id, name or slug, with ``*`` for any text."""
        wanted = wanted or self._section.image
        found = await self._image(wanted)
        extra = found.extra if isinstance(found.extra, dict) else {}
        least = extra.get("min_disk_size")
        return Image(
            id=str(found.id),
            name=str(found.name)[:255],
            user="root",
            disk_bytes=least * GIB if isinstance(least, int) else 0,
        )

    async def network(self, tags: Tags, place: str) -> str:
        """See `Cloud`. It is the cloud's own; nothing is made."""
        return ""

    async def create(self, build: Build) -> str:
        """See `Cloud`."""
        lease_id = build.tags.lease
        if there := await self._nodes(lease_id):
            return str(there[0].id)
        image = await self._image(build.image.id)
        told: dict[str, Any] = dict(self._dialect.more)
        told[self._dialect.user_data] = _text(build.user_data)
        if self._section.ssh_key and self._dialect.ssh_keys:
            told[self._dialect.ssh_keys] = [self._section.ssh_key]
        size = await self._one("list_sizes", build.shape.name)
        if self._dialect.zoned:
            told["location"] = await self._one("list_locations", build.place)
        name = f"gridcloud-{self._site}-{lease_id}"
        made = await self._ask(
            "create_node",
            lambda driver: driver.create_node(name=name, size=size, image=image, **arguments(told)),
        )
        kept, *others = await self._nodes(lease_id) or [made]
        await self._destroy(others)
        return str(kept.id)

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`."""
        for node in await self._nodes(lease_id):
            addresses = [*node.public_ips, *node.private_ips]
            return Server(
                id=str(node.id),
                condition=_CONDITIONS.get(node.state, Condition.BUILDING),
                address=str(addresses[0]) if addresses else "",
            )
        return None

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`. There is none."""
        return ""

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`."""
        there = await self._nodes(lease_id)
        await self._destroy(there)
        return not there

    async def remove_others(self, lease_id: str) -> None:
        """See `Cloud`."""
        await self._destroy((await self._nodes(lease_id))[1:])

    async def things(self) -> list[Thing]:
        """See `Cloud`."""
        found = []
        for node in await self._nodes():
            if named := _NAME.fullmatch(str(node.name)):
                tags = Tags(site=self._site, lease=named[2])
                found.append(Thing(kind=MACHINE, id=str(node.id), tags=tags))
        return found

    async def sites(self) -> set[str]:
        """See `Cloud`."""
        found = await self._ask("list_nodes", lambda driver: driver.list_nodes())
        return {named[1] for node in found if (named := _NAME.fullmatch(str(node.name)))}

    async def close(self) -> None:
        """See `Cloud`."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _nodes(self, lease_id: str = "") -> list[Node]:
        """Return this site's machines, or a lease's; in an order that is always the same."""
        found = await self._ask("list_nodes", lambda driver: driver.list_nodes())
        mine = []
        for node in found:
            named = _NAME.fullmatch(str(node.name))
            if (
                named
                and named[1] == self._site
                and lease_id in {"", named[2]}
                and node.state is not NodeState.TERMINATED
            ):
                mine.append(node)
        return sorted(
            mine, key=lambda node: (str(node.created_at or ""), len(str(node.id)), str(node.id))
        )

    async def _destroy(self, nodes: list[Node]) -> None:
        for node in nodes:
            with contextlib.suppress(NotFound):  # another attempt was faster
                await self._ask("destroy_node", partial(_destroyed, node))

    async def _locations(self) -> list[NodeLocation | None]:
        if not self._dialect.zoned:
            return [None]
        found = await self._ask("list_locations", lambda driver: driver.list_locations())
        wanted = self._section.locations
        hits = [one for one in found if not wanted or {str(one.id), one.name} & set(wanted)]
        if wanted and not hits:
            names = ", ".join(sorted(str(one.id) for one in found)) or "none"
            raise InvalidSpec(
                f"There is no location {', '.join(wanted)}.", hint=f"There are: {names}."
            )
        return list(hits)

    async def _one(self, what: str, wanted: str) -> Any:
        """Return the size or the location of an id."""
        found = await self._ask(what, lambda driver: getattr(driver, what)())
        for one in found:
            if str(one.id) == wanted:
                return one
        raise NotFound(f"The cloud has no {wanted!r} any more.", hint="Choose another.")

    async def _image(self, wanted: str) -> NodeImage:
        if not wanted:
            raise InvalidSpec(
                "No image is named to boot from.", hint="Name one with --image or in the settings."
            )
        found = await self._ask("list_images", lambda driver: driver.list_images())
        hits = [
            image for image in found if any(fnmatchcase(word, wanted) for word in _words(image))
        ]
        if not hits:
            names = sorted({word for image in found for word in _words(image)[1:]})
            near = difflib.get_close_matches(wanted, names, _NEAR) or names[:_NEAR]
            raise NotFound(
                f"There is no image {wanted!r}.",
                hint=f"There are for instance: {', '.join(near)}." if near else "There are none.",
            )
        return max(hits, key=lambda image: (str(image.extra.get("created_at")), str(image.id)))

    def _shape(self, size: NodeSize, location: NodeLocation | None) -> Shape:
        hourly = self._dialect.hourly and size.price
        return Shape(
            name=str(size.id),
            region=str(location.id) if location is not None else "",
            resources=Resources(cpus=self._cpus(size), memory_bytes=int(size.ram) * _MIB),
            disk_bytes=int(size.disk or 0) * GIB,
            price=float(size.price) if hourly else None,
            currency=self._section.currency if hourly else "",
        )

    def _cpus(self, size: NodeSize) -> int:
        told = (size.extra or {}).get(self._dialect.cpus)
        return int(told) if told and size.ram else 0

    def _has(self, location: NodeLocation | None, size: NodeSize) -> bool:
        if location is None or not self._dialect.locations:
            return True
        return location.id in (size.extra.get(self._dialect.locations) or ())

    async def _ask(self, doing: str, work: Callable[[NodeDriver], T]) -> T:
        """Return what a driver's method returns, called once, in a thread."""
        if self._closed:
            raise Unavailable("The provider was closed.", hint="Start the site again.")

        def call() -> T:
            try:
                return work(self._driver())
            except GridcloudError:
                raise
            except Exception as error:  # drivers raise bare Exceptions, too
                raise translated(error, doing) from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _driver(self) -> NodeDriver:
        """Return this thread's driver; Libcloud's connections are for one thread each."""
        told = dict(self._section.arguments)
        told |= {name: _secret(where) for name, where in self._section.secrets.items()}
        kept = getattr(self._own, "kept", None)
        if kept is None or kept[0] != told:
            self._own.kept = kept = told, self._made(told)
        driver: NodeDriver = kept[1]
        return driver

    def _made(self, told: dict[str, Any]) -> NodeDriver:
        try:
            driver = get_driver(self._dialect.provider)(**told)
        except (TypeError, ValueError) as error:
            raise InvalidSpec(
                f"Libcloud's driver {self._section.driver} does not take these arguments.",
                hint=f"It was given {', '.join(told) or 'none'}; see Libcloud's page of it.",
            ) from error
        driver.connection.timeout = _REQUEST_SECONDS
        if self._section.endpoint:
            parts = urlsplit(self._section.endpoint)
            secure = parts.scheme == "https"
            driver.connection.secure, driver.connection.host = secure, parts.hostname or ""
            driver.connection.port = parts.port or (443 if secure else 80)
        driver.connection.connection = None  # it was prepared without these
        return driver


def _destroyed(node: Node, driver: NodeDriver) -> bool:
    return driver.destroy_node(node)


def _words(image: NodeImage) -> list[str]:
    extra = image.extra if isinstance(image.extra, dict) else {}
    return [str(image.id), str(image.name), *([str(extra["slug"])] if extra.get("slug") else [])]


def _text(user_data: bytes) -> str:
    try:
        return user_data.decode()
    except UnicodeDecodeError as error:
        raise InvalidSpec(
            "This cloud takes user-data as text only.", hint="Make it shorter, or less compressed."
        ) from error


def _secret(where: str) -> str:
    """Return a secret from where the settings say it is; it is never shown."""
    kind, _, name = where.partition(":")
    try:
        if kind == "env":
            found = os.environ.get(name, "")
        else:
            with Path(name).expanduser().open() as file:
                found = file.read(_LONGEST_SECRET).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Forbidden(f"The secret in {name} cannot be read.", hint="Look at it.") from error
    if not found:
        raise Forbidden(f"There is no secret in {where}.", hint="Set it, and try again.")
    return found
