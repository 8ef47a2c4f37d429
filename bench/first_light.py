"""How fast the first things are: ``make bench``. Prints ratios measured side by side in one run.

Nothing here asserts a time: a shared machine would make that a coin toss. Each row's contestants
take turns, and medians and minima over the rounds are told. It takes about three minutes, and
leaves nothing behind, also on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import testbed
from rounds import Table, interleaved, ratio, told

from gridcloud import Client
from gridcloud.errors import GridcloudError
from gridcloud.model.job import JobSpec, JobState
from gridcloud.model.need import Need

ROUNDS = 12
IDLE_SECONDS = 20.0
SETTLE_SECONDS = 3.0
TASKS, ARRAY_ROUNDS = 200, 3
TRUE = JobSpec(command=("/bin/true",))


def command(*words: object, environment: dict[str, str] | None = None) -> Callable[[], None]:
    """Return a contestant that runs a command, which must succeed."""

    def run() -> None:
        subprocess.run(
            [str(word) for word in words],
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    return run


def measure_help(table: Table) -> None:
    """``gridcloud --help`` beside a Python that does nothing."""
    times = interleaved(
        {
            "help": command(testbed.GRIDCLOUD, "--help"),
            "python": command(sys.executable, "-c", "pass"),
        },
        ROUNDS,
    )
    beside = f"python -c pass {told(times['python'])}"
    ours = told(times["help"])
    table.add(
        "gridcloud --help (aim ≤ 150 ms)", ours, beside, ratio(times["help"], times["python"])
    )


def measure_idle(table: Table, sites: dict[str, testbed.SiteProcess]) -> None:
    """Memory and CPU of sites that have nothing to do."""
    processes = {
        label: psutil.Process(site.process.pid) for label, site in sites.items() if site.process
    }
    time.sleep(SETTLE_SECONDS)
    before = {label: testbed.cpu_seconds(process) for label, process in processes.items()}
    began = time.perf_counter()
    time.sleep(IDLE_SECONDS)
    elapsed = time.perf_counter() - began
    for label, process in processes.items():
        share = (testbed.cpu_seconds(process) - before[label]) / elapsed
        what = f"idle site, {label} (aim ≤ 120 MB, < 0.5 %)"
        table.add(what, f"{_rss(process)}, {share:.2%} of a core", f"over {elapsed:.0f} s")


def measure_run(
    table: Table, site: testbed.SiteProcess, psij: testbed.PsiJ, ssh: list[str] | None
) -> None:
    """A warm ``gridcloud run -- true`` on the own site, by command line and by library."""
    contestants = {
        "run": command(testbed.GRIDCLOUD, "run", "--", "true", environment=site.environment),
        "psij": psij.fresh,
    }
    if ssh:
        contestants["ssh"] = command(*ssh, "true")
    times = interleaved(contestants, ROUNDS)
    what, ours = "gridcloud run -- true (aim ≤ 500 ms)", told(times["run"])
    beside = f"PSI/J in a fresh Python {told(times['psij'])}"
    table.add(what, ours, beside, ratio(times["run"], times["psij"]))
    if ssh:
        table.add(what, ours, f"ssh true {told(times['ssh'])}", ratio(times["run"], times["ssh"]))
    else:
        table.skip(what, "there is no sshd here")
    with site.client() as client:
        times = interleaved(
            {"run": lambda: _submit_and_wait(client, TRUE), "psij": lambda: psij.run(1)[0]}, ROUNDS
        )
    beside = f"PSI/J in a running Python {told(times['psij'])}"
    what = "Client.submit + wait"
    table.add(what, told(times["run"]), beside, ratio(times["run"], times["psij"]))


def measure_peer(
    table: Table, borrower: testbed.SiteProcess, lender: testbed.SiteProcess, ssh: list[str] | None
) -> None:
    """A warm ``gridcloud run`` in a sandbox leased from a peer."""
    what = "gridcloud run --site PEER -- true (aim ≤ 2)"
    with borrower.client() as client:
        plan = client.offers(Need(), site=lender.name).plan
    if not plan.winners:
        return table.skip(what, plan.explain())
    run = command(
        *(testbed.GRIDCLOUD, "run", "--site", lender.name, "--", "true"),
        environment=borrower.environment,
    )
    contestants = {"run": run}
    if ssh:
        login = command(*ssh, "true")
        contestants["ssh"] = lambda: (login(), login())[0]
    times = interleaved(contestants, ROUNDS)
    if ssh:
        beside = f"two ssh true in a row {told(times['ssh'])}"
        table.add(what, told(times["run"]), beside, ratio(times["run"], times["ssh"]))
    else:
        table.add(what, told(times["run"]), "there is no sshd here")
    return None


def measure_array(table: Table, site: testbed.SiteProcess, psij: testbed.PsiJ) -> None:
    """An array of many tiny tasks beside PSI/J with as many jobs."""
    assert site.process
    daemon = psutil.Process(site.process.pid)
    cpus = {"run": 0.0, "psij": 0.0}
    spec = TRUE.model_copy(update={"tasks": tuple(range(1, TASKS + 1))})

    def array() -> float:
        testbed.bury_orphans()
        before = testbed.cpu_seconds(daemon) + time.process_time()
        seconds = _submit_and_wait(client, spec)
        cpus["run"] = testbed.cpu_seconds(daemon) + time.process_time() - before
        cpus["run"] += testbed.bury_orphans()
        return seconds

    def others() -> float:
        seconds, cpus["psij"] = psij.run(TASKS)
        return seconds

    with site.client() as client:
        times = interleaved({"run": array, "psij": others}, ARRAY_ROUNDS, warm=False)
    rates = {name: TASKS / statistics.median(values) for name, values in times.items()}
    costs = {name: seconds / TASKS for name, seconds in cpus.items()}
    table.add(
        f"array of {TASKS} × true, 2 at a time ({ARRAY_ROUNDS} ×)",
        f"{rates['run']:.1f} tasks/s",
        f"PSI/J, all at once {rates['psij']:.1f} jobs/s",
        ratio(times["run"], times["psij"]),
    )
    table.add(
        "the same, CPU of client, site and guards",
        f"{costs['run'] * 1000:.0f} ms a task",
        f"PSI/J {costs['psij'] * 1000:.0f} ms a job",
        f"{costs['run'] / costs['psij']:.2f}",
    )
    table.add("that site's memory after all this", _rss(daemon))


def _submit_and_wait(client: Client, spec: JobSpec) -> float:
    began = time.perf_counter()
    jobs = client.submit(spec)
    ended = client.wait(jobs[0].array_id or jobs[0].id)
    seconds = time.perf_counter() - began
    if any(job.state is not JobState.COMPLETED for job in ended):
        raise SystemExit(f"a job ended as {ended[0].state}: {ended[0].message}")
    return seconds


def _rss(process: psutil.Process) -> str:
    return f"{process.memory_info().rss / 1e6:.0f} MB"


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def measure(base: Path, table: Table) -> None:
    """Start what is needed, measure every row, end it all."""
    psij = testbed.PsiJ(base)
    with contextlib.ExitStack() as stack:
        try:
            fresh = stack.enter_context(testbed.site(base, "fresh"))
            borrower = stack.enter_context(testbed.site(base, "borrower"))
            lender = stack.enter_context(testbed.site(base, "lender", lending=True))
            ssh = stack.enter_context(testbed.ssh_command(base))
            with borrower.client() as ours, lender.client() as theirs:
                ours.create_community("bench")
                theirs.join_community(ours.invite("bench").code)
            measure_help(table)
            labels = {"fresh": fresh, "in a community": borrower, "lending": lender}
            measure_idle(table, labels)
            stack.enter_context(psij.serving())
            measure_run(table, fresh, psij, ssh)
            measure_peer(table, borrower, lender, ssh)
            measure_array(table, fresh, psij)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # the end is not to be cut short
                signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Measure, print the table; the exit status is 0 if everything could be run."""
    signal.signal(signal.SIGTERM, _stop)
    began = time.monotonic()
    table = Table()
    testbed.adopt_orphans()
    base = Path(tempfile.mkdtemp(prefix="gridcloud-bench-"))
    try:
        measure(base, table)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (GridcloudError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(base)
    print(
        f"\n{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, "
        f"{time.monotonic() - began:.0f} s in all; medians, and minima in brackets\n"
    )
    print(table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
