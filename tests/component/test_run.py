"""``gridcloud run`` on the own machine: what a person types, and what comes back."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gridcloud.model import JobState
from testbeds.sites import GRIDCLOUD, wait_until


@pytest.fixture
def here(tmp_path):
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def test_output_and_exit_status_are_the_commands_own(site, here):
    """Both streams come through apart, and the status is the command's."""
    done = site.cli("run", "--", "sh", "-c", "echo out; echo err >&2; exit 3", cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_fresh_folder_with_inputs_and_outputs(site, here):
    """Files and folders go in, what matches comes back, nothing else is touched."""
    (here / "data").mkdir()
    (here / "data" / "a.txt").write_text("1")
    (here / "tool.sh").write_text("#!/bin/sh\nmkdir -p r/deep; cat data/a.txt > r/deep/b.txt; ls\n")
    (here / "tool.sh").chmod(0o755)
    done = site.cli(
        "run", "--in", "data", "--in", "tool.sh", "--out", "r/**", "--", "./tool.sh", cwd=here
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["data", "r", "tool.sh"]
    assert (here / "r" / "deep" / "b.txt").read_text() == "1"
    assert not list((site.state / "jobs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--cpus", "0", "--", "true"], 64, "--cpus"),
        (["--cpus", "-1", "--", "true"], 64, "--cpus"),
        (["--cpus", "x", "--", "true"], 2, "not a valid integer"),
        (["--memory", "lots", "--", "true"], 2, "amount of memory"),
        (["--memory", "1000000000000", "--", "true"], 64, "can ever serve"),
        (["--time", "0s", "--", "true"], 64, "--time"),
        (["--time", "0", "--", "true"], 2, "length of time"),
        (["--gpus", "64", "--", "true"], 64, "of 64 GPUs"),
        (["--in", "absent", "--", "true"], 64, "absent cannot be used"),
        (["--in", "/dev/null", "--", "true"], 64, "neither a file nor a folder"),
        (["--out", "../x", "--", "true"], 64, "leaves the job folder"),
        (["--out", "x", "--into", "/dev/null", "--", "touch", "x"], 64, "not a folder"),
        (["--out", "/x", "--", "true"], 64, "leaves the job folder"),
        (["--env", "A-B=1", "--", "true"], 64, "environment variable"),
        (["--env", "SURELY_NOT_SET", "--", "true"], 64, "no such variable"),
        (["--array", "9-1", "--", "true"], 2, "empty or too large"),
        (["--site", "elsewhere", "--", "true"], 64, "No site called 'elsewhere'"),
        (["--colour", "red", "--", "true"], 2, "No such option"),
        ([], 2, "Missing argument"),
        (["--out", "*.csv", "--", "true"], 1, "no file matches"),
        (["--out", "leak", "--", "ln", "-s", "/etc/passwd", "leak"], 1, "leads out"),
        (["--", "no-such-command"], 127, "no-such-command"),
        (["--", "sh", "-c", "kill -9 $$"], 137, "signal 9"),
        (["--time", "1s", "--", "sleep", "60"], 124, "time limit"),
    ],
)
def test_bad_input_gets_a_clear_error(site, here, arguments, status, words):
    """Cause on stderr, a telling status, no traceback, nothing left behind."""
    done = site.cli("run", *arguments, cwd=here)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())


def test_bytes_pass_through_unharmed(site, here):
    """NULs, bytes that are no text, no newline at the end, and many of them."""
    make = "import os,sys; sys.stdout.buffer.write((bytes(range(256)) * 4096 * 20) + b'end')"
    done = subprocess.run(
        [GRIDCLOUD, "run", "--", sys.executable, "-c", make],
        env=site.environment,
        capture_output=True,
        timeout=120,
        check=True,
    )
    expected = bytes(range(256)) * 4096 * 20 + b"end"
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(expected).digest()


def test_output_is_live(site):
    """What is printed arrives before the job ends."""
    command = [GRIDCLOUD, "run", "--", "sh", "-c", "echo first; sleep 30"]
    with subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    with site.client() as client:
        assert client.jobs()[-1].state is JobState.CANCELED
    assert not [pid for pid in site.left() if pid != site.process.pid]


def test_detach_then_look(site):
    """A job id, then jobs, logs, events, cancel; each for people and for programs."""
    job = site.cli("run", "--detach", "--name", "hold", "--", "sh", "-c", "echo hi; sleep 60")
    job_id = job.stdout.strip()
    wait_until(lambda: site.cli("logs", job_id).stdout == "hi\n")
    assert "hold" in site.cli("jobs").stdout
    assert json.loads(site.cli("jobs", "--json").stdout)[0]["state"] == "ACTIVE"
    assert "placed at site/local" in site.cli("events", job_id).stdout
    assert json.loads(site.cli("status", "--json").stdout)["leases_own"] == 1
    assert site.cli("cancel", job_id).stdout == f"{job_id} CANCELED\n"
    assert json.loads(site.cli("events", "--json", job_id).stdout)[-1]["kind"] == "CANCELED"


def test_unknown_jobs_are_not_found(site):
    """Every command that names a job says so, with its own status."""
    for verb in ("logs", "events", "cancel"):
        done = site.cli(verb, "nonesuch")
        assert (done.returncode, "no job 'nonesuch'" in done.stderr) == (66, True)


def test_an_array_puts_each_task_in_its_own_folder(site, here):
    """Twenty tasks, twenty folders, the number in arguments and environment."""
    script = "echo {task} $GRIDCLOUD_TASK > n.txt"
    done = site.cli("run", "--array", "1-20", "--out", "n.txt", "--", "sh", "-c", script, cwd=here)
    assert done.returncode == 0, done.stderr
    assert {p.name: (p / "n.txt").read_text() for p in here.iterdir()} == {
        str(n): f"{n} {n}\n" for n in range(1, 21)
    }


def test_the_name_of_an_array_is_not_that_of_a_log(site):
    """Its tasks are named instead."""
    array = site.cli("run", "--array", "1-2", "--detach", "--", "true").stdout.strip()
    done = site.cli("logs", array)
    assert (done.returncode, f"{array}.1" in done.stderr) == (64, True)


def test_an_unusable_state_folder(site):
    """The cause in a sentence, whatever the command."""
    done = site.cli("status", env={"GRIDCLOUD_STATE": "/proc/x"})
    assert done.returncode == 69
    assert "state folder /proc/x cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_task_fails_the_array(site, here):
    """The status of a failed task becomes the array's, and it is named."""
    done = site.cli("run", "--array", "1-3", "--", "sh", "-c", "test {task} != 2", cwd=here)
    assert done.returncode == 1
    assert ".2 failed: exit status 1" in done.stderr


def test_offers_change_nothing(site):
    """The losers' reasons are shown; no job, no lease comes of it."""
    done = site.cli("offers", "--cpus", "64")
    assert done.returncode == 75
    assert "2 of 64 CPUs" in done.stdout
    found = json.loads(site.cli("offers", "--json").stdout)
    assert found["plan"]["verdicts"][0]["rank"] == 1
    status = json.loads(site.cli("status", "--json").stdout)
    assert (status["jobs"], status["leases_own"]) == ({}, 0)


def test_the_whole_tree_is_ended(site):
    """Daemons that a job left behind in sessions of their own end with it."""
    script = "setsid sh -c 'trap \"\" TERM; sleep 300' & setsid sleep 300 & wait"
    job_id = site.cli("run", "--detach", "--", "sh", "-c", script).stdout.strip()
    with site.client() as client:
        wait_until(lambda: client.job(job_id)[0].state is JobState.ACTIVE)
        wait_until(lambda: len(site.left()) >= 4)
        site.cli("cancel", job_id)
        wait_until(lambda: site.left() == [site.process.pid])


def test_the_site_starts_by_itself(new_site, here):
    """With no daemon and no configuration a run just works, and the daemon stays."""
    site = new_site()
    site.settings_file.unlink()
    done = site.cli("run", "--", "echo", "hi", cwd=here, env={"GRIDCLOUD_SITE_NAME": "fresh"})
    assert (done.returncode, done.stdout) == (0, "hi\n"), done.stderr
    assert len(site.left()) == 1
    assert json.loads(site.cli("site", "show", "--json").stdout)["name"] == "fresh"
    assert site.cli("site", "stop").returncode == 0
    assert site.left() == []


def test_state_is_private(site):
    """Nobody else may read keys, store, socket or logs."""
    assert site.state.stat().st_mode & 0o077 == 0
    for name in ("site.db", "api.sock", "keys/identity.pem", "keys/user_ca"):
        path = site.state / name
        assert not path.exists() or path.stat().st_mode & 0o077 == 0


def test_two_daemons_on_one_state_folder(site):
    """The second says who has it and ends; the first is not harmed."""
    second = site.cli("serve")
    assert second.returncode == 73
    assert f"process {site.process.pid}" in second.stderr
    assert site.cli("run", "--", "true").returncode == 0


def test_a_socket_left_by_a_dead_daemon(site):
    """After kill -9 the stale socket is in nobody's way."""
    site.kill()
    assert (site.state / "api.sock").exists()
    assert site.cli("run", "--", "true").returncode == 0


def test_a_malformed_settings_file(new_site):
    """File, line and expectation are told, whoever starts the site."""
    site = new_site(settings="[lending]\nmax_tyme = '2h'\n")
    for arguments in (["run", "--", "true"], ["serve"]):
        done = site.cli(*arguments)
        assert done.returncode != 0
        assert "settings.toml, line 3: lending.max_tyme" in done.stderr


def test_a_deep_state_folder(new_site):
    """A path longer than a socket's may be is no obstacle."""
    site = new_site("x" * 60 + "/" + "y" * 60)
    site.settings_file.write_text('name = "deep"\n')
    site.start()
    assert site.cli("run", "--", "echo", "hi").stdout == "hi\n"


def test_tcp_needs_the_token(new_site):
    """With api.listen the same API answers on TCP, to those who bear the token."""
    import socket
    import urllib.error
    import urllib.request

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    site = new_site(settings=f'[api]\nlisten = "127.0.0.1:{port}"\n')
    site.start()
    url = f"http://127.0.0.1:{port}/v1/status"
    token = (site.state / "api.token").read_text().strip()
    for wrong in ("", "Bearer x", f"Basic {token}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": wrong}))
        assert refused.value.code == 403
        refused.value.close()
    good = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(good) as answer:
        assert json.load(answer)["name"] == "site"


@pytest.mark.component
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_says_so(new_site, tmp_path):
    """On a full disk the job fails with the cause, and works again once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", small], check=True)
    try:
        site = new_site()
        site.state = small / "state"
        site.start()
        filler = small / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"\0" * 65536)
        done = site.cli("run", "--", "true")
        assert done.returncode != 0
        assert "full" in done.stderr or "space" in done.stderr
        filler.unlink()
        assert site.cli("run", "--", "true").returncode == 0, site.log()
    finally:
        site.close()
        for _ in range(100):
            if subprocess.run(["umount", small], check=False).returncode == 0:
                break
            time.sleep(0.05)
