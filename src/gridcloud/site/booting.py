"""What a site lends its providers so that a machine becomes ready: see `providers.base.Making`."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gridcloud.access.keys import ephemeral, load_or_create, public_line
from gridcloud.access.session import SSHSession
from gridcloud.errors import Forbidden, InvalidSpec, TimedOut, Unavailable
from gridcloud.model.lease import Endpoint, Lease, LeaseRole
from gridcloud.model.machine import LaunchStep, MachineOrder
from gridcloud.providers.base import FirstBoot, MachineFacts
from gridcloud.setup.documents import decoded, read_user_data
from gridcloud.setup.first_boot import Told, joined, move_command
from gridcloud.setup.parts import Part
from gridcloud.setup.playbooks import Login, check_playbooks, run_playbook
from gridcloud.setup.scripts import Script, text_of
from gridcloud.site.keyring import Keyring
from gridcloud.site.on_machine import facts_of, last_line, run, run_as_root

_MACHINES = "machines"
#: How long one look at a machine waits there for news, and how much of its log it brings.
_LOOK_SECONDS = 5
_LOG_BYTES = 4096
#: How much of a boot log is noted while it grows; what is more is still there if it fails.
_MOST_NOTED = 64 * 1024
#: What cloud-init prints of every boot: its tables of addresses, and pictures of host keys.
_NOISE = re.compile(
    r"ci-info: |Generating public/private |Your (identification|public key) has been saved|"
    r"The key('s randomart image| fingerprint) is:|SHA256:|\+-+[\[+]|\|.*\|$"
)
_MOUNT_SECONDS = 300.0
_MOUNT, _BOOT_STATUS = text_of(Script.MOUNT), text_of(Script.BOOT_STATUS)
#: An end that was told before is kept only while there is so much left of it.
_SOON = timedelta(minutes=5)

#: Parts of cloud-init that are at work in many images unasked, and fail in some.
_ALWAYS = {
    *("apt_configure", "growpart", "grub_dpkg", "keys_to_console", "locale", "mounts", "ntp"),
    *("resizefs", "set_hostname", "ssh_authkey_fingerprints", "ubuntu_advantage", "ubuntu_drivers"),
    *("ubuntu_pro", "update_etc_hosts", "update_hostname"),
}

Note = Callable[[str, LaunchStep, str], Awaitable[None]]


class Booting:
    """Prepares the machines of leases. Idempotent by the lease; nothing blocks.

    ``session`` gives an SSH session to the machine of a lease; ``keep`` keeps an event of a launch.
    """

    def __init__(
        self,
        folder: Path,
        keyring: Keyring,
        session: Callable[[Lease, Endpoint], SSHSession],
        keep: Note,
    ) -> None:
        self._folder = folder / _MACHINES
        self._keyring = keyring
        self._session = session
        self._keep = keep

    async def check(self, order: MachineOrder) -> tuple[Part, ...]:
        """Look through an order before anything is planned or paid for; return its user-data.

        Raises `InvalidSpec`, with the line where there is one, for user-data that cloud-init would
        not understand and for playbooks that are none; `Unavailable` without Ansible for these.
        """
        await check_playbooks(order.playbooks)
        if not order.user_data:
            return ()
        return await asyncio.to_thread(read_user_data, decoded(order.user_data))

    async def first_boot(self, lease: Lease, user: str, limit: int) -> FirstBoot:
        """See `Making`. Looks at the playbooks as well, since nothing is paid for yet."""
        order = lease.order
        _refuse_playbooks_of_others(lease)
        parts = await self.check(order)
        path = self._host_key(lease.id)
        key = load_or_create(path)
        ends_at = self._first_end(lease)
        told = Told(
            lease_id=lease.id,
            user=user,
            ca_line=self._keyring.trusted_line(),
            host_key=path.read_text(),  # an export is another text each time
            hostname=order.name,
            ends_at=ends_at,
            lasts=ends_at - lease.created_at if ends_at else None,
        )
        document = await asyncio.to_thread(joined, parts, told, limit)
        return FirstBoot(user_data=document, host_keys=(public_line(key),))

    async def await_ready(self, lease: Lease, endpoint: Endpoint) -> MachineFacts:
        """See `Making`. The machine's log is noted as it grows."""
        session = self._session(lease, endpoint)
        try:
            await self._await_cloud_init(lease, endpoint, session)
            await self._tell_end(lease, endpoint, session)
            return await facts_of(session)
        except (Forbidden, TimedOut) as error:
            # While it boots, an SSH server may not have been told yet whom to let in and what to
            # show; nothing was said to it, and it is tried again.
            raise Unavailable(error.message, hint=error.hint) from error
        finally:
            await session.close()

    async def set_up(self, lease: Lease, endpoint: Endpoint, devices: Mapping[str, str]) -> None:
        """See `Making`."""
        _refuse_playbooks_of_others(lease)
        order = lease.order
        session = self._session(lease, endpoint)
        try:
            for volume in order.volumes:
                device = devices.get(volume.name, "")
                size = str(volume.size_bytes)
                arguments = (volume.name, device, volume.path, endpoint.user, size)
                said = await run_as_root(
                    session, endpoint.user, _MOUNT, *arguments, seconds=_MOUNT_SECONDS
                )
                await self.note(lease.id, LaunchStep.SETUP, said.strip())
        finally:
            await session.close()

        async def told(lines: str) -> None:
            await self.note(lease.id, LaunchStep.SETUP, lines[-65536:])

        for playbook in order.playbooks:
            await self.note(lease.id, LaunchStep.SETUP, f"running the playbook {playbook.path}")
            await run_playbook(playbook, endpoint, self._login(lease.id), told)

    async def move_end(self, lease: Lease, endpoint: Endpoint) -> None:
        """See `Making`."""
        session = self._session(lease, endpoint)
        try:
            await self._tell_end(lease, endpoint, session)
        finally:
            await session.close()

    async def note(self, lease_id: str, step: LaunchStep, message: str) -> None:
        """See `Making`."""
        await self._keep(lease_id, step, message)

    def kept(self) -> set[str]:
        """Return the leases for whose machines something is kept."""
        return {path.name for path in self._folder.glob("*")}

    def forget(self, lease_id: str) -> None:
        """Remove what is kept for a machine that is gone. Idempotent."""
        shutil.rmtree(self._host_key(lease_id).parent, ignore_errors=True)

    async def _await_cloud_init(
        self, lease: Lease, endpoint: Endpoint, session: SSHSession
    ) -> None:
        offset, noted = 0, 0
        while True:
            status, result, log = await _look(session, endpoint, offset, _LOOK_SECONDS)
            if (news := _worth_telling(log)) and noted < _MOST_NOTED:
                noted += len(news)
                await self.note(lease.id, LaunchStep.READY, news)
            offset = int(status["size"])
            match status["state"]:
                case "done":
                    await self._judge(lease, endpoint, session, result)
                    return
                case "absent" | "disabled" as state:
                    await self._without_cloud_init(lease, str(state))
                    return

    async def _judge(
        self, lease: Lease, endpoint: Endpoint, session: SSHSession, result: dict[str, Any]
    ) -> None:
        errors = result.get("errors")
        if not isinstance(errors, list) or not errors:
            return
        asked = await asyncio.to_thread(_text_of, lease)
        theirs = [error for error in map(str, errors) if _is_of(error, asked)]
        told = "; ".join(str(error)[:300] for error in (theirs or errors)[:5])
        if not theirs:
            await self.note(lease.id, LaunchStep.READY, f"cloud-init told of errors: {told}")
            return
        _, _, log = await _look(session, endpoint, 0, 0)
        raise InvalidSpec(
            f"What the user-data says failed on the machine: {told}.\n{log.strip()}",
            hint="The end of the machine's log is above. Mend the user-data, and start another.",
        )

    async def _without_cloud_init(self, lease: Lease, state: str) -> None:
        what = "has no cloud-init" if state == "absent" else "has its cloud-init switched off"
        if lease.order.user_data:
            raise InvalidSpec(
                f"The image {what}, so nothing was done of what the user-data says.",
                hint="Use another image, or a playbook instead.",
            )
        await self.note(lease.id, LaunchStep.READY, f"the image {what}")

    async def _tell_end(self, lease: Lease, endpoint: Endpoint, session: SSHSession) -> None:
        if lease.ends_at is None:
            return
        command = move_command(endpoint.user, lease.id, lease.ends_at, datetime.now(UTC))
        status, said = await run(session, command)
        if status:
            raise Unavailable(
                f"The machine could not be told its end: {last_line(said)}.",
                hint=f"It needs sudo for {endpoint.user} without a password.",
            )

    def _login(self, lease_id: str) -> Login:
        key = ephemeral()
        line = public_line(key)
        return Login(
            key=key.export_private_key("openssh").decode(),
            certificate=lambda: self._keyring.machine_certificate(lease_id, line),
        )

    def _host_key(self, lease_id: str) -> Path:
        return self._folder / lease_id / "host_key"

    def _first_end(self, lease: Lease) -> datetime | None:
        """Return the end that is in the user-data: the same whenever a launch goes on, since a
        cloud may refuse to repeat a call with another user-data."""
        if lease.ends_at is None:
            return None
        path = self._host_key(lease.id).with_name("first_end")
        try:
            kept = datetime.fromtimestamp(int(path.read_text()), UTC)
            if kept > datetime.now(UTC) + _SOON:
                return kept
        except (FileNotFoundError, ValueError):
            pass  # none was told, or it was not written whole: then no machine was made with it
        epoch = math.ceil(lease.ends_at.timestamp())
        path.write_text(str(epoch))
        return datetime.fromtimestamp(epoch, UTC)


def _refuse_playbooks_of_others(lease: Lease) -> None:
    # A playbook runs on this host as this user, and names files here.
    if lease.order.playbooks and lease.role is not LeaseRole.OWN:
        raise Forbidden(
            "A playbook of another site is not run here.",
            hint="Use user-data, or run the playbook yourself once the machine is ready.",
        )


def _text_of(lease: Lease) -> str:
    parts = read_user_data(decoded(lease.order.user_data))
    return "\n".join(part.data.decode(errors="replace") for part in parts)


def _is_of(error: str, asked: str) -> bool:
    """Whether an error of cloud-init comes from what was asked for, and not from the image.

    It is told as ``('module', Error(...))``.
    """
    if not asked:
        return False
    module = error.removeprefix("('").partition("'")[0].replace("-", "_")
    return module not in _ALWAYS or module in asked


async def _look(
    session: SSHSession, endpoint: Endpoint, offset: int, wait_seconds: int
) -> tuple[dict[str, Any], dict[str, Any], str]:
    arguments = (str(offset), str(wait_seconds), str(_LOG_BYTES))
    answer = await run_as_root(session, endpoint.user, _BOOT_STATUS, *arguments)
    status, result, log = _status(answer)
    if status["size"] - offset > _LOG_BYTES:
        log = log.partition("\n")[2]  # it begins within a line
    return status, result, log


def _status(answer: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Take apart what the look at a machine printed: its state, its result, its log."""
    first, _, rest = answer.partition("\n")
    second, _, log = rest.partition("\n")
    try:
        status = json.loads(first)
        result = json.loads(second).get("v1", {}) if second.strip() else {}
        if not isinstance(status["state"], str) or not isinstance(status["size"], int):
            raise TypeError("not a state")
        return status, result if isinstance(result, dict) else {}, log
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unavailable(
            f"The machine told nothing sensible of its boot: {first[:200]!r}.",
            hint="Log in there, and look what a command prints besides its output.",
        ) from error


def _worth_telling(log: str) -> str:
    """Return a piece of a boot's log without what tells nobody anything."""
    return "\n".join(line for line in log.splitlines() if not _NOISE.match(line)).strip()
