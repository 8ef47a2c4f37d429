"""A plain machine reached by SSH: nothing on it but sshd and Python."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gridcloud.errors import GridcloudError
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint, Lease, Machine
from gridcloud.model.need import Resources
from gridcloud.model.written import Bytes
from gridcloud.providers.base import Capacity, MachineFacts, Provider, ProviderContext, read_section

_TRUST_A_PROBE_FOR = timedelta(minutes=5)
_RETRY_A_FAILED_PROBE_AFTER = timedelta(seconds=30)

HostKey = Annotated[str, Field(pattern=r"^(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( .*)?$")]


class SSHSection(Frozen):
    """``[providers.NAME]`` with ``kind = "ssh"``.

    ``host_keys`` are the public key lines the machine may show, as in its ``/etc/ssh/*.pub``;
    without one it is never used.
    ``identity`` is a private key file; without it the user's SSH agent and default keys serve.
    ``cpus``, ``memory`` and ``gpus`` bound what is used; without them all the machine has.
    """

    host: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[^\s@/-][^\s@/]*$")]
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s:-][^\s:]*$")]
    host_keys: Annotated[tuple[HostKey, ...], Field(min_length=1)]
    identity: Path | None = None
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None


class SSHProvider(Provider):
    """One machine that exists already. A lease takes a part of it; nothing is made or removed."""

    kind: ClassVar[str] = "ssh"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        super().__init__(name, section, context)
        self.section = read_section(SSHSection, name, section)
        self._facts: MachineFacts | None = None
        self._problem = ""
        self._known_until = 0.0
        self._looked = False
        self._look: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Where it is."""
        section = self.section
        return Endpoint(
            host=section.host, port=section.port, user=section.user, host_keys=section.host_keys
        )

    @property
    def identity(self) -> Path | None:
        """The private key file to log in with."""
        return self.section.identity.expanduser() if self.section.identity else None

    async def capacity(self) -> Capacity:
        """Return the machine's size as last seen. Only the first call waits for a look at it;
        later ones start a look in the background when it is time."""
        if monotonic() >= self._known_until and (self._look is None or self._look.done()):
            self._look = asyncio.create_task(self._look_there(), name=f"look at {self.name}")
        if self._look is not None and not self._looked:
            await asyncio.shield(self._look)
        section, facts = self.section, self._facts
        resources = Resources(
            cpus=section.cpus or (facts.cpus if facts else 0),
            memory_bytes=section.memory or (facts.memory_bytes if facts else 0),
            gpus=section.gpus if section.gpus is not None else (facts.gpus if facts else 0),
        )
        detail = f"{section.user}@{section.host}:{section.port}"
        if facts:
            detail += f", Python {facts.python}"
        known = facts is not None or None not in (section.cpus, section.memory, section.gpus)
        return Capacity(resources=resources, known=known, problem=self._problem, detail=detail)

    async def check(self) -> Capacity:
        """Log in and look, now."""
        await self.close()
        self._known_until, self._looked = 0.0, False
        return await self.capacity()

    async def close(self) -> None:
        """End a look that is under way."""
        look, self._look = self._look, None
        if look is not None:
            look.cancel()
            await asyncio.gather(look, return_exceptions=True)

    async def _look_there(self) -> None:
        try:
            self._facts = await self.context.probe(self.endpoint, self.identity)
            self._problem, trust = "", _TRUST_A_PROBE_FOR
        except GridcloudError as error:
            self._problem, trust = str(error), _RETRY_A_FAILED_PROBE_AFTER
        self._known_until = monotonic() + trust.total_seconds()
        self._looked = True

    async def launch(self, lease: Lease) -> Machine:
        """Return the machine; job folders lie below the login folder, one set for each site."""
        folder = f".gridcloud/{self.context.site_key[:16]}"
        return Machine(lease_id=lease.id, provider=self.name, folder=folder, endpoint=self.endpoint)

    async def terminate(self, lease_id: str) -> None:
        """Nothing was made for the lease; the executor removes its job folders."""

    async def made(self) -> list[str]:
        """Return nothing: the machine was there before."""
        return []
