"""Simulate grids from many seeds; see docs/explanation/simulation.md.

    make simulate                       everything: thousands of small runs, then 10 to 5000 sites
    make simulate SEEDS=200 SITES=100   fewer seeds, and of the large grids only one of 100
    make simulate KIND=whole SEED=17    one run again, exactly as it was

A run that breaks a rule is printed with the command that runs it again; the exit status is 1.
"""

# ruff: noqa: T201  it is a program, and prints

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from simulation.contention import Contention
from simulation.large import Stay, Survey, survey
from simulation.running import Report, simulate
from simulation.scenario import Setting

#: The kinds of small runs, and how many in a hundred of all seeds each gets.
KINDS: dict[str, tuple[Setting | Contention, int]] = {
    "brokers": (Setting(light=True), 78),
    "whole": (Setting(light=False), 20),
    "contention": (Contention(), 2),
}
_SEEDS = 2000
_SITES = (10, 100, 1000, 5000)
_LARGE_SEEDS = {10: 3, 100: 3}
#: Larger grids are looked at for a shorter time.
_STAYS = {
    1000: Stay(warm_up=15, peace=20, churn=30),
    5000: Stay(warm_up=10, peace=15, churn=20, churn_per_minute=0.1, parted=10),
}
_RESULTS = Path("docs/explanation/simulation-results.md")


def main() -> int:
    """Run what the arguments ask for; return the exit status."""
    arguments = _arguments()
    began = time.monotonic()
    if "PYTHONHASHSEED" not in os.environ:  # sets must iterate alike in every run
        os.execve(
            sys.executable,
            [sys.executable, "-m", "simulation", *sys.argv[1:]],
            os.environ | {"PYTHONHASHSEED": "0"},
        )
    if arguments.seed is not None:
        return _replay(arguments)
    lines: list[str] = []
    failed = False
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes, initializer=_prepare) as pool:
        if arguments.seeds:
            failed |= _small(pool.imap_unordered, arguments, lines)
    with context.Pool(arguments.processes, initializer=_prepare, maxtasksperchild=1) as pool:
        if arguments.sites:
            failed |= _large(pool.imap_unordered, arguments, lines)
    lines.append(f"\nAll of it took {(time.monotonic() - began) / 60:.0f} minutes.")
    print(lines[-1])
    if arguments.out:
        arguments.out.write_text(_page(lines), encoding="utf-8")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, help="how many small runs")
    parser.add_argument("--first", type=int, default=1, help="the first of these seeds")
    parser.add_argument("--kind", choices=[*KINDS, "large"], help="small runs of this kind only")
    parser.add_argument("--seed", type=int, help="run this one seed, and tell all of it")
    parser.add_argument("--sites", type=_sizes, help="sizes of the large grids, as 100,1000")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help=f"write the tables here; all runs: {_RESULTS}")
    arguments = parser.parse_args()
    if arguments.seeds is None and arguments.sites is None and arguments.kind is None:
        arguments.seeds, arguments.sites = _SEEDS, _SITES
        arguments.out = arguments.out or _RESULTS
    elif arguments.seeds is None and arguments.kind not in (None, "large"):
        arguments.seeds = _SEEDS
    return arguments


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _prepare() -> None:
    gc.collect()
    gc.freeze()  # what was imported is never looked at again


def _one(which: tuple[str, int]) -> tuple[str, Report]:
    kind, seed = which
    return kind, simulate(seed, KINDS[kind][0])


def _many(which: tuple[int, int]) -> Survey:
    sites, seed = which
    return survey(sites, seed, _STAYS.get(sites, Stay()))


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.kind == "large":
        found: Report | Survey = _many(((arguments.sites or _SITES)[0], arguments.seed))
    else:
        found = _one((arguments.kind or "brokers", arguments.seed))[1]
    for name, value in vars(found).items():
        if name != "violations":
            print(f"{name:20} {value}")
    for violation in found.violations:
        print(f"BROKEN: {violation}")
    return int(bool(found.violations))


# Small runs

Imap = Callable[..., Iterable[Any]]


def _small(imap: Imap, arguments: argparse.Namespace, lines: list[str]) -> bool:
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    work = [(arguments.kind or _kind_of(seed), seed) for seed in seeds]
    began = time.monotonic()
    reports: dict[str, list[Report]] = {kind: [] for kind, _ in work}
    broken = 0
    for number, (kind, report) in enumerate(imap(_one, work, 4), start=1):
        reports[kind].append(report)
        if report.violations:
            broken += 1
            _tell(f"make simulate KIND={kind} SEED={report.seed}", report.violations)
        if sys.stderr.isatty() or number % 100 == 0:
            end = "\r" if sys.stderr.isatty() else "\n"
            print(f"{number} of {len(work)} small runs, {broken} broken", end=end, file=sys.stderr)
    took = time.monotonic() - began
    lines += [
        "| kind | runs | sites | virtual hours | CPU s each | jobs | loans | crashes, cuts, storms "
        "| messages | agreed after: median, most | broken |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(kind, found) for kind, found in sorted(reports.items())),
        "",
        f"{len(work)} runs took {took / 60:.1f} minutes on {arguments.processes} processes.",
        "",
    ]
    print(*lines, sep="\n")
    return broken > 0


def _kind_of(seed: int) -> str:
    """Return the kind of a run by its seed, so that each seed means one run."""
    place = seed * 37 % 100
    for kind, (_, share) in KINDS.items():
        if place < share:
            return kind
        place -= share
    raise AssertionError("the shares make a hundred")


def _row(kind: str, reports: list[Report]) -> str:
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.counts)
    setting = KINDS[kind][0]
    sites = setting.sites if isinstance(setting, Setting) else setting.borrowers + 1
    agreed = sorted(r.agreed_after for r in reports if r.agreed_after is not None)
    told = f"{median(agreed):.1f} s, {agreed[-1]:.1f} s" if agreed else ""
    hurt = sum(counts[what] for what in ("crash", "part", "storm", "one way"))
    cells: Iterator[object] = iter(
        (
            kind,
            len(reports),
            sites,
            f"{sum(r.seconds for r in reports) / 3600:.1f}",
            f"{sum(r.cpu_seconds for r in reports) / len(reports):.2f}",
            counts["submitted"],
            counts["granted"],
            hurt,
            counts["message"],
            told,
            sum(bool(r.violations) for r in reports),
        )
    )
    return f"| {' | '.join(map(str, cells))} |"


# Large grids


def _large(imap: Imap, arguments: argparse.Namespace, lines: list[str]) -> bool:
    head = [
        "| sites | seed | virtual s | CPU s | messages a site sends a second: in peace, in churn "
        "| KB the same | a removal known to all after | nobody thought dead after churn "
        "| after a cut | memory of a site: shared, alone | broken |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += head
    print(*head, sep="\n")
    # One process at a time for the largest: they need the memory.
    work = [
        (sites, seed)
        for sites in arguments.sites
        for seed in range(1, _LARGE_SEEDS.get(sites, 1) + 1)
    ]
    broken = False
    for found in imap(partial(_many), work, 1):
        line = _large_row(found)
        lines.append(line)
        print(line, flush=True)
        if found.violations:
            broken = True
            _tell(
                f"make simulate KIND=large SITES={found.sites} SEED={found.seed}", found.violations
            )
    return broken


def _large_row(found: Survey) -> str:
    def after(seconds: float | None) -> str:
        return "never" if seconds is None else f"{seconds:.1f} s"

    cells = (
        found.sites,
        found.seed,
        f"{found.seconds:.0f}",
        f"{found.cpu_seconds:.0f}",
        f"{found.peace_messages:.1f}, {found.churn_messages:.1f}",
        f"{found.peace_bytes / 1000:.1f}, {found.churn_bytes / 1000:.1f}",
        after(found.known_after),
        after(found.back_after),
        after(found.healed_after),
        f"{found.process_bytes_each / 1e6:.2f} MB, {found.alone_bytes / 1e6:.1f} MB",
        len(found.violations),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _tell(command: str, violations: list[str]) -> None:
    print(f"\nBROKEN; to see it again: {command}", flush=True)
    for violation in violations[:5]:
        print(f"  {violation}")


def _page(lines: list[str]) -> str:
    when = time.strftime("%Y-%m-%d")
    head = [
        "# What simulations showed",
        "",
        f"Written by `make simulate`, {when}; see [simulation](simulation.md) for what it means.",
        "",
    ]
    return "\n".join([*head, *lines, ""])
