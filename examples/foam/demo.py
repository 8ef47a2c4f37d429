"""The foam analysis on a grid of three sites on this machine: ``make demo``.

Starts a laptop, a university and an institute, each a site of its own with its own keys, state
and ports; founds a community; lets the other two join by invitation; makes the volumes; runs the
three steps for each volume as jobs handed in at the laptop; and takes everything down again. Over
400 lines in one file, so that it can be read from top to bottom.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gridcloud import AsyncClient
from gridcloud.errors import GridcloudError
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.need import Need
from gridcloud.model.quantities import parse_bytes

HERE = Path(__file__).resolve().parent
STEPS = ("check", "segment", "analyse")
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED = ("done", "discarded", "failed")
#: site → CPUs it has; the laptop keeps to itself, the others lend all they have
SITES = {"laptop": 1, "university": 2, "institute": 1}
START_WITHIN_SECONDS = 60
STOP_WITHIN_SECONDS = 60

console = Console()


def settings(name: str) -> str:
    """Return the settings of one site."""
    lines = [f'name = "{name}"', "[providers.local]", f"cpus = {SITES[name]}", 'memory = "8G"']
    if name != "laptop":
        lines += [
            "[lending]",
            "enabled = true",
            'max_time = "1h"',
            'disk = "4G"',
            f"software = [{json.dumps(sys.prefix)}]",  # this Python with NumPy and friends
        ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and its like to the end of the block: no process starts and is forgotten."""
    came: list[int] = []
    before = [signal.signal(number, lambda got, _: came.append(got)) for number in ENDINGS]
    try:
        yield
    finally:
        for number, handler in zip(ENDINGS, before, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@dataclass
class Site:
    """One site as a process of its own; it ends when its standard input does."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        """Where it keeps its keys, store and sandboxes."""
        return self.folder / "state"

    def start(self) -> None:
        """Start the daemon; its log goes into its folder."""
        self.folder.mkdir(parents=True)
        file = self.folder / "settings.toml"
        file.write_text(settings(self.name))
        names = {"GRIDCLOUD_STATE": str(self.state), "GRIDCLOUD_SETTINGS": str(file)}
        with (self.folder / "site.log").open("wb") as log, uninterrupted():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gridcloud", "serve", "--ephemeral"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | names,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends its sites
            )

    async def client(self) -> AsyncClient:
        """Return an open client of the site once it answers."""
        deadline = time.monotonic() + START_WITHIN_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(GridcloudError):
                return await AsyncClient(state=self.state, start=False).__aenter__()
            if self.process is not None and self.process.poll() is not None:
                break
            await asyncio.sleep(0.05)
        log = (self.folder / "site.log").read_text(errors="replace")
        raise SystemExit(f"{self.name} did not start:\n{log}")

    def stop(self) -> None:
        """Tell it to end: it cancels its jobs and takes back what it lent."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def wait(self) -> None:
        """Wait for its end; kill it if it does not come."""
        if self.process is None:
            return
        try:
            self.process.wait(STOP_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            console.print(f"[red]{self.name} did not stop in time and is killed[/]")
            self.process.kill()
            self.process.wait()


@dataclass
class Volume:
    """One volume on its way through the steps."""

    path: Path
    step: str = "check"
    state: str = ""
    sites: list[str] = field(default_factory=list)
    seconds: float = 0.0
    porosity: float | None = None
    pores: int | None = None
    radius: float | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.path.stem


class Run:
    """The three steps for every volume, as jobs of the laptop."""

    def __init__(self, laptop: AsyncClient, volumes: list[Path], results: Path) -> None:
        self._laptop = laptop
        self._results = results
        self.volumes = [Volume(path) for path in volumes]

    async def all(self) -> None:
        """Take every volume through its steps, side by side, showing the table meanwhile."""
        with Live(self.table(), console=console, refresh_per_second=4) as live:
            tasks = [asyncio.create_task(self._one(volume)) for volume in self.volumes]
            try:
                while True:
                    done, _ = await asyncio.wait(tasks, timeout=0.25)
                    live.update(self.table())
                    if len(done) == len(tasks):
                        break
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _one(self, volume: Volume) -> None:
        name, into = volume.name, self._results
        checked = await self._step(volume, "check", ["check_porosity.py", volume.path], "*ed/*")
        if not checked:
            return
        accepted = next((into / "accepted").glob(f"{name}*"), None)
        verdict = accepted or next((into / "discarded").glob(f"{name}*"))
        with contextlib.suppress(ValueError, KeyError):
            volume.porosity = json.loads(verdict.read_text())["porosity"]
        if accepted is None:
            volume.step, volume.state = "discarded", "too few pores"
            return
        segmented = into / f"{name}_segmented.npy"
        arguments = ["segment.py", volume.path]
        if not await self._step(volume, "segment", arguments, segmented.name):
            return
        arguments = ["analyse_pores.py", segmented, "--volume", volume.path]
        if not await self._step(volume, "analyse", arguments, f"{name}_pores.*"):
            return
        found = json.loads((into / f"{name}_pores.json").read_text())
        volume.porosity, volume.pores = found["porosity"], found["number_of_pores"]
        volume.radius = found["mean_radius"]
        volume.step, volume.state = "done", "COMPLETED"

    async def _step(
        self, volume: Volume, step: str, arguments: list[str | Path], outputs: str
    ) -> bool:
        """Run one script as a job; return whether it completed."""
        inputs = [HERE / str(arguments[0]), *(a for a in arguments[1:] if isinstance(a, Path))]
        command = [a.name if isinstance(a, Path) else a for a in arguments]
        spec = JobSpec(
            command=("python", *command, "--into", "."),
            name=f"{step} {volume.name}",
            need=Need(cpus=1, memory_bytes=parse_bytes("1500M"), time=timedelta(minutes=10)),
            env=dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            shell_env={"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
            inputs=tuple(str(path) for path in inputs),
            outputs=(outputs,),
            into=str(self._results),
        )
        began = time.monotonic()
        volume.step = step
        (job,) = await self._laptop.submit(spec)
        while not job.state.final:
            (job,) = await self._laptop.wait(job.id, timedelta(seconds=0.5))
            volume.state = job.state.value
            if job.site:
                volume.sites = [*volume.sites[: STEPS.index(step)], job.site]
        volume.seconds += time.monotonic() - began
        return await self._ended(volume, job)

    async def _ended(self, volume: Volume, job: Job) -> bool:
        if job.state is JobState.COMPLETED:
            return True
        said = b"".join([data async for data in self._laptop.logs(job.id, stream="stderr")])
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        volume.step = "failed"
        volume.state = f"{job.state}: {job.message} {' '.join(last)}"
        return False

    def table(self) -> Table:
        """Return the table of all volumes."""
        done = sum(volume.step in ENDED for volume in self.volumes)
        table = Table(title=f"foam analysis on three sites: {done} of {len(self.volumes)} volumes")
        for name in ("volume", "site that served it", "state", "time", "porosity", "pores"):
            table.add_column(name, justify="right" if name in ("time", "pores") else "left")
        table.add_column("mean radius", justify="right")
        for volume in self.volumes:
            table.add_row(
                volume.name,
                " → ".join(dict.fromkeys(volume.sites)),
                volume.state if volume.step in ENDED else f"{volume.step}: {volume.state}",
                f"{volume.seconds:.1f} s" if volume.seconds else "",
                "" if volume.porosity is None else f"{volume.porosity:.3f}",
                "" if volume.pores is None else str(volume.pores),
                "" if volume.radius is None else f"{volume.radius:.2f}",
            )
        return table


def make_volumes(arguments: argparse.Namespace, into: Path) -> list[Path]:
    """Make the volumes, as an instrument would have, and return their files."""
    subprocess.run(
        [
            sys.executable,
            HERE / "make_volumes.py",
            *("--count", str(arguments.volumes)),
            *("--size", str(arguments.size)),
            *("--seed", str(arguments.seed)),
            *("--into", into),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return sorted(into.glob("foam_*.npy"))


def clear(results: Path) -> None:
    """Make the folder for results, and take away what an earlier demo left in it."""
    results.mkdir(parents=True, exist_ok=True)
    for pattern in ("foam_*", "accepted/foam_*", "discarded/foam_*", "summary.csv"):
        for path in results.glob(pattern):
            path.unlink()


def summarise(run: Run, results: Path) -> Path:
    """Write the table as CSV and return its path."""
    file = results / "summary.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["volume", "sites", "state", "seconds", "porosity", "number_of_pores", "mean_radius"]
        )
        for v in run.volumes:
            sites = " ".join(dict.fromkeys(v.sites))
            state = v.step if v.step == "discarded" else v.state
            writer.writerow(
                [v.name, sites, state, f"{v.seconds:.1f}", v.porosity, v.pores, v.radius]
            )
    return file


def leftovers(base: Path) -> list[str]:
    """Return the processes that still have to do with the demo's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
                environment = (entry / "environ").read_bytes()
                if str(base) in command or os.fsencode(base) in environment:
                    found.append(f"{entry.name}: {command}")
    return found


@contextlib.contextmanager
def three_sites(base: Path) -> Iterator[dict[str, Site]]:
    """Start the sites; whatever happens, end them and see that nothing is left of them."""
    sites = {name: Site(name, base / name) for name in SITES}
    try:
        for site in sites.values():
            site.start()
        yield sites
    finally:
        for number in ENDINGS:  # the end is not to be cut short
            signal.signal(number, signal.SIG_IGN)
        console.print("stopping the three sites …")
        for site in sites.values():  # the laptop first: it gives back what the others lent
            site.stop()
            site.wait()
        left = leftovers(base)
        sandboxes = [p for s in sites.values() for p in (s.state / "sandboxes").glob("*")]
        if left or sandboxes:
            console.print(f"[red]left behind:[/] {left} {sandboxes}")
        else:
            console.print("nothing is left behind: no process, no sandbox, no lease")
            shutil.rmtree(base)


async def analyse(arguments: argparse.Namespace, sites: dict[str, Site], data: Path) -> bool:
    """Form the community and run the analysis; return whether all went well."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for name, site in sites.items():
            clients[name] = await site.client()
            stack.push_async_exit(clients[name])
        laptop = clients["laptop"]
        await laptop.create_community("foam")
        for name in ("university", "institute"):
            invitation = await laptop.invite("foam")
            await clients[name].join_community(invitation.code)
            lending = (await clients[name].site()).lending
            if lending.startswith("not offered"):
                console.print(f"[yellow]{name} lends nothing on this machine:[/] {lending}")
        for member in await laptop.members("foam"):
            console.print(f"  {member.site_name:12}{member.key[:16]}…  {', '.join(member.roles)}")
        console.print(f"making {arguments.volumes} volumes of {arguments.size}³ voxels …")
        volumes = await asyncio.to_thread(make_volumes, arguments, data)
        clear(arguments.results)
        run = Run(laptop, volumes, arguments.results)
        began = time.monotonic()
        await run.all()
        seconds = time.monotonic() - began
        summary = summarise(run, arguments.results)
        console.print()
        served = {site for volume in run.volumes for site in volume.sites}
        console.print(
            f"{len(volumes)} volumes in {seconds:.1f} s, served by {', '.join(sorted(served))}"
        )
        console.print(f"summary  {summary}")
        console.print(f"figures  {arguments.results}/*_pores.png")
        return all(volume.step in ("done", "discarded") for volume in run.volumes)


def parse() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=12, help="how many (default 12)")
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge (default 128)")
    parser.add_argument("--seed", type=int, default=1, help="of the volumes (default 1)")
    parser.add_argument(
        "--results", type=Path, default=Path("demo-results"), help="where results go"
    )
    arguments = parser.parse_args()
    if not (1 <= arguments.volumes <= 1000 and 32 <= arguments.size <= 1024):
        parser.error("--volumes is 1 to 1000 and --size 32 to 1024")
    arguments.results = arguments.results.absolute()
    return arguments


def interrupted(number: int, _: object) -> None:
    """End the demo in order, also when its terminal was closed."""
    console.quiet = number == signal.SIGHUP  # there is nowhere to print to any more
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; the exit status is 0 if every volume was served."""
    arguments = parse()
    base = Path(tempfile.mkdtemp(prefix="gridcloud-demo-"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        console.print("starting three sites: " + ", ".join(SITES))
        with three_sites(base) as sites:
            good = asyncio.run(analyse(arguments, sites, base / "volumes"))
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except GridcloudError as error:
        console.print(f"[red]error:[/] {error}")
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
