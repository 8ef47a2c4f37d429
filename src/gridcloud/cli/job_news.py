"""Tells what happens to a job while one stays with it: why it waits, how its machine is made."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.errors import GridcloudError

if TYPE_CHECKING:
    from gridcloud.client import Client, JobEvent

#: After this long without a place, a person is told why; so often is looked for more.
_PATIENT_SECONDS = 2.0
#: How often is looked while it runs.
_RUNNING_SECONDS = 5.0
#: What is told besides the steps of a launch, by the kind of event.
_TOLD = frozenset({"QUEUED", "recall", "results"})
_NEVER_OLD = frozenset({"recall", "results"})
_SUBMITTED = "submitted"


def tell(client: Client, job_id: str, ended: threading.Event) -> None:
    """Say on standard error, as it comes, what keeps a job from its end, until it has ``ended``.

    The steps of a machine that is made for it look as they do in 'gridcloud machine start'. Of a
    job that has a place at the first look, it is not told how it came there.
    """
    from gridcloud.model.job import JobState

    number, wait, first = 0, _PATIENT_SECONDS, True
    while True:
        over = ended.wait(wait)
        if over and first:
            return
        try:
            (job,) = client.wait(job_id, timedelta(0))
            waiting = job.state in (JobState.NEW, JobState.QUEUED)
            for event in client.events(job_id, number):
                number = event.number
                if waiting or not first or event.kind in _NEVER_OLD:
                    _tell_one(event)
        except GridcloudError:  # the output's own thread tells it
            return
        if over or job.state.final:
            return
        wait, first = _PATIENT_SECONDS if waiting else _RUNNING_SECONDS, False


def _tell_one(event: JobEvent) -> None:
    from gridcloud.cli import render
    from gridcloud.cli.launching import step_line
    from gridcloud.model.machine import LaunchStep

    if event.kind in {step.value for step in LaunchStep}:
        click.echo(step_line(event.at, event.kind, event.message), err=True)
    elif event.kind in _TOLD and event.message != _SUBMITTED:
        click.echo(f"gridcloud: {render.safe_lines(event.message)}", err=True)
