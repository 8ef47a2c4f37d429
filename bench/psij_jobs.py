"""PSI/J's local executor doing ``/bin/true``: the measure that gridcloud's runs are held against.

``python psij_jobs.py`` runs one job in a fresh Python. ``python psij_jobs.py serve`` answers each
line on standard input (a number of jobs) with one line: seconds of wall time, and CPU seconds of
this process and its children.
"""

from __future__ import annotations

import sys
import time

import psutil
from psij import Job, JobExecutor, JobSpec


def run(count: int) -> tuple[float, float]:
    """Submit ``count`` jobs at once and wait for all; return wall and CPU seconds."""
    executor = JobExecutor.get_instance("local")
    cpu, began = sum(psutil.Process().cpu_times()[:4]), time.perf_counter()
    jobs = [Job(JobSpec(executable="/bin/true")) for _ in range(count)]
    for job in jobs:
        executor.submit(job)
    for job in jobs:
        status = job.wait()
        if status is None or status.exit_code != 0:
            raise SystemExit(f"PSI/J's job ended as {status}")
    return time.perf_counter() - began, sum(psutil.Process().cpu_times()[:4]) - cpu


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        for line in sys.stdin:
            print(*run(int(line)), flush=True)
    else:
        run(1)
