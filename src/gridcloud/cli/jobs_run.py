"""``gridcloud run``: hand in a job, stay with it, end as it ends."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import (
    TASKS,
    as_json,
    choice_options,
    make_constraints,
    make_need,
    need_options,
    print_json,
)
from gridcloud.cli.ordering import make_order, order_options
from gridcloud.errors import GridcloudError, InvalidSpec

if TYPE_CHECKING:
    from gridcloud.client import Client
    from gridcloud.model.job import Job, JobSpec

#: What decides which program a bare name means; sent along for runs on this machine only.
_SHELL_VARIABLES = ("PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LANG", "LC_ALL", "TZ")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--in",
    "inputs",
    multiple=True,
    metavar="PATH",
    help="Copy this file or folder into the job folder. Repeatable.",
)
@click.option(
    "--out",
    "outputs",
    multiple=True,
    metavar="PATTERN",
    help="Bring back what matches, as 'results/*.csv'. Repeatable.",
)
@click.option("--into", metavar="DIR", help="Where outputs go.  [default: here; arrays: by task]")
@need_options
@choice_options
@order_options
@click.option(
    "--resubmit",
    type=click.IntRange(0, 100),
    metavar="N",
    help="Run it elsewhere up to so often when its place is lost.  [default: as in the settings]",
)
@click.option(
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set a variable, or pass on one of this shell. Repeatable.",
)
@click.option("--name", default="", help="A name for people.")
@click.option(
    "--array",
    type=TASKS,
    metavar="RANGE",
    help="One job for each number, as 1-20; {task} in arguments becomes the number.",
)
@click.option("--detach", is_flag=True, help="Print the job's id and return at once.")
@click.option("--yes", is_flag=True, help="Make a machine, if it takes one, without asking.")
@as_json
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    into: str | None,
    cpus: int,
    memory: int | None,
    gpus: int,
    time_: timedelta | None,
    site: str | None,
    countries: tuple[str, ...],
    kinds: tuple[str, ...],
    within: tuple[str, ...],
    max_price: float | None,
    strategy: str | None,
    image: str,
    user_data: str | None,
    playbooks: tuple[str, ...],
    variables: tuple[str, ...],
    volumes: tuple[str, ...],
    resubmit: int | None,
    env: tuple[str, ...],
    name: str,
    array: tuple[int, ...] | None,
    *,
    spot: bool,
    detach: bool,
    yes: bool,
    json_: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND in a fresh job folder, here or wherever its need fits.

    Its output appears live, its exit status becomes this command's. Ctrl-C cancels it. It reads
    nothing from standard input. The tasks of an array keep their output for 'gridcloud logs'.
    All options come before the command; "--" keeps the two apart for the eye:

        gridcloud run --cpus 2 --in data.csv --out 'plot.png' -- python analyse.py data.csv

    Where a machine has to be made for it, that is shown first with its price; at a terminal you
    are asked whether to go on. --image, --user-data, --playbook, --volume and --spot say how.

    The job belongs to the site: it outlives this command if that is killed ('gridcloud jobs',
    'gridcloud logs -f'). With --json nothing is streamed and the job's record is printed at the
    end.
    """
    from gridcloud.cli.planning import agreed
    from gridcloud.client import Client
    from gridcloud.model.choice import Strategy
    from gridcloud.model.job import JobSpec

    spec = JobSpec(
        command=command,
        name=name,
        need=make_need(cpus, memory, gpus, time_),
        env=_environment(env),
        shell_env={n: os.environ[n] for n in _SHELL_VARIABLES if n in os.environ},
        inputs=tuple(_absolute(path) for path in inputs),
        outputs=outputs,
        into=_absolute(into if into is not None else ("{task}" if array else ".")),
        site=site,
        constraints=make_constraints(countries, kinds, within, max_price),
        strategy=Strategy(strategy) if strategy else None,
        resubmit=resubmit,
        machine=make_order("", image, user_data, playbooks, variables, volumes, spot=spot),
        tasks=array or (),
    )
    with Client() as client:
        if not json_ and not agreed(client, spec, ask=not yes):
            click.echo("nothing was started", err=True)
            return 1
        jobs = client.submit(spec)
        job_id = jobs[0].array_id or jobs[0].id
        if detach:
            print_json(jobs) if json_ else click.echo(job_id)
            return 0
        try:
            return _stay(client, jobs, job_id, spec, json_=json_)
        except KeyboardInterrupt:
            return _interrupted(client, job_id)


def _stay(client: Client, jobs: list[Job], job_id: str, spec: JobSpec, *, json_: bool) -> int:
    if spec.tasks:
        ended = _watch_array(client, job_id, len(jobs), quiet=json_)
        if not json_:
            click.echo(f"gridcloud: each task's output: gridcloud logs {jobs[0].id}", err=True)
    else:
        if not json_:
            _stream(client, job_id)
        ended = client.wait(job_id)
    if json_:
        print_json(ended)
    failed = [job for job in ended if job.outcome is None or not job.outcome.succeeded]
    for job in failed[:10]:
        _explain(job)
    if len(failed) > 10:
        click.echo(f"gridcloud: {len(failed)} of {len(ended)} tasks failed", err=True)
    if not failed:
        return 0
    outcome = failed[0].outcome
    return (outcome.exit_status if outcome else 0) or 1


def _stream(client: Client, job_id: str) -> None:
    """Print both streams as they come, each on its own, and what keeps the job from its end."""
    from gridcloud.cli.job_news import tell

    failure: list[GridcloudError] = []

    def copy(stream: str, descriptor: int) -> None:
        try:
            for data in client.logs(job_id, stream=stream, follow=True):
                _write(descriptor, data)
        except GridcloudError as error:
            failure.append(error)

    sys.stdout.flush()
    ended = threading.Event()
    beside = [
        threading.Thread(target=copy, args=("stderr", 2), daemon=True),
        threading.Thread(target=tell, args=(client, job_id, ended), daemon=True),
    ]
    for thread in beside:
        thread.start()
    try:
        copy("stdout", 1)
    finally:
        ended.set()
    for thread in beside:
        thread.join()
    if failure:
        from gridcloud.cli import render

        why = render.safe_lines(str(failure[0]))
        click.echo(f"gridcloud: the output broke off: {why}", err=True)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _watch_array(client: Client, job_id: str, count: int, *, quiet: bool) -> list[Job]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(job_id, total=count)
        while True:
            jobs = client.wait(job_id, timedelta(seconds=0.5))
            done = [job for job in jobs if job.state.final]
            progress.update(bar, completed=len(done))
            if len(done) == len(jobs):
                return jobs


def _explain(job: Job) -> None:
    """Say why a job failed, unless its own exit status says it all."""
    outcome = job.outcome
    if outcome and not outcome.reason and not outcome.signal and job.task is None:
        return
    from gridcloud.cli import render

    why = render.safe_lines(job.message)  # it may be what another site's machine said
    click.echo(f"gridcloud: job {job.id} {job.state.value.lower()}: {why}", err=True)


def _interrupted(client: Client, job_id: str) -> int:
    click.echo(f"\ncanceling {job_id} (Ctrl-C again to leave it to the site)", err=True)
    client.cancel(job_id)
    client.wait(job_id, timedelta(seconds=30))
    return 130


def _absolute(path: str) -> str:
    return str(Path(os.path.normpath(Path.cwd() / Path(path).expanduser())))


def _environment(settings: tuple[str, ...]) -> dict[str, str]:
    env = {}
    for setting in settings:
        name, given, value = setting.partition("=")
        if not given:
            if name not in os.environ:
                raise InvalidSpec(
                    f"--env {name}: this shell has no such variable.",
                    hint="Write NAME=VALUE to set one.",
                )
            value = os.environ[name]
        env[name] = value
    return env
