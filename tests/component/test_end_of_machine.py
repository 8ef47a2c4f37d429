"""The dead-man's switch on a machine with systemd and real cloud-init, at LXD."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from gridcloud.errors import GridcloudError
from testbeds.preparing import PATIENCE, Preparing, endpoint_of, lease_of

pytestmark = [
    pytest.mark.component,
    pytest.mark.xdist_group("lxd"),
    pytest.mark.timeout(600),
]
USER_DATA = "#cloud-config\nruncmd: [[touch, /root/ran]]\n"


def _state(lxd):
    return lxd.query("GET", "/1.0/instances/one/state")


async def _address(lxd):
    async with asyncio.timeout(PATIENCE):
        while True:
            eth0 = (_state(lxd).get("network") or {}).get("eth0") or {"addresses": []}
            for address in eth0["addresses"]:
                if address["family"] == "inet":
                    return address["address"]
            await asyncio.sleep(0.2)


async def _again(site, lease, endpoint, command):
    """Run a command as soon as the machine is back."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await site.run(lease, endpoint, command)
            except GridcloudError:
                await asyncio.sleep(0.3)


async def test_the_switch_outlives_reboots_and_cloud_init(lxd, tmp_path):
    """It is there after a reboot with what it was told last, after one more without cloud-init, and
    then powers the machine off at its end with nobody to ask."""
    site = Preparing(tmp_path / "site")
    lease = lease_of(USER_DATA, name="node-7")
    first = await site.booting.first_boot(lease, "debian", 64 * 1024)
    told = f"user.user-data={first.user_data.decode('ascii')}"
    await asyncio.to_thread(lxd.lxc, "launch", lxd.image(), "one", "-c", told)
    running = SimpleNamespace(
        host=await _address(lxd),
        process=SimpleNamespace(poll=lambda: None),
        log=lambda: lxd.lxc("console", "one", "--show-log"),
    )
    endpoint = endpoint_of(running, first)
    facts = await site.ready(lease, endpoint, running)
    assert facts.hostname == "node-7"
    active = "systemctl is-active gridcloud-end && cat /var/lib/gridcloud/ends-at"
    _, before = await site.run(lease, endpoint, active)
    assert before.startswith("active\n")

    await asyncio.to_thread(lxd.lxc, "restart", "one")
    assert await _again(site, lease, endpoint, active) == (0, before)
    await site.run(lease, endpoint, "sudo -n touch /etc/cloud/cloud-init.disabled")
    await asyncio.to_thread(lxd.lxc, "restart", "one")
    waiting = "until systemctl -q is-active gridcloud-end; do sleep 0.2; done; "
    assert await _again(site, lease, endpoint, waiting + active) == (0, before)

    soon = lease.model_copy(update={"ends_at": datetime.now(UTC) + timedelta(seconds=2)})
    await site.booting.move_end(soon, endpoint)
    async with asyncio.timeout(PATIENCE):
        while _state(lxd)["status"] != "Stopped":
            await asyncio.sleep(0.3)
    assert datetime.now(UTC) >= soon.ends_at - timedelta(seconds=1)
