"""kill -9 the site at the worst moments: jobs are found again or failed with the cause."""

import json
import os
import signal
import sqlite3

import pytest

from gridcloud.model import JobSpec, JobState, Need
from testbeds.dying import MOMENTS
from testbeds.sites import wait_until


def submit(site, script, **more):
    with site.client() as client:
        (job,) = client.submit(JobSpec(command=("sh", "-c", script), **more))
    return job


def wait_for(site, job, state):
    with site.client() as client:
        wait_until(lambda: client.job(job.id)[0].state is state)


def end(site, job):
    with site.client() as client:
        (ended,) = client.wait(job.id)
        wait_until(lambda: client.status().leases_own == 0)
    return ended


def test_while_running(site, tmp_path):
    """The job never notices; output and result are all there."""
    script = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.3; done; echo done > r.txt"
    job = submit(site, script, outputs=("r.txt",), into=str(tmp_path / "out"))
    wait_for(site, job, JobState.ACTIVE)
    site.kill()
    site.start()
    ended = end(site, job)
    assert ended.state is JobState.COMPLETED, ended.message
    assert (tmp_path / "out" / "r.txt").read_text() == "done\n"
    assert site.cli("logs", job.id).stdout.split() == list("123456")
    assert "found again" in site.cli("events", job.id).stdout


def test_it_ended_while_the_site_was_down(site):
    """The end is learned afterwards, with its exit status."""
    job = submit(site, "sleep 0.5; exit 7")
    wait_for(site, job, JobState.ACTIVE)
    site.kill()
    wait_until(lambda: not site.left())
    site.start()
    ended = end(site, job)
    assert (ended.state, ended.outcome.exit_code) == (JobState.FAILED, 7)


def test_cancel_after_a_restart(site):
    """A job found again can be cancelled, tree and all."""
    job = submit(site, "sleep 300 & sleep 300")
    wait_for(site, job, JobState.ACTIVE)
    site.kill()
    site.start()
    assert site.cli("cancel", job.id).stdout == f"{job.id} CANCELED\n"
    wait_until(lambda: site.left() == [site.process.pid])


def test_what_waits_still_waits_and_an_array_goes_on(site):
    """No task is lost and none runs twice."""
    marks = site.folder / "marks"
    marks.mkdir()
    spec = JobSpec(
        command=("sh", "-c", f"echo x >> {marks}/{{task}}; sleep 0.05"), tasks=tuple(range(40))
    )
    with site.client() as client:
        array = client.submit(spec)[0].array_id
    for _ in range(3):
        wait_until(lambda: len(list(marks.iterdir())) % 7 == 3)
        site.kill()
        site.start()
    with site.client() as client:
        ended = client.wait(array)
    assert {job.state for job in ended} == {JobState.COMPLETED}
    assert [len((marks / str(n)).read_text().split()) for n in range(40)] == [1] * 40


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_step(new_site, moment, tmp_path):
    """Killed at this step, the site takes the job to its end after it starts again."""
    site = new_site(settings="[providers.local]\ncpus = 1\n")
    site.start(dying=moment)
    into = tmp_path / "out"
    spec = JobSpec(
        command=("sh", "-c", "echo $$ >> ../../../ran; echo r > r.txt; echo s > s.txt"),
        outputs=("*.txt",),
        into=str(into),
        need=Need(cpus=1),
    )
    with site.client() as client:
        (job,) = client.submit(spec)
    site.process.wait(60)
    site.start()
    ended = end(site, job)
    assert ended.state is JobState.COMPLETED, ended.message
    assert sorted(path.name for path in into.iterdir()) == ["r.txt", "s.txt"]
    assert len((site.state / "ran").read_text().split()) == 1


def test_a_supervisor_that_was_killed(site):
    """Its job is failed with the cause, not waited for."""
    job = submit(site, "sleep 300")
    wait_for(site, job, JobState.ACTIVE)
    folder = site.state / "jobs"
    # Before that, a killed guard has started nothing, and another takes its place.
    wait_until(lambda: any('"running"' in s.read_text() for s in folder.glob("*/status.json")))
    (lock,) = folder.glob("*/guard.lock")
    os.kill(int(lock.read_text().split()[0]), signal.SIGKILL)
    ended = end(site, job)
    assert ended.state is JobState.FAILED
    assert "guard process was killed" in ended.message
    wait_until(lambda: site.left() == [site.process.pid])


def test_a_store_from_the_future_is_left_alone(site):
    """An older gridcloud refuses a newer store instead of harming it."""
    site.stop()
    with sqlite3.connect(site.state / "site.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    done = site.cli("serve")
    assert done.returncode == 73
    assert "newer gridcloud" in done.stderr


def test_stop_and_start_keep_everything(site):
    """An orderly stop ends no job; the record is whole afterwards."""
    job = submit(site, "sleep 1; echo end")
    wait_for(site, job, JobState.ACTIVE)
    assert site.stop() == 0
    site.start()
    assert end(site, job).state is JobState.COMPLETED
    assert [j["id"] for j in json.loads(site.cli("jobs", "--json").stdout)] == [job.id]
