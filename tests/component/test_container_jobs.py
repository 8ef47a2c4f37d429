"""``gridcloud run`` in a container of a real podman, and guests confined by one."""

from __future__ import annotations

import json
import time

import pytest

from gridcloud.model import JobState
from testbeds import podman as testbed
from testbeds.sites import wait_until

pytestmark = [
    pytest.mark.xdist_group("podman"),
    pytest.mark.skipif(bool(testbed.missing()), reason=testbed.missing() or "podman"),
]

SETTINGS = """\
[providers.local]
cpus = 1
memory = "2G"
[providers.box]
kind = "containers"
image = "{image}"
engine = "{engine}"
network = "none"
cpus = 4
memory = "4G"
"""
LENDING = '[lending]\nenabled = true\nisolation = "container"\nmax_time = "1h"\ndisk = "64M"\n'
#: Too large for the bare host, which has one CPU.
HERE = ("--cpus", "2", "--memory", "256M")


@pytest.fixture(scope="module")
def engine():
    """One podman for all tests here."""
    with testbed.podman() as engine:
        yield engine


@pytest.fixture
def settings(engine):
    return SETTINGS.format(image=testbed.IMAGE, engine=engine.address)


@pytest.fixture
def boxed(new_site, settings, engine):
    """A running site whose containers are checked to be gone in the end."""
    site = new_site("boxed", settings)
    site.start()
    yield site
    for name in engine.labelled():
        engine.cli("rm", "--force", "--time", "0", name)


def nothing_left(site, engine):
    folder = site.state / "containers"
    wait_until(lambda: not engine.labelled() and not (folder.exists() and list(folder.iterdir())))


def submit(site, *command, time_limit=None):
    """Submit a job that only a container can serve; return its id once it is active."""
    limit = ("--time", time_limit) if time_limit else ()
    told = site.cli("run", *HERE, *limit, "--detach", "--", *command)
    assert told.returncode == 0, told.stderr
    job_id = told.stdout.split()[0]
    with site.client() as client:
        wait_until(lambda: client.job(job_id)[0].state is JobState.ACTIVE)
    return job_id


def test_a_job_runs_in_a_container(boxed, engine, tmp_path):
    """Inputs go in, outputs come back, streams and status are the command's; nothing is left."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in.txt").write_text("1")
    script = "cat data/in.txt >out.txt; ls -l data >&2; hostname; test -e /host; exit 3"
    done = boxed.cli(
        *("run", *HERE, "--in", "data", "--out", "out.txt", "--", "sh", "-c", script), cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (3, "job\n"), done.stderr
    assert (tmp_path / "out.txt").read_text() == "1"
    nothing_left(boxed, engine)


def test_a_job_is_cancelled_in_its_container(boxed, engine):
    """It ends, and its container goes."""
    job_id = submit(boxed, "sleep", "300")
    boxed.cli("cancel", job_id)
    with boxed.client() as client:
        wait_until(lambda: client.job(job_id)[0].state is JobState.CANCELED)
    nothing_left(boxed, engine)


def test_a_time_limit_holds_in_a_container(boxed, engine):
    """As everywhere: status 124."""
    done = boxed.cli("run", *HERE, "--time", "2s", "--", "sleep", "300")
    assert done.returncode == 124, done.stderr
    nothing_left(boxed, engine)


def test_a_job_that_takes_too_much_memory_is_told_so(boxed, engine):
    """Killed by the kernel, and the reason is in the job's message."""
    done = boxed.cli("run", *HERE, "--", "python3", "-c", "x = bytearray(2**30)")
    assert done.returncode == 137
    assert "more memory than its lease" in done.stdout + done.stderr
    nothing_left(boxed, engine)


def test_a_job_cannot_have_files_of_the_host_brought_back(boxed, tmp_path):
    """A symbolic link out of the job's folder is not followed on the host."""
    secret = tmp_path / "secret"
    secret.write_text("deep")
    script = f"ln -s {secret} stolen; ln -s / root; mkdir d; ln -s {tmp_path} d/up; exit 0"
    done = boxed.cli(
        *("run", *HERE, "--out", "stolen", "--out", f"root{secret}", "--out", "d/up/secret"),
        *("--into", str(tmp_path / "back"), "--", "sh", "-c", script),
    )
    found = [path for path in (tmp_path / "back").rglob("*") if path.is_file()]
    assert not any("deep" in path.read_text() for path in found), done.stderr


def test_the_site_is_killed_while_a_job_runs_in_a_container(boxed, engine, tmp_path):
    """The job goes on without it; the next site finds it, and has all of its output."""
    go = tmp_path / "unused"
    job_id = submit(boxed, "sh", "-c", "echo one; sleep 8; echo two; exit 5")
    boxed.kill()
    assert engine.labelled()
    boxed.start()
    with boxed.client() as client:
        wait_until(lambda: client.job(job_id)[0].state.final)
        job = client.job(job_id)[0]
    assert job.outcome is not None
    assert job.outcome.exit_code == 5, job.message
    assert boxed.cli("logs", job_id).stdout == "one\ntwo\n"
    assert not go.exists()
    nothing_left(boxed, engine)


def test_a_container_that_is_removed_by_hand_sends_the_job_elsewhere(boxed, engine):
    """The job notices, and begins again or says why not; it never hangs."""
    job_id = submit(boxed, "sleep", "300")
    for name in engine.labelled():
        engine.cli("rm", "--force", "--time", "0", name)
    with boxed.client() as client:
        wait_until(lambda: client.job(job_id)[0].attempts > 1 or client.job(job_id)[0].state.final)
    boxed.cli("cancel", job_id)
    with boxed.client() as client:
        wait_until(lambda: client.job(job_id)[0].state.final)
    nothing_left(boxed, engine)


def test_a_site_that_lost_its_store_sweeps_its_containers(boxed, engine):
    """By their labels alone, also where the folders are gone too."""
    submit(boxed, "sleep", "300")
    boxed.kill()
    for name in ("site.db", "site.db-wal", "site.db-shm"):
        (boxed.state / name).unlink(missing_ok=True)
    assert engine.labelled()
    boxed.start()
    nothing_left(boxed, engine)


def test_an_engine_that_is_away_for_a_while_is_waited_for(boxed, engine):
    """Jobs that run there are not given up at once; offers say what is the matter."""
    job_id = submit(boxed, "sh", "-c", "sleep 6; echo done")
    engine.stop()
    try:
        with boxed.client() as client:
            wait_until(
                lambda: any(
                    "does not answer" in verdict.offer.problem
                    for verdict in client.offers().plan.verdicts
                )
            )
    finally:
        engine.start()
    with boxed.client() as client:
        wait_until(lambda: client.job(job_id)[0].state.final)
        assert client.job(job_id)[0].state is JobState.COMPLETED, client.job(job_id)[0].message
    assert boxed.cli("logs", job_id).stdout == "done\n"
    nothing_left(boxed, engine)


def test_guests_are_confined_by_containers(new_site, settings, engine, tmp_path):
    """With isolation = "container" a borrower's job runs in one, and gets its files both ways."""
    lender = new_site("lender", settings.replace("cpus = 1\n", "cpus = 4\n", 1) + LENDING)
    borrower = new_site("borrower", '[providers.local]\ncpus = 1\nmemory = "512M"\n')
    lender.start()
    borrower.start()
    with lender.client() as inviter, borrower.client() as joining:
        inviter.create_community("physics")
        joining.join_community(inviter.invite("physics").code)
    assert "confined by container of box" in lender.cli("site", "show", "--json").stdout
    (tmp_path / "in.txt").write_text("hello")
    script = "cat in.txt >out.txt; pwd; ls /proc | grep -c '^[0-9]'; id -u"
    done = borrower.cli(
        *("run", *HERE, "--in", "in.txt", "--out", "out.txt", "--", "sh", "-c", script),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text() == "hello"
    home, count, uid = done.stdout.split()
    assert home.startswith("/home/guest/")
    assert int(count) < 15
    assert int(uid) >= 0x7000_0000
    with borrower.client() as client:
        told = json.loads(borrower.cli("offers", "--json", *HERE).stdout)
        assert client is not None
    assert "container" in json.dumps(told)
    began = time.monotonic()
    nothing_left(lender, engine)
    assert time.monotonic() - began < 60
