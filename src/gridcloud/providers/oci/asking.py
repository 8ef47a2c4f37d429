"""The regions of one account at Oracle Cloud, asked through its SDK, once each time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import oci
from oci.core import BlockstorageClient, ComputeClient, VirtualNetworkClient
from oci.identity import IdentityClient
from oci.limits import LimitsClient

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.providers.oci.credentials import Login, Source
from gridcloud.providers.oci.errors import not_understood, translated
from gridcloud.providers.oci.section import OCISection

T = TypeVar("T")

_THREADS = 32
#: To connect, and for each piece of an answer.
_TIMEOUTS = (10.0, 40.0)
_MOST_PAGES = 500
#: The SDK's clients, and the word of each in a host's name.
_SERVICES: dict[str, tuple[Callable[..., Any], str]] = {
    "compute": (ComputeClient, "iaas"),
    "network": (VirtualNetworkClient, "iaas"),
    "disks": (BlockstorageClient, "iaas"),
    "identity": (IdentityClient, "identity"),
    "limits": (LimitsClient, "limits"),
}


class Regions:
    """The regions of the settings, or the one of the user's profile. Requests run in threads."""

    def __init__(self, section: OCISection) -> None:
        self._section, self._source = section, Source(section)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="oci")
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, str], tuple[Login, Any]] = {}
        self._names: tuple[str, ...] = section.regions
        self._compartment = section.compartment
        self._closed = False

    async def all(self) -> list[Region]:
        """Return them; raises `InvalidSpec` if there is none."""
        if not self._names or not self._compartment:
            login = await self.in_thread(self._source.login)
            self._compartment = self._compartment or login.tenancy
            self._names = self._names or ((login.region,) if login.region else ())
        if not self._names:
            raise InvalidSpec(
                "No region is named.", hint='Name some, as regions = ["eu-frankfurt-1"].'
            )
        return [Region(self, name, self._compartment) for name in self._names]

    async def named(self, name: str) -> Region:
        """Return one; raises `NotFound` if it is none of the settings'."""
        regions = {region.name: region for region in await self.all()}
        if name not in regions:
            raise NotFound(
                f"There is no region {name!r} in the settings.",
                hint=f"It has: {', '.join(regions)}.",
            )
        return regions[name]

    async def tenancy(self) -> str:
        """Return the id of the account, which limits belong to."""
        return (await self.in_thread(self._source.login)).tenancy

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what blocking work returns."""
        if self._closed:
            raise Unavailable("The provider was closed.", hint="Start the site again.")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def request(
        self, region: str, service: str, method: str, args: tuple[Any, ...], more: Mapping[str, Any]
    ) -> Any:
        """Make one request and return the SDK's response. Blocks; raises `GridcloudError`."""
        try:
            return getattr(self._client(region, service), method)(*args, **more)
        except GridcloudError:
            raise
        except Exception as error:  # the SDK lets ValueError and its like of others through
            raise translated(error, method.replace("_", " ")) from error

    def close(self) -> None:
        """Give up threads, without waiting for what is under way. Idempotent."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _client(self, region: str, service: str) -> Any:
        login = self._source.login()
        with self._lock:
            kept = self._clients.get((region, service))
            if kept is None or kept[0] is not login:
                kept = login, self._made(region, service, login)
                self._clients[region, service] = kept
            return kept[1]

    def _made(self, region: str, service: str, login: Login) -> Any:
        kind, word = _SERVICES[service]
        more: dict[str, Any] = {}
        if self._section.endpoint:
            told = self._section.endpoint.replace("{service}", word).replace("{region}", region)
            more["service_endpoint"] = told
        return kind(
            {**login.config, "region": region},
            signer=login.signer,
            timeout=_TIMEOUTS,
            retry_strategy=oci.retry.NoneRetryStrategy(),
            circuit_breaker_strategy=oci.circuit_breaker.NoCircuitBreakerStrategy(),
            **more,
        )


class Region:
    """One region. Its errors are `GridcloudError`; what it returns are the SDK's models."""

    def __init__(self, regions: Regions, name: str, compartment: str) -> None:
        self._regions, self.name, self.compartment = regions, name, compartment

    async def ask(self, service: str, method: str, *args: Any, **more: Any) -> Any:
        """Return the answer to one request, a method of the SDK's client of a service."""
        return (await self._response(service, method, args, more)).data

    async def listed(self, service: str, method: str, *args: Any, **more: Any) -> list[Any]:
        """Return everything in a list, of all its pages."""
        found: list[Any] = []
        for _ in range(_MOST_PAGES):
            response = await self._response(service, method, args, more)
            if not isinstance(response.data, list):
                raise not_understood(method)
            found += response.data
            following = response.headers.get("opc-next-page")
            if not following:
                return found
            more["page"] = following
        # A list with a hole would hide what is in it.
        raise not_understood(f"{method} has more than {_MOST_PAGES} pages")

    async def delete(self, service: str, method: str, *args: Any, **more: Any) -> None:
        """Delete something. What is not there is as good as deleted."""
        try:
            await self._response(service, method, args, more)
        except NotFound:
            return

    async def tenancy(self) -> str:
        """Return the id of the account."""
        return await self._regions.tenancy()

    async def _response(
        self, service: str, method: str, args: tuple[Any, ...], more: Mapping[str, Any]
    ) -> Any:
        work = partial(self._regions.request, self.name, service, method, args, dict(more))
        return await self._regions.in_thread(work)
