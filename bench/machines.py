"""From asking for a machine to being logged in: ``make bench`` runs it for LXD; for a whole
OpenStack, which takes minutes to come up, run ``machines.py openstack``.

Through us: `machine start` at a site with one cloud, until the site says that it is ready, which is
when somebody was logged in and cloud-init was done. Beside it: what else one would write, until the
same. For LXD that is a shell script with its own command line and ``ssh``; for OpenStack its SDK,
with a connection that is open already, and the same ``ssh``. Both make the same machine of the same
image; they take turns.
"""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rounds import Table, interleaved, ratio, told
from testbed import SiteProcess, wait_until

from gridcloud.model.fleet import MachineRequest, MachineState
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need
from testbeds import lxd as lxd_testbed

ROUNDS = 5
AIM = 1.1
PATIENCE = timedelta(minutes=10)
NEED = Need(cpus=1, memory_bytes=2**28, time=timedelta(minutes=30))
_LXC = """set -eu
lxc init -q "$IMAGE" bare --ephemeral -c limits.cpu=1 -c limits.memory=512MiB \
    -c user.user-data="$(cat user-data)"
lxc start -q bare
until ip=$(lxc list bare -c 4 --format csv | grep -o '^[0-9][0-9.]*'); do sleep 0.1; done
"""
_SSH = """
until ssh -q -i key -o BatchMode=yes -o ConnectTimeout=2 -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null "debian@$ip" cloud-init status --wait >/dev/null; do
    sleep 0.1
done
"""


@dataclass(frozen=True)
class Contest:
    """One cloud: the site's ``settings`` for a provider ``cloud``, the ``bare`` way to a machine,
    and how what is there is seen and removed."""

    name: str
    beside: str
    settings: str
    bare: Callable[[], None]
    left: Callable[[], object]
    clear: Callable[[], None]


def user_data(folder: Path) -> str:
    """Make a key pair in ``folder``; return what lets it in."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text().strip()
    return (
        "#cloud-config\nusers: [{name: debian, shell: /bin/bash, "
        f"sudo: 'ALL=(ALL) NOPASSWD:ALL', ssh_authorized_keys: ['{public}']}}]\n"
    )


@contextlib.contextmanager
def lxd(folder: Path) -> Iterator[Contest]:
    """Give the contest at an LXD."""
    with lxd_testbed.running() as server, server.project() as project:
        (folder / "user-data").write_text(user_data(folder))
        environment = os.environ | {
            "LXD_DIR": str(project.socket.parent),
            "LXD_CONF": str(folder),
            "IMAGE": project.image(),
        }
        switch = ["lxc", "project", "switch", project.name]
        subprocess.run(switch, env=environment, check=True, capture_output=True)
        yield Contest(
            name="LXD",
            beside="lxc and ssh",
            settings=f"""
kind = "lxd"
socket = "{project.socket}"
project = "{project.name}"
image = "{project.image()}"
user = "debian"
shapes.small = {{cpus = 1, memory = "512MiB"}}
""",
            bare=lambda: shell(_LXC + _SSH, folder, environment),
            left=project.left,
            clear=project.clear,
        )


@contextlib.contextmanager
def openstack(folder: Path) -> Iterator[Contest]:
    """Give the contest at an OpenStack, in a network and a security group that are there."""
    # It needs the SDK, which LXD does not.
    from testbeds.openstack.testbed import openstack_testbed  # noqa: PLC0415

    with openstack_testbed() as cloud, cloud.project() as project:
        (folder / "clouds.yaml").write_text(project.clouds_yaml())
        sdk, data = project.user, base64.b64encode(user_data(folder).encode()).decode()
        network = sdk.network.create_network(name="bench")
        sdk.network.create_subnet(network_id=network.id, ip_version=4, cidr=project.subnet)
        flavor = sdk.compute.find_flavor("m1.tiny")
        image = sdk.image.find_image("debian-12")

        def bare() -> None:
            made = sdk.compute.create_server(
                name="bare",
                flavor_id=flavor.id,
                image_id=image.id,
                networks=[{"uuid": network.id}],
                user_data=data,
                config_drive=True,
            )
            there = sdk.compute.wait_for_server(made, interval=0.25, wait=PATIENCE.seconds)
            (address,) = there.addresses["bench"]
            shell(_SSH, folder, os.environ | {"ip": address["addr"]})

        def clear() -> None:
            for server in sdk.compute.servers():
                sdk.compute.delete_server(server, ignore_missing=True)
            wait_until(lambda: not list(sdk.compute.servers()))

        yield Contest(
            name="OpenStack",
            beside="its SDK and ssh",
            settings=f"""
kind = "openstack"
cloud = "testbed"
clouds_file = "{folder / "clouds.yaml"}"
image = "debian-12"
flavors = ["m1.tiny"]
network = "bench"
security_groups = ["default"]
address = "fixed"
""",
            bare=bare,
            left=lambda: list(sdk.compute.servers()),
            clear=clear,
        )


def shell(script: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a script of Bash's."""
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True)


def compare(folder: Path, contest: Contest, table: Table) -> None:
    """Let both take turns, and print."""
    site = SiteProcess(folder / "site", "site", f"[providers.cloud]{contest.settings}")
    with contextlib.ExitStack() as stack:
        site.start()
        stack.callback(site.close)
        client = stack.enter_context(site.client())
        wait_until(lambda: client.providers()[0].capacity.cpus)

        def ours() -> float:
            began = time.perf_counter()
            request = MachineRequest(need=NEED, order=MachineOrder(name="ours"), provider="cloud")
            (made,) = client.start_machine(request)
            info = client.wait_machine(made.name, PATIENCE)
            seconds = time.perf_counter() - began
            if info.state is not MachineState.READY:
                raise SystemExit(f"the machine is {info.state}: {info.reason}")
            client.stop_machine(made.name)
            wait_until(lambda: not contest.left())
            return seconds

        def bare() -> float:
            began = time.perf_counter()
            contest.bare()
            seconds = time.perf_counter() - began
            contest.clear()
            return seconds

        found = interleaved({"ours": ours, "bare": bare}, ROUNDS)
    what = f"a machine at {contest.name}, ready (aim ≤ {AIM})"
    beside = f"{contest.beside} {told(found['bare'])}"
    table.add(what, told(found["ours"]), beside, ratio(found["ours"], found["bare"]))


def lacking(name: str) -> str:
    """Return why a contest cannot be held here; empty if it can."""
    if name == "lxd":
        return lxd_testbed.problem()
    try:
        from testbeds.openstack.testbed import lacking as lacks  # noqa: PLC0415 - needs the SDK
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed"
    return lacks()


def main(names: list[str]) -> None:
    """Measure, print."""
    table = Table()
    for name in names or ["lxd"]:
        if problem := lacking(name):
            table.skip(f"a machine at {name}, ready", problem)
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            {"lxd": lxd, "openstack": openstack}[name](Path(folder)) as contest,
        ):
            compare(Path(folder), contest, table)
    print(f"load {os.getloadavg()[0]:.1f}; medians, and minima in brackets")


if __name__ == "__main__":
    main(sys.argv[1:])
