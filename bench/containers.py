"""Twenty containers at once: ``make bench`` runs it, or by itself.

Through us: a provider launches leases side by side and enters each once it is ready. Beside it:
``podman run --detach`` by as many processes of a shell, and ``podman exec``. Both make the same
containers, of the same image, with the same bounds, on the same podman. They take turns.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rounds import Table, interleaved, ratio, told

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.containers import ContainersProvider
from gridcloud.settings import LendingSettings
from testbeds import podman as testbed

COUNT = 20
ROUNDS = 5
AIM = 1.2
NEED = Need(cpus=1, memory_bytes=2**27)
#: What a shell would say for the same confinement.
BOUNDS = (
    *("--network", "none", "--memory", "128m", "--memory-swap", "128m", "--cpus", "1"),
    *("--pids-limit", "4096", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--read-only", "--tmpfs", "/tmp:rw,size=128m"),
)


def lease() -> Lease:
    """Return a lease for a small container."""
    now = datetime.now(UTC)
    return Lease(
        id=new_id(16),
        role=LeaseRole.OWN,
        state=LeaseState.INTENT,
        provider="bench",
        need=NEED,
        created_at=now,
        ends_at=now + timedelta(minutes=10),
    )


async def through_us(provider: ContainersProvider) -> float:
    """Return the seconds until all are ready and were entered; they are removed after."""
    leases = [lease() for _ in range(COUNT)]
    null = os.open(os.devnull, os.O_RDWR)

    async def one(wanted: Lease) -> None:
        await provider.launch(wanted)
        assert await provider.enter(wanted.id, "true", (null,) * 3, {}) == 0

    began = time.perf_counter()
    try:
        await asyncio.gather(*map(one, leases))
        return time.perf_counter() - began
    finally:
        os.close(null)
        await asyncio.gather(*(provider.terminate(each.id) for each in leases))


def by_shell(engine: testbed.Engine, folder: Path) -> float:
    """Return the seconds that a shell takes for the same; they are removed after."""
    names = [f"bench-{number}" for number in range(COUNT)]
    podman = f"podman --tmpdir {engine.folder / 'tmp'}"
    parts = []
    for name in names:
        home = folder / name
        home.mkdir(exist_ok=True)
        run = " ".join([podman, "run", "--detach", "--name", name, *BOUNDS])
        run += f" --volume {home}:/home/guest {testbed.IMAGE} sleep 600 >/dev/null"
        parts.append(f"({run} && {podman} exec {name} true) &")
    script = "\n".join([*parts, "wait"])
    began = time.perf_counter()
    subprocess.run(["/bin/sh", "-c", script], env=engine.environment, check=True)
    seconds = time.perf_counter() - began
    engine.cli("rm", "--force", "--time", "0", *names)
    return seconds


def main() -> None:
    """Measure, and print a table."""
    table = Table()
    if why := testbed.missing():
        table.skip(f"{COUNT} containers ready", why)
        return
    folder = Path(tempfile.mkdtemp(prefix="gridcloud-bench-"))
    try:
        with testbed.podman() as engine, asyncio.Runner() as runner:
            context = ProviderContext(new_id(64), folder, LendingSettings(), probe=None)
            section = {"image": testbed.IMAGE, "engine": engine.address, "network": "none"}
            provider = ContainersProvider("bench", section, context)
            found = interleaved(
                {
                    "us": lambda: runner.run(through_us(provider)),
                    "podman": lambda: by_shell(engine, folder),
                },
                ROUNDS,
            )
            runner.run(provider.close())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ours, others = found["us"], found["podman"]
    what = f"{COUNT} containers made and entered, at once"
    table.add(what, told(ours), f"podman run and exec {told(others)}", ratio(ours, others))
    print(f"the aim is a ratio of at most {AIM}")


if __name__ == "__main__":
    main()
