"""The regions of one account at EC2, asked over Libcloud's signed connection, once each time.

Libcloud's own methods know neither client tokens nor tags in the call that makes a thing, so what
is asked is said here as EC2's API has it, and its XML is read into dictionaries, lists and texts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlencode, urlsplit

from libcloud.compute.drivers.ec2 import EC2NodeDriver, EC2Response

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.providers.libcloud.credentials import Credentials, Source
from gridcloud.providers.libcloud.errors import Refused, not_understood, translated
from gridcloud.providers.libcloud.section import EC2Section

#: Libcloud tells types of some of its parts only.
_Driver: Any = EC2NodeDriver

T = TypeVar("T")

_REQUEST_SECONDS = 30
_THREADS = 32
_MOST_PAGES = 200
_FORM = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}

Json = dict[str, Any]


class Regions:
    """The regions of the settings, or the one of the user's profile. Requests run in threads."""

    def __init__(self, section: EC2Section) -> None:
        self._section, self._source = section, Source(section.profile)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ec2")
        self._own = threading.local()
        self._names: tuple[str, ...] = section.regions
        self._closed = False

    async def names(self) -> tuple[str, ...]:
        """Return their names; raises `InvalidSpec` if there is none."""
        if not self._names:
            self._names = (await self.in_thread(self._source.region),)
        return self._names

    async def all(self) -> list[Region]:
        """Return them."""
        return [Region(self, name) for name in await self.names()]

    async def named(self, name: str) -> Region:
        """Return one; raises `NotFound` if it is none of the settings'."""
        if name not in (names := await self.names()):
            raise NotFound(
                f"There is no region {name!r} in the settings.", hint=f"It has: {', '.join(names)}."
            )
        return Region(self, name)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what blocking work returns."""
        if self._closed:
            raise Unavailable("The provider was closed.", hint="Start the site again.")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def request(self, region: str, action: str, params: Mapping[str, str]) -> Json:
        """Make one request and return its answer. Blocks; raises `GridcloudError`."""
        told = {"Action": action, **params}
        try:
            connection: Any = self.driver(region).connection
            if action.startswith("Describe"):
                answer = connection.request("/", params=told, retry_failed=False)
            else:
                # User-data would make a URL too long; and what changes something is not cached.
                body = urlencode(told | {"Version": connection.version})
                answer = connection.request(
                    "/", data=body, headers=_FORM, method="POST", retry_failed=False
                )
            read = _read(answer.object)
        except GridcloudError:
            raise
        except Exception as error:  # Libcloud raises bare Exceptions, too
            raise translated(error, action) from error
        if not isinstance(read, dict):
            raise not_understood(action)
        return read

    def driver(self, region: str) -> EC2NodeDriver:
        """Return this thread's driver; Libcloud's connections are for one thread each."""
        credentials = self._source.credentials()
        kept: dict[str, tuple[Credentials, EC2NodeDriver]] = self._own.__dict__
        if region not in kept or kept[region][0] != credentials:
            kept[region] = credentials, _driver(region, credentials, self._section.endpoint)
        return kept[region][1]

    def close(self) -> None:
        """Give up threads, without waiting for what is under way. Idempotent."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


class Region:
    """One region. `ask` makes one request; its errors are `GridcloudError`."""

    def __init__(self, regions: Regions, name: str) -> None:
        self._regions, self.name = regions, name

    async def ask(self, action: str, **params: Any) -> Json:
        """Return the answer to one request. Parameters may be nested; lists are numbered."""
        flat = flattened(params)
        return await self._regions.in_thread(lambda: self._regions.request(self.name, action, flat))

    async def listed(self, action: str, what: str, **params: Any) -> list[Json]:
        """Return everything in a list, of all its pages."""
        found: list[Json] = []
        for _ in range(_MOST_PAGES):
            answer = await self.ask(action, **params)
            page = items(answer, what)
            found += page
            following = answer.get("nextToken")
            if not following:
                break
            params["NextToken"] = following
        return found

    async def delete(self, action: str, **params: Any) -> None:
        """Delete something. What is not there is as good as deleted."""
        try:
            await self.ask(action, **params)
        except NotFound:
            return

    async def blocking(self, work: Callable[[], T]) -> T:
        """Return what blocking work returns."""
        return await self._regions.in_thread(work)


def filters(wanted: Mapping[str, str | list[str]]) -> list[Json]:
    """Return filters of a Describe call."""
    return [
        {"Name": name, "Value": [value] if isinstance(value, str) else value}
        for name, value in wanted.items()
    ]


def items(answer: Mapping[str, Any], what: str) -> list[Json]:
    """Return a list in an answer, of dictionaries; an empty one where there is none."""
    found = answer.get(what)
    if not found:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise not_understood(f"a list of {what}")
    return found


def flattened(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as EC2's query API has them: ``Filter.1.Value.2``."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        match value:
            case dict():
                flat |= flattened(value, f"{prefix}{name}.")
            case list() | tuple():
                numbered = {str(number): one for number, one in enumerate(value, 1)}
                flat |= flattened(numbered, f"{prefix}{name}.")
            case bool():
                flat[f"{prefix}{name}"] = str(value).lower()
            case _:
                flat[f"{prefix}{name}"] = str(value)
    return flat


class _Answer(EC2Response):
    """Keeps the status and the code of an error, which Libcloud's own makes one text."""

    def parse_error(self) -> NoReturn:
        raise Refused.read(int(self.status), str(self.body), self.headers)


def _driver(region: str, credentials: Credentials, endpoint: str) -> EC2NodeDriver:
    more: Json = {}
    if endpoint:
        parts = urlsplit(endpoint)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        more = {"secure": secure, "host": parts.hostname, "port": port}
    try:
        driver = _Driver(
            credentials.key,
            credentials.secret,
            region=region,
            token=credentials.token or None,
            signature_version="4",
            timeout=_REQUEST_SECONDS,
            **more,
        )
    except ValueError as error:
        raise InvalidSpec(
            f"There is no region {region!r}, or this Libcloud does not know it yet.",
            hint=f"It knows: {', '.join(sorted(_Driver.list_regions()))}.",
        ) from error
    driver.connection.responseCls = _Answer
    return driver  # type: ignore[no-any-return]


def _read(element: Any) -> Json | list[Any] | str:
    """Return XML as values: children that are all items are a list, others a dictionary."""
    children = list(element) if element is not None and not isinstance(element, str) else []
    if not children:
        return str(getattr(element, "text", element) or "")
    if all(_name(child) == "item" for child in children):
        return [_read(child) for child in children]
    return {_name(child): _read(child) for child in children}


def _name(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]
