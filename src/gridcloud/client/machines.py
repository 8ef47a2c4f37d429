"""The asynchronous client's verbs about machines without a job, and about what clouds cost."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from gridcloud.model.accounts import (
    CostReport,
    NetworkInfo,
    NetworkReport,
    SweepReport,
    VolumeInfo,
    VolumeReport,
)
from gridcloud.model.asking import ProviderKind
from gridcloud.model.fleet import (
    LaunchNews,
    MachineInfo,
    MachineLogin,
    MachinePlan,
    MachineRequest,
)

T = TypeVar("T")
_WAIT_SECONDS = 30.0


class MachineVerbs:
    """Part of `gridcloud.client.AsyncClient`."""

    async def plan_machine(self, request: MachineRequest) -> MachinePlan:
        """Return where machines would be made, and what they would cost; changes nothing."""
        return await self._call(MachinePlan, "POST", "/machines/plan", request)

    async def start_machine(self, request: MachineRequest) -> list[MachineInfo]:
        """Begin to make machines; return once the site has written that down.

        They are made whether or not anybody waits: see `wait_machine` and `machine_events`.
        """
        return await self._call(list[MachineInfo], "POST", "/machines", request)

    async def machines(self, *, ended: bool = False) -> list[MachineInfo]:
        """Return the machines there are, the oldest first, without their user-data; with ``ended``
        those that were, too."""
        query = [("ended", str(ended).lower())]
        return await self._call(list[MachineInfo], "GET", "/machines", query=query)

    async def machine(self, name: str) -> MachineInfo:
        """Return a machine by its name or lease; the newest of that name."""
        return await self._call(MachineInfo, "GET", _path(name))

    async def wait_machine(self, name: str, timeout: timedelta | None = None) -> MachineInfo:
        """Return a machine once it is ready or over, or the timeout is."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds() if timeout is not None else None
        while True:
            left = _WAIT_SECONDS if deadline is None else max(0.0, deadline - loop.time())
            query = [("wait", str(min(left, _WAIT_SECONDS)))]
            found = await self._call(MachineInfo, "GET", _path(name), query=query)
            if found.state.settled or left == 0:
                return found

    async def machine_events(
        self, name: str, after: int = 0, *, wait: timedelta | None = None
    ) -> list[LaunchNews]:
        """Return what was said while a machine was made, oldest first; only events numbered above
        ``after``. Waits so long (a minute at most) for the first, while there may be one."""
        seconds = min(wait.total_seconds(), 60.0) if wait else 0.0
        query = [("after", str(after)), ("wait", str(seconds))]
        return await self._call(list[LaunchNews], "GET", _path(name, "/events"), query=query)

    async def boot_log(self, name: str) -> str:
        """Return the end of what a machine wrote to its console; empty where there is none."""
        found = await self._call(dict[str, str], "GET", _path(name, "/boot-log"))
        return found["text"]

    async def stop_machine(self, name: str) -> MachineInfo:
        """Begin to give a machine back, with all that is on it; idempotent, does not wait."""
        return await self._call(MachineInfo, "POST", _path(name, "/stop"))

    async def extend_machine(self, name: str, by: timedelta) -> MachineInfo:
        """Let a machine last longer than it would."""
        return await self._call(MachineInfo, "POST", _path(name, "/extend"), {"by": by})

    async def login_machine(self, name: str, public_key: str) -> MachineLogin:
        """Return a certificate for an OpenSSH public key, and where to log in with it."""
        body = {"public_key": public_key}
        return await self._call(MachineLogin, "POST", _path(name, "/login"), body)

    async def provider_kind(self, kind: str) -> ProviderKind:
        """Return what to ask who adds a provider of a kind."""
        return await self._call(ProviderKind, "GET", f"/provider-kinds/{quote(kind, safe='')}")

    async def volumes(self) -> VolumeReport:
        """Return the volumes of this site at its providers, asked anew."""
        return await self._call(VolumeReport, "GET", "/volumes")

    async def make_volume(self, name: str, size_bytes: int, provider: str = "") -> VolumeInfo:
        """Make a volume, at the only provider that has some if none is named."""
        body = {"name": name, "size_bytes": size_bytes, "provider": provider}
        return await self._call(VolumeInfo, "POST", "/volumes", body)

    async def remove_volume(self, name: str, provider: str = "") -> VolumeInfo:
        """Remove a volume and what is on it; return what it was."""
        query = [("provider", provider)]
        path = f"/volumes/{quote(name, safe='')}"
        return await self._call(VolumeInfo, "DELETE", path, query=query)

    async def networks(self) -> NetworkReport:
        """Return the networks that this site made by name, asked anew, and who can make some."""
        return await self._call(NetworkReport, "GET", "/networks")

    async def make_network(
        self, name: str, cidr: str, provider: str, region: str = ""
    ) -> NetworkInfo:
        """Make a network for machines that are to reach one another; idempotent."""
        body = {"name": name, "cidr": cidr, "provider": provider, "region": region}
        return await self._call(NetworkInfo, "POST", "/networks", body)

    async def remove_network(self, name: str, provider: str) -> None:
        """Remove a network that no machine is in; idempotent."""
        query = [("provider", provider)]
        await self._do("DELETE", f"/networks/{quote(name, safe='')}", query=query)

    async def sweep(
        self, *, dry_run: bool = True, all_sites: bool = False, remove_others: bool = False
    ) -> SweepReport:
        """Return what carries this site's tag at its providers; unless ``dry_run``, what no lease
        knows is removed. With ``all_sites`` also what other sites have there; with
        ``remove_others`` that is removed as well, whether it is in use or not."""
        body = {"dry_run": dry_run, "all_sites": all_sites, "remove_others": remove_others}
        return await self._call(SweepReport, "POST", "/sweep", body)

    async def costs(self, since: datetime | None = None) -> CostReport:
        """Return what the site's own machines at clouds cost, by month, provider and shape."""
        query = [("since", since.astimezone().isoformat())] if since else []
        return await self._call(CostReport, "GET", "/costs", query=query)

    @abstractmethod
    async def _do(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Sequence[tuple[str, str]] = (),
    ) -> bytes:
        """Ask the site; return the body of its answer."""

    async def _call(
        self,
        kind: type[T],
        method: str,
        path: str,
        body: object = None,
        *,
        query: Sequence[tuple[str, str]] = (),
    ) -> T:
        return TypeAdapter(kind).validate_json(await self._do(method, path, body, query=query))


def _path(name: str, rest: str = "") -> str:
    return f"/machines/{quote(name, safe='')}{rest}"
