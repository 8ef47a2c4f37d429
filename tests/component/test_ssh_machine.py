"""A plain machine with sshd and Python, added to a site and used: what a person meets."""

import contextlib
import hashlib
import json
import os
import pty
import signal
import subprocess
import time

import psutil
import pytest

from gridcloud.access import keys
from gridcloud.model import JobSpec, JobState, Need
from testbeds import sshd as testbed
from testbeds.sites import GRIDCLOUD, wait_until

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server"),
]
ONE_CPU_HERE = "[providers.local]\ncpus = 1\n"
THERE = ("--cpus", "2")


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A private key file."""
    path = tmp_path_factory.mktemp("identity") / "key"
    path.touch(0o600)
    path.write_bytes(keys.ephemeral().export_private_key("openssh"))
    return path


@pytest.fixture(scope="module")
def public(identity):
    return keys.public_line(keys.load(identity))


@pytest.fixture(scope="module")
def machine(public):
    """Another machine, that lets that key in."""
    with testbed.sshd(authorized=[public], host="127.0.0.41") as machine:
        yield machine


def section(machine, identity, **changes):
    """The settings of a machine, as written by hand."""
    known = {
        "kind": "ssh",
        "host": machine.host,
        "port": machine.port,
        "user": machine.user,
        "identity": str(identity),
        "host_keys": [machine.host_key_line],
        "cpus": 4,
    }
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in (known | changes).items())
    return ONE_CPU_HERE + "[providers.far]\n" + "".join(lines)


@pytest.fixture
def far(new_site, machine, identity):
    """A running site with one CPU here and four there."""
    site = new_site(settings=section(machine, identity))
    site.start()
    return site


@pytest.fixture
def bare(new_site):
    """A running site with one CPU and nothing else."""
    site = new_site(settings=ONE_CPU_HERE)
    site.start()
    return site


def add_arguments(machine, identity, *more):
    where = ("--host", machine.host, "--port", str(machine.port), "--user", machine.user)
    return ("provider", "add", "ssh", *where, "--identity", str(identity), "--name", "far", *more)


def left_there(machine):
    """What lies in gridcloud's folder on the machine; empty folders of sites may stay."""
    folder = machine.home / ".gridcloud"
    return [path for path in folder.rglob("*") if not path.is_dir() or path.parent.parent == folder]


def cut(machine):
    """Kill every session of the machine's user."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(f"sshd: {machine.user}"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def submit(site, script, **more):
    with site.client() as client:
        need = more.pop("need", Need(cpus=2))
        (job,) = client.submit(JobSpec(command=("sh", "-c", script), need=need, **more))
    return job


def end(site, job):
    with site.client() as client:
        (ended,) = client.wait(job.id)
    return ended


def wait_for_text(site, job, text):
    wait_until(lambda: text in site.cli("logs", job.id).stdout)


# Adding it


def test_add_use_check_remove(bare, machine, identity, tmp_path):
    """By the command line alone: added with its fingerprint, listed, used, checked, taken out."""
    fingerprint = keys.fingerprint(machine.host_key_line)
    added = bare.cli(*add_arguments(machine, identity, "--host-key", fingerprint, "--cpus", "4"))
    assert added.returncode == 0, added.stderr
    assert "far" in added.stdout
    assert f"{machine.user}@{machine.host}" in bare.cli("provider", "list").stdout
    done = bare.cli("run", *THERE, "--", "id", "-un", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{machine.user}\n"), done.stderr
    assert bare.cli("provider", "check", "far").returncode == 0
    bare.stop()
    bare.start()
    listed = json.loads(bare.cli("provider", "list", "--json").stdout)
    assert {info["name"]: info["problem"] for info in listed} == {"local": "", "far": ""}
    assert bare.cli("provider", "remove", "far").returncode == 0
    assert "far" not in bare.cli("provider", "list").stdout
    assert "far" not in bare.settings_file.read_text()
    assert bare.cli("provider", "check", "far").returncode == 66
    assert bare.cli("run", *THERE, "--", "true").returncode == 64
    assert left_there(machine) == []


def test_a_name_given_to_another_machine(far, machine, public, identity):
    """Jobs go where the name leads now, not where its connection led before."""
    assert far.cli("run", *THERE, "--", "id", "-un").stdout == f"{machine.user}\n"
    assert far.cli("provider", "remove", "far").returncode == 0
    with testbed.sshd(authorized=[public], host="127.0.0.44") as other:
        key = ("--host-key", other.host_key_line, "--cpus", "4")
        assert far.cli(*add_arguments(other, identity, *key)).returncode == 0
        assert far.cli("run", *THERE, "--", "id", "-un").stdout == f"{other.user}\n"


def test_the_public_key_line_serves_as_well(bare, machine, identity):
    """As it is in the machine's own file, comment and all."""
    line = f"{machine.host_key_line} root@machine"
    added = bare.cli(*add_arguments(machine, identity, "--host-key", line, "--json"))
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)[0]["problem"] == ""


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 64)])
def test_a_person_is_asked(bare, machine, identity, answer, status):
    """At a terminal the fingerprint is shown, and only a yes adds the machine."""
    ours, theirs = pty.openpty()
    command = [GRIDCLOUD, *add_arguments(machine, identity, "--cpus", "4")]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, env=bare.environment, **streams) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal ends with the program
            while chunk := os.read(ours, 4096):
                seen += chunk
                if b"[y/N]" in chunk or (b"[y/N]" in seen and b"?" in chunk):
                    os.write(ours, f"{answer}\n".encode())
        assert process.wait(60) == status, seen
    os.close(ours)
    assert keys.fingerprint(machine.host_key_line).encode() in seen
    assert ("far" in bare.cli("provider", "list").stdout) == (answer == "y")


def test_nobody_to_ask(bare, machine, identity):
    """Without a terminal or a key to expect nothing is added, and it is said how."""
    done = bare.cli(*add_arguments(machine, identity), stdin=subprocess.DEVNULL)
    assert done.returncode == 64
    assert "--host-key" in done.stderr
    assert "far" not in bare.cli("provider", "list").stdout


def test_another_fingerprint_is_refused(bare, machine, identity):
    """Both are told; nothing is kept, nobody logs in."""
    expected = keys.fingerprint(keys.public_line(keys.ephemeral()))
    before = machine.log.read_text().count("Accepted")
    done = bare.cli(*add_arguments(machine, identity, "--host-key", expected))
    assert done.returncode == 64
    assert keys.fingerprint(machine.host_key_line) in done.stderr
    assert "far" not in bare.settings_file.read_text()
    assert machine.log.read_text().count("Accepted") == before


def test_what_does_not_work_is_not_added(bare, machine, identity, tmp_path):
    """A wrong user or key, a port where nothing is, an address that is none: told, not kept."""
    fingerprint = ("--host-key", machine.host_key_line)
    stranger = tmp_path / "stranger"
    stranger.touch(0o600)
    stranger.write_bytes(keys.ephemeral().export_private_key("openssh"))
    cases = [
        (("--user", "nosuchuser"), "does not let 'nosuchuser' in"),
        (("--identity", str(stranger)), "does not let"),
        (("--identity", str(tmp_path / "absent")), "There is no SSH key"),
        (("--port", "1"), "refused"),
        (("--host", "no-such-host.invalid"), "could not be resolved"),
        (("--name", "a/b"), "name"),
        (("--user", "a b"), "user"),
    ]
    for changed, words in cases:
        done = bare.cli(*add_arguments(machine, identity, *fingerprint, *changed))
        assert done.returncode not in (0, 1), changed
        assert words in done.stderr, changed
        assert "Traceback" not in done.stderr
    assert "providers.far" not in bare.settings_file.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prot": 22}, "prot: there is no such setting"),
        ({"port": 70000}, "port: "),
        ({"host_keys": []}, "host_keys: "),
        ({"host_keys": ["SHA256:abc"]}, "host_keys.0: "),
        ({"kind": "shh"}, "'shh' is not known"),
    ],
)
def test_a_malformed_section_is_named_and_the_rest_works(
    new_site, machine, identity, changes, words
):
    """The site starts without it, and says what is wrong where providers are listed."""
    site = new_site(settings=section(machine, identity, **changes))
    site.start()
    (info,) = [i for i in json.loads(site.cli("provider", "list", "--json").stdout) if i["problem"]]
    assert info["name"] == "far"
    assert "[providers.far]" in info["problem"]
    assert words in info["problem"]
    assert site.cli("run", "--", "true").returncode == 0


# Running there


def test_a_job_with_files_and_a_status(far, machine, tmp_path):
    """Inputs go, outputs come, streams are apart, the status is the command's, nothing stays."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a b.txt").write_text("1")
    (tmp_path / "tool.sh").write_text(
        "#!/bin/sh\nmkdir r; cat 'data/a b.txt' > r/out.txt; pwd; echo err >&2; exit 5\n"
    )
    (tmp_path / "tool.sh").chmod(0o755)
    files = ("--in", "data", "--in", "tool.sh", "--out", "r/**", "--into", "back")
    done = far.cli("run", *THERE, *files, "--", "./tool.sh", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (5, "err\n")
    assert done.stdout.startswith(f"{machine.home}/.gridcloud/")
    assert (tmp_path / "back/r/out.txt").read_text() == "1"
    assert left_there(machine) == []
    assert json.loads(far.cli("status", "--json").stdout)["leases_own"] == 0


def test_output_is_live_and_a_cancel_ends_the_tree(far, machine):
    """What is printed there arrives at once; Ctrl-C ends all of it there."""
    script = "setsid sh -c 'trap \"\" TERM; echo $$; sleep 300' & wait"
    command = [GRIDCLOUD, "run", *THERE, "--", "sh", "-c", script]
    with subprocess.Popen(command, env=far.environment, stdout=subprocess.PIPE) as process:
        stubborn = int(process.stdout.readline())
        assert psutil.Process(stubborn).username() == machine.user
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not psutil.pid_exists(stubborn)
    wait_until(lambda: left_there(machine) == [])


def test_the_time_limit_holds_there(far, machine):
    """With its own status, and nothing left."""
    done = far.cli("run", *THERE, "--time", "1s", "--", "sleep", "300")
    assert done.returncode == 124
    assert "time limit" in done.stderr
    assert left_there(machine) == []


def test_bytes_pass_through_unharmed(far):
    """100 MB of every byte there is, without a newline at the end."""
    make = (
        "import os\nfor _ in range(100): os.write(1, bytes(range(256)) * 4096)\nos.write(1, b'e')"
    )
    command = [GRIDCLOUD, "run", *THERE, "--", "python3", "-c", make]
    digest = hashlib.sha256()
    with subprocess.Popen(command, env=far.environment, stdout=subprocess.PIPE) as process:
        while chunk := process.stdout.read(1 << 20):
            digest.update(chunk)
        assert process.wait(60) == 0
    expected = hashlib.sha256(bytes(range(256)) * 4096 * 100 + b"e")
    assert digest.digest() == expected.digest()


def test_an_array_fills_the_machine(far, machine, tmp_path):
    """Tasks run side by side there and here; each has its outputs."""
    script = "echo {task} > n.txt; id -un >> n.txt"
    done = far.cli(
        "run", "--array", "1-20", "--out", "n.txt", "--", "sh", "-c", script, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    words = [path.read_text().split() for path in tmp_path.glob("*/n.txt")]
    assert sorted(int(task) for task, _ in words) == list(range(1, 21))
    assert machine.user in {user for _, user in words}
    assert left_there(machine) == []


def test_names_that_are_no_text(far, machine, tmp_path):
    """Outputs whose names hold newlines or bytes that are no UTF-8 come back as they are."""
    names = [b"a\xff", b"b\nc", b"-d", b"x" * 255]
    script = f"for n in {names!r}: open(n, 'w').write('x')"
    done = far.cli("run", *THERE, "--out", "*", "--", "python3", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        os.fsencode(path.name): path.read_text() for path in tmp_path.glob("*") if path.is_file()
    }
    assert {name: found.get(name) for name in names} == dict.fromkeys(names, "x")


# When something goes wrong


def test_a_cut_connection_goes_unnoticed_by_the_job(far, machine):
    """Sessions killed twice: the job goes on, its log is whole and each line is there once."""
    job = submit(far, "for i in $(seq 100); do echo line $i; sleep 0.1; done; exit 3")
    for text in ("line 2\n", "line 12\n"):
        wait_for_text(far, job, text)
        cut(machine)
    assert end(far, job).outcome.exit_code == 3
    expected = "".join(f"line {number}\n" for number in range(1, 101))
    assert far.cli("logs", job.id).stdout == expected
    assert "trying again" in far.cli("events", job.id).stdout
    assert left_there(machine) == []


def test_a_site_that_was_killed_finds_its_job(far, machine, tmp_path):
    """kill -9 while it runs there: found again, log whole, outputs brought back."""
    script = "for i in $(seq 20); do echo $i; sleep 0.1; done; echo r > r.txt"
    job = submit(far, script, outputs=("r.txt",), into=str(tmp_path / "out"))
    wait_for_text(far, job, "3\n")
    far.kill()
    far.start()
    assert end(far, job).state is JobState.COMPLETED
    assert far.cli("logs", job.id).stdout.split() == [str(n) for n in range(1, 21)]
    assert (tmp_path / "out/r.txt").read_text() == "r\n"
    assert left_there(machine) == []


@pytest.mark.skipif(os.getuid() != 0, reason="a network of its own takes root")
def test_a_link_that_is_down_for_a_while(new_site, public, identity):
    """Five seconds without a network change nothing."""
    with testbed.sshd(authorized=[public], network=True) as machine:
        site = new_site(settings=section(machine, identity))
        site.start()
        job = submit(site, "hostname; for i in $(seq 60); do echo $i; sleep 0.1; done")
        wait_for_text(site, job, "5\n")
        link = json.loads(
            subprocess.check_output(["ip", "-j", "route", "get", machine.host], text=True)
        )[0]["dev"]
        subprocess.run(["ip", "link", "set", link, "down"], check=True)
        time.sleep(5)
        subprocess.run(["ip", "link", "set", link, "up"], check=True)
        assert end(site, job).state is JobState.COMPLETED
        expected = ["another", *(str(n) for n in range(1, 61))]
        assert site.cli("logs", job.id).stdout.split() == expected
        assert left_there(machine) == []
        site.close()


def test_a_changed_host_key_is_never_connected_on(new_site, machine, identity):
    """Both fingerprints are told, nothing is sent, jobs wait and can be canceled."""
    expected = keys.public_line(keys.ephemeral())
    before = machine.log.read_text().count("Accepted")
    site = new_site(settings=section(machine, identity, host_keys=[expected]) + "memory = '8G'\n")
    site.start()
    done = site.cli("provider", "check", "far")
    assert done.returncode == 69
    listed = site.cli("provider", "list", "--json").stdout
    for line in (expected, machine.host_key_line):
        assert keys.fingerprint(line) in listed
    job = submit(site, "true")
    wait_until(lambda: "changed" in site.cli("events", job.id).stdout)
    assert site.cli("cancel", job.id).stdout == f"{job.id} CANCELED\n"
    assert machine.log.read_text().count("Accepted") == before


def test_an_unreachable_machine_makes_jobs_wait(new_site, machine, identity):
    """They say for what; work at home goes on meanwhile, and nobody waits for the machine."""
    settings = section(machine, identity, port=1) + "memory = '8G'\n"
    site = new_site(settings=settings)
    site.start()
    job = submit(site, "true")
    wait_until(lambda: "refused" in site.cli("events", job.id).stdout)
    assert site.cli("run", "--", "echo", "hi").stdout == "hi\n"
    site.cli("cancel", job.id)


def test_a_key_changed_in_the_settings_leaves_the_running_job_reachable(new_site, public, identity):
    """Its lease remembers the key that the machine had; new work goes by the settings."""
    with testbed.sshd(authorized=[public], host="127.0.0.42") as machine:
        site = new_site(settings=section(machine, identity))
        site.start()
        job = submit(site, "echo on; sleep 60")
        wait_for_text(site, job, "on\n")
        site.kill()
        stranger = keys.public_line(keys.ephemeral())
        text = site.settings_file.read_text().replace(machine.host_key_line, stranger)
        site.settings_file.write_text(text)
        site.start()
        wait_until(lambda: "found again" in site.cli("events", job.id).stdout)
        assert site.cli("provider", "check", "far").returncode == 69
        site.cli("cancel", job.id)
        wait_until(lambda: end(site, job).state is JobState.CANCELED)
        site.close()


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        ("PATH=/nonexistent; eval $SSH_ORIGINAL_COMMAND", "no python3"),
        (
            "echo gridcloud-supervisor-begins; printf "
            '\'{\\"event\\": \\"error\\", \\"code\\": \\"old-python\\", '
            '\\"message\\": \\"Python 3.6.8 is too old.\\"}\\n\'; exit 97',
            "3.6.8 is too old",
        ),
        ("echo This account is not available; exit 1", "not available"),
    ],
)
def test_a_machine_that_lacks_python(bare, public, identity, forced, words):
    """It is not added, and what is missing is said."""
    line = f'command="{forced}" {public}'
    with testbed.sshd(authorized=[line], host="127.0.0.43") as machine:
        done = bare.cli(*add_arguments(machine, identity, "--host-key", machine.host_key_line))
    assert done.returncode not in (0, 1)
    assert words in done.stderr
    assert "python3" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_there_fails_the_job_with_the_cause(far, machine, tmp_path):
    """Clearly and at once; when there is room, jobs run again."""
    folder = machine.home / ".gridcloud"
    folder.mkdir(exist_ok=True)
    mode = ("-o", "size=2m,mode=777")
    subprocess.run(["mount", "-t", "tmpfs", *mode, "tmpfs", folder], check=True)
    try:
        (tmp_path / "big").write_bytes(b"x" * 4 * 1024 * 1024)
        done = far.cli("run", *THERE, "--in", "big", "--", "true", cwd=tmp_path)
        assert done.returncode == 1
        assert "space" in done.stderr
        assert far.cli("run", *THERE, "--", "true").returncode == 0
        assert left_there(machine) == []
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
