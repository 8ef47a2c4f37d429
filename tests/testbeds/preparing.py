"""What of a site prepares machines, without the rest of it."""

import asyncio
from datetime import UTC, datetime, timedelta

from gridcloud.access.connect import Credentials, connect
from gridcloud.access.session import SSHSession
from gridcloud.errors import Unavailable
from gridcloud.model.lease import Endpoint, Lease, LeaseRole, LeaseState
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need
from gridcloud.site.booting import Booting
from gridcloud.site.keyring import Keyring

PATIENCE = 150.0


class Preparing:
    """Keys, what prepares machines by them, and what that noted."""

    def __init__(self, folder):
        self.keyring = Keyring(folder / "keys")
        self.notes = []
        self.booting = Booting(folder, self.keyring, self.session, self.note)

    def session(self, lease, endpoint, lease_id=""):
        async def dial():
            key, certificate = self.keyring.machine_login(lease_id or lease.id)
            return await connect(endpoint, Credentials(key=key, certificate=certificate))

        return SSHSession(dial)

    async def note(self, lease_id, step, message):
        self.notes.append((str(step), message))

    async def ready(self, lease, endpoint, machine):
        """Try as a launch does, until it is ready or fails for good."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await self.booting.await_ready(lease, endpoint)
                except Unavailable:
                    assert machine.process.poll() is None, machine.log()
                    await asyncio.sleep(0.3)

    async def run(self, lease, endpoint, command, **more):
        """Run a command; return its status and output."""
        session = self.session(lease, endpoint, **more)
        try:
            async with session.process(command) as process:
                output = await process.stdout.read()
                await process.wait_closed()
                return process.exit_status, output.decode().strip()
        finally:
            await session.close()


def lease_of(user_data="", lasts=timedelta(hours=1), **order):
    now = datetime.now(UTC)
    return Lease(
        id="lease-1",
        role=LeaseRole.OWN,
        state=LeaseState.INTENT,
        provider="cloud",
        need=Need(),
        created_at=now,
        ends_at=now + lasts,
        order=MachineOrder(user_data=user_data, **order),
    )


def endpoint_of(machine, first, user="debian"):
    return Endpoint(host=machine.host, user=user, host_keys=first.host_keys)
