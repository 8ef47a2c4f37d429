"""Looking at jobs, and ending them."""

from __future__ import annotations

import sys
from datetime import timedelta

import click

from gridcloud.cli.options import as_json, print_json


@click.command()
@click.option("--all", "all_", is_flag=True, help="All jobs, not only the latest 20.")
@as_json
def jobs(*, all_: bool, json_: bool) -> None:
    """List jobs, the newest last."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.jobs(latest=100_000 if all_ else 20)
    if json_:
        return print_json(found)
    if not found:
        return click.echo("no jobs yet; 'gridcloud run -- COMMAND' makes one")
    rows = [
        (
            job.id,
            render.plain(job.spec.title),
            render.state(job),
            f"{job.site}/{job.provider}" if job.site else "",
            render.span(job),
            render.plain(job.message),
        )
        for job in found
    ]
    return render.table(("job", "name", "state", "where", "time", "message"), rows)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--stderr", is_flag=True, help="What it printed to stderr instead of stdout.")
@as_json
@click.argument("job_id", metavar="JOB")
def logs(job_id: str, *, follow: bool, stderr: bool, json_: bool) -> None:
    """Print what JOB printed, byte for byte."""
    from gridcloud.client import Client

    stream = "stderr" if stderr else "stdout"
    with Client() as client:
        chunks = client.logs(job_id, stream=stream, follow=follow)
        if json_:
            text = b"".join(chunks).decode(errors="backslashreplace")
            return print_json({"job": job_id, "stream": stream, "text": text})
        for data in chunks:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    return None


@click.command()
@as_json
@click.argument("job_id", metavar="JOB")
def events(job_id: str, *, json_: bool) -> None:
    """Show what happened to JOB, step by step."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.events(job_id)
    if json_:
        return print_json(found)
    # Of several lines, as of a boot log, the first: --json has all.
    short = [render.plain(event.message.partition("\n")[0]) for event in found]
    rows = [
        (render.clock(e.at), e.job_id, e.kind, what) for e, what in zip(found, short, strict=True)
    ]
    return render.table(("time", "job", "what", "message"), rows)


@click.command()
@click.option("--wait/--no-wait", default=True, help="Return once it has ended.  [default: wait]")
@as_json
@click.argument("job_id", metavar="JOB")
def cancel(job_id: str, *, wait: bool, json_: bool) -> None:
    """End JOB, or all tasks of an array: TERM first, then KILL, with all they started."""
    from gridcloud.client import Client

    with Client() as client:
        found = client.cancel(job_id)
        if wait:
            found = client.wait(job_id, timedelta(seconds=60))
    if json_:
        return print_json(found)
    for job in found:
        click.echo(f"{job.id} {job.state}")
    return None
