"""Jobs on machines that have to be made: what is shown first, by a real site and command line."""

import json
import os
import pty
import subprocess
import tempfile
from pathlib import Path

import pytest

from testbeds import sshd as testbed
from testbeds.folder_site import reachable_site
from testbeds.sites import GRIDCLOUD, wait_until

NEED = ("run", "--cpus", "3", "--memory", "1G")


@pytest.fixture
def cloud(tmp_path):
    """Return the folder of a cloud."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    return folder


@pytest.fixture
def site(tmp_path, cloud):
    """Return a site of one CPU, with a cloud whose machines are a real sshd."""
    settings = "[providers.local]\ncpus = 1\n"
    with reachable_site(tmp_path, cloud, "127.0.0.42", settings) as (made, _):
        yield made


def machines(cloud):
    return sorted(path.stem for path in cloud.glob("*.machine"))


pytestmark = pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")


def test_a_job_too_large_for_home_runs_on_a_machine_made_for_it(site, cloud):
    """The plan is told on stderr, the output is the job's alone, and the machine is gone after."""
    done = site.cli(*NEED, "--time", "2h", "--", "sh", "-c", "echo there; exit 3")
    assert (done.stdout, done.returncode) == ("there\n", 3), done.stderr
    plan, why = done.stderr.splitlines()[:2]
    assert plan == (
        "plan: site/cloud large in here (4 CPUs, 8 GiB): 1 EUR an hour, 2 EUR for 2h 00m"
    )
    assert why == " why: the only one that fits; site/local: has 1 of 3 CPUs"
    wait_until(lambda: not machines(cloud), 30)


def test_what_fits_at_home_makes_no_machine_and_no_words(site, cloud):
    """Nothing is told or asked where nothing has to be paid for."""
    done = site.cli("run", "--", "true")
    assert (done.returncode, done.stderr) == (0, "")
    assert machines(cloud) == []
    done = site.cli("run", "--image", "debian-12", "--", "true")
    assert "--image counts only where a machine is made" in done.stderr


def at_a_terminal(site, answer, *words):
    """Run the command line at a terminal; return its exit status and what the terminal showed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [GRIDCLOUD, *words], env=site.environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = b""
    try:
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            asked = b"Go on?" in shown
            shown += data
            if b"Go on?" in shown and not asked:
                os.write(leader, answer)
        return process.wait(60), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_at_a_terminal_one_is_asked(site, cloud):
    """No starts nothing; yes and --yes go on, the latter without a question."""
    status, shown = at_a_terminal(site, b"n\n", *NEED, "--", "echo", "there")
    assert status == 1
    assert "plan: site/cloud large" in shown
    assert "nothing was started" in shown
    assert json.loads(site.cli("jobs", "--json").stdout) == []
    status, shown = at_a_terminal(site, b"y\n", *NEED, "--", "echo", "there")
    assert status == 0
    assert "there" in shown
    status, shown = at_a_terminal(site, b"", *NEED, "--yes", "--", "echo", "there")
    assert status == 0
    assert "Go on?" not in shown


def test_offers_tell_shapes_with_region_and_price(site):
    """And JSON has all of it."""
    done = site.cli("offers", "--cpus", "1", "--memory", "1G")
    header, *rows = done.stdout.splitlines()[1:]
    assert header.split()[:4] == ["rank", "offer", "shape", "region"]
    assert any("small" in row and "here" in row and "0.25 EUR" in row for row in rows)
    found = json.loads(site.cli("offers", "--cpus", "1", "--json").stdout)
    by_shape = {v["offer"]["shape"]: v for v in found["plan"]["verdicts"]}
    assert by_shape["small"]["offer"]["cost"] == 0.25
    assert by_shape["small"]["behind"] == "a machine would have to be made"
    assert by_shape["large"]["offer"]["quota"]["machines"] == 100
    few = site.cli("offers", "--shapes", "1").stdout
    assert "site/cloud: and 1 more shape; --shapes shows more" in few


def begun(site, *words, **more):
    """Start a run that is stayed with."""
    return subprocess.Popen(
        [GRIDCLOUD, *NEED, *words],
        env=site.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def read_until(stream, text):
    """Return a stream's lines up to one with a text."""
    lines = []
    while not lines or text not in lines[-1]:
        line = stream.readline()
        assert line, f"it ended before {text!r}: {lines}"
        lines.append(line)
    return lines


def test_whoever_waits_sees_the_machine_being_made(site, cloud):
    """While it is made, not after; as 'gridcloud machine start' shows it."""
    (cloud / "slow").touch()
    with begun(site, "--", "echo", "there") as run:
        try:
            read_until(run.stderr, " create: creating large")
            (cloud / "slow").unlink()
            out, told = run.communicate(timeout=60)
        finally:
            run.kill()
    assert (run.returncode, out) == (0, "there\n"), told
    assert " ready: it answers" in told


def test_results_that_cannot_be_stored_wait_on_their_machine(site, cloud, tmp_path):
    """It is told, the machine stays, and once there is room they come; then it is gone."""
    here = tmp_path / "here"
    here.mkdir()
    into = here / "out"
    with tempfile.TemporaryDirectory() as seen:
        Path(seen).chmod(0o755)  # the machine's account is another
        go = Path(seen) / "go"
        script = f"echo begun; while [ ! -e {go} ]; do sleep 0.1; done; echo 42 > r.txt"
        words = ("--out", "r.txt", "--into", "out", "--", "sh", "-c", script)
        run = begun(site, *words, cwd=here)
        try:
            read_until(run.stdout, "begun")
            into.touch()  # a file, so there can be no folder of that name
            go.touch()
            (told, *_) = read_until(run.stderr, "results could not be brought back")[-1:]
            assert "It is tried again, and they are kept where they are until" in told
            assert machines(cloud)
            into.unlink()
            _, told = run.communicate(timeout=100)
        finally:
            run.kill()
            run.communicate()
    assert run.returncode == 0, told
    assert (into / "r.txt").read_text() == "42\n"
    wait_until(lambda: not machines(cloud), 30)
