"""From asking for a machine to being logged in: ``make bench`` runs it, or by itself.

Through us: `machine start` at a site whose cloud is an LXD, until the site says that it is ready,
which is when somebody was logged in and cloud-init was done. Beside it: a shell script with LXD's
own command line and ``ssh``, until the same. Both make the same container of the same image. They
take turns.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from rounds import Table, interleaved, ratio, told
from testbed import SiteProcess, wait_until

from gridcloud.model.fleet import MachineRequest, MachineState
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need
from testbeds import lxd as testbed

ROUNDS = 5
AIM = 1.1
PATIENCE = timedelta(minutes=5)
NEED = Need(cpus=1, memory_bytes=2**28, time=timedelta(minutes=30))
_SCRIPT = """set -eu
lxc init -q "$IMAGE" bare --ephemeral -c limits.cpu=1 -c limits.memory=512MiB \
    -c user.user-data="$(cat user-data)"
lxc start -q bare
until ip=$(lxc list bare -c 4 --format csv | grep -o '^[0-9][0-9.]*'); do sleep 0.1; done
until ssh -q -i key -o BatchMode=yes -o ConnectTimeout=2 -o StrictHostKeyChecking=no \
    -o UserKnownHostsFile=/dev/null "debian@$ip" cloud-init status --wait >/dev/null; do
    sleep 0.1
done
"""


@contextlib.contextmanager
def bare(folder: Path, project: testbed.Project) -> Iterator[dict[str, str]]:
    """Prepare what the script needs; give its environment."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text().strip()
    (folder / "user-data").write_text(
        "#cloud-config\nusers: [{name: debian, shell: /bin/bash, "
        f"sudo: 'ALL=(ALL) NOPASSWD:ALL', ssh_authorized_keys: ['{public}']}}]\n"
    )
    yield os.environ | {
        "LXD_DIR": str(project.socket.parent),
        "LXD_CONF": str(folder),
        "IMAGE": project.image(),
    }


def compare(folder: Path, project: testbed.Project, table: Table) -> None:
    """Let both take turns, and print."""
    settings = f"""
[providers.lxd]
kind = "lxd"
socket = "{project.socket}"
project = "{project.name}"
image = "{project.image()}"
user = "debian"
shapes.small = {{cpus = 1, memory = "512MiB"}}
"""
    site = SiteProcess(folder / "site", "site", settings)
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(bare(folder, project))
        subprocess.run(
            ["lxc", "project", "switch", project.name],
            env=environment,
            check=True,
            capture_output=True,
        )
        site.start()
        stack.callback(site.close)
        client = stack.enter_context(site.client())

        def ours() -> float:
            began = time.perf_counter()
            request = MachineRequest(need=NEED, order=MachineOrder(name="ours"), provider="lxd")
            (made,) = client.start_machine(request)
            info = client.wait_machine(made.name, PATIENCE)
            seconds = time.perf_counter() - began
            if info.state is not MachineState.READY:
                raise SystemExit(f"the machine is {info.state}: {info.reason}")
            client.stop_machine(made.name)
            wait_until(lambda: not project.left())
            return seconds

        def shell() -> float:
            began = time.perf_counter()
            subprocess.run(["bash", "-c", _SCRIPT], cwd=folder, env=environment, check=True)
            seconds = time.perf_counter() - began
            project.clear()
            return seconds

        found = interleaved({"ours": ours, "shell": shell}, ROUNDS)
    what = f"a machine at LXD, ready (aim ≤ {AIM})"
    beside = f"lxc and ssh {told(found['shell'])}"
    table.add(what, told(found["ours"]), beside, ratio(found["ours"], found["shell"]))


def main() -> None:
    """Measure, print."""
    table = Table()
    if problem := testbed.problem():
        table.skip("a machine at LXD, ready", problem)
        sys.exit(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        testbed.running() as server,
        server.project() as project,
    ):
        compare(Path(folder), project, table)
    print(f"load {os.getloadavg()[0]:.1f}; medians, and minima in brackets")


if __name__ == "__main__":
    main()
