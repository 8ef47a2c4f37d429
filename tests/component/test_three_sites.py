"""Three real sites over real iroh: what does not fit at home runs at a peer, and all comes back."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from gridcloud.errors import GridcloudError
from gridcloud.model import JobSpec, JobState, Need
from testbeds.sites import GRIDCLOUD, SiteProcess, wait_until

pytestmark = pytest.mark.component
LENDING = '[lending]\nenabled = true\nmax_time = "1h"\ndisk = "1G"\n'
#: Runs a site whose clock is ahead: all that the broker signs, sends and checks is shifted.
FAST_CLOCK = """
from datetime import UTC, datetime, timedelta
from gridcloud.grid.broker import Broker
plain = Broker.__init__
def shifted(self, *arguments):
    plain(self, *arguments, clock=lambda: datetime.now(UTC) + timedelta(minutes=10))
Broker.__init__ = shifted
from gridcloud.site.__main__ import main
main()
"""
NONSENSE = (
    b"Welcome to this machine!\n",
    b'{"event": "done", "outputs": 7}\n',
    b'{"event": "prepared"}\n',
    b'{"event": "prepared", "work": "/nonesuch"}\n{"event": "done", "exit_code": "x"}\n',
    b"[]\n" * 3,
    b'{"event": "output", "stream": "stdout", "size": -5}\nab',
    b"",
)
#: Runs a site whose sandboxes answer every command with one of `NONSENSE`, each its own.
LIAR = f"""
import itertools, os
from gridcloud.site.lending import Guest
texts, told = itertools.cycle({NONSENSE!r}), {{}}
async def run(self, command, stdin_fd, stdout_fd, stderr_fd, env):
    if self.lease_id not in told:
        told[self.lease_id] = next(texts)
    os.write(stdout_fd, told[self.lease_id])
    return 0
Guest.run = run
from gridcloud.site.__main__ import main
main()
"""


def settings(cpus, more=""):
    return f'[providers.local]\ncpus = {cpus}\nmemory = "4G"\n{more}'


def start_changed(site, program):
    """Start a site's daemon with something changed in it by ``program``."""
    with (site.folder / "site.log").open("ab") as log:
        site.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=site.environment,
            start_new_session=True,
        )
    wait_until(lambda: "site is up" in site.log() or site.process.poll() is not None)
    wait_until(lambda: site.cli("status").returncode == 0)


def form(community, founder, *others):
    """Found a community and let the others join."""
    with founder.client() as inviter:
        inviter.create_community(community)
        for other in others:
            with other.client() as joining:
                joining.join_community(inviter.invite(community).code)


def status(site):
    return json.loads(site.cli("status", "--json").stdout)


def problem(site, peer):
    """Return what a site says is the matter with a peer's offer."""
    with site.client() as client:
        verdicts = client.offers().plan.verdicts
    return " ".join(v.offer.problem for v in verdicts if v.offer.site == peer)


def nothing_lent(site):
    """Whether a site lends nothing any more, and nothing is left of what it lent."""
    sandboxes = site.state / "sandboxes"
    folders = list(sandboxes.iterdir()) if sandboxes.exists() else []
    return status(site)["leases_lent"] == 0 and not folders and site.left() == [site.process.pid]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Three sites in one community; every test leaves them as it found them."""
    folder = tmp_path_factory.mktemp("grid")
    laptop = SiteProcess(folder / "laptop", "laptop", settings(1))
    university = SiteProcess(folder / "university", "university", settings(2, LENDING))
    institute = SiteProcess(folder / "institute", "institute", settings(1, LENDING))
    sites = (laptop, university, institute)
    try:
        for site in sites:
            site.start()
        form("foam", *sites)
        yield sites
    finally:
        for site in sites:
            site.close()


@pytest.fixture
def here(tmp_path):
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def test_a_job_too_large_for_home_runs_in_a_peers_sandbox(grid, here):
    """Files, folders, executable bits, odd names and both streams come through; nothing stays."""
    laptop, university, _ = grid
    (here / "data" / "süß").mkdir(parents=True)
    (here / "data" / "süß" / "☃ a.txt").write_text("schnee")
    (here / "data" / "tool").write_text('#!/bin/sh\nmkdir -p r; cat "data/süß/☃ a.txt" > "r/é è"\n')
    (here / "data" / "tool").chmod(0o755)
    script = "data/tool; printf '#!/bin/sh\\necho made' > r/run; chmod +x r/run; touch r/empty; "
    script += "hostname; echo wrong >&2; exit 3"
    arguments = ("--cpus", "2", "--in", "data", "--out", "r/**")
    done = laptop.cli("run", *arguments, "--", "sh", "-c", script, cwd=here)
    assert (done.returncode, done.stdout, done.stderr) == (3, "guest\n", "wrong\n")
    assert {path.name for path in (here / "r").iterdir()} == {"é è", "run", "empty"}
    assert (here / "r" / "é è").read_text() == "schnee"
    assert subprocess.check_output([here / "r" / "run"], text=True) == "made\n"
    assert (here / "r" / "empty").stat().st_size == 0
    assert not os.access(here / "r" / "é è", os.X_OK)
    with laptop.client() as client:
        assert client.jobs()[-1].site == "university"
    wait_until(lambda: nothing_lent(university))
    assert not list((laptop.state / "keys" / "loans").iterdir())


def test_twenty_megabytes_pass_through_unharmed(grid, here):
    """Binary output of a borrowed job, on stdout and as a file, arrives whole."""
    laptop = grid[0]
    make = (
        "import sys; d = bytes(range(256)) * 81920 + b'end';"
        "open('big', 'wb').write(d); sys.stdout.buffer.write(d)"
    )
    command = [GRIDCLOUD, "run", "--cpus", "2", "--out", "big", "--", "python3", "-c", make]
    done = subprocess.run(
        command, env=laptop.environment, cwd=here, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = hashlib.sha256(bytes(range(256)) * 81920 + b"end").digest()
    assert hashlib.sha256(done.stdout).digest() == expected
    assert hashlib.sha256((here / "big").read_bytes()).digest() == expected


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--", "sh", "-c", "kill -9 $$"], 137, "signal 9"),
        (["--time", "1s", "--", "sleep", "60"], 124, "time limit"),
        (["--", "no-such-command"], 127, "no-such-command"),
        (["--out", "*.csv", "--", "true"], 1, "no file matches"),
        (["--out", "leak", "--", "ln", "-s", "/etc/passwd", "leak"], 1, "leads out"),
    ],
)
def test_a_borrowed_job_that_fails_says_why(grid, here, arguments, code, words):
    """Signal, time limit, missing program and outputs: the same words and status as at home."""
    done = grid[0].cli("run", "--cpus", "2", *arguments, cwd=here)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert not list(here.iterdir())


def test_live_output_then_cancel_ends_it_at_the_peer(grid):
    """What is printed there appears here at once; Ctrl-C ends the whole tree and the loan."""
    laptop, university, _ = grid
    script = "echo first; setsid sleep 300 & trap '' TERM; sleep 300; sleep 300"
    command = [GRIDCLOUD, "run", "--cpus", "2", "--", "sh", "-c", script]
    with subprocess.Popen(command, env=laptop.environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"first\n"
        assert status(university)["leases_lent"] == 1
        assert status(laptop)["leases_borrowed"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    with laptop.client() as client:
        assert client.jobs()[-1].state is JobState.CANCELED
    wait_until(lambda: nothing_lent(university))
    wait_until(lambda: status(laptop)["leases_borrowed"] == 0)


def test_an_array_spreads_over_all_sites(grid, here):
    """Tasks run at home and at both peers; each brings its own result once."""
    laptop = grid[0]
    script = "sleep 0.7; echo {task} > n.txt"
    done = laptop.cli(
        "run", "--json", "--array", "1-12", "--out", "n.txt", "--", "sh", "-c", script, cwd=here
    )
    assert done.returncode == 0, done.stderr
    assert {job["site"] for job in json.loads(done.stdout)} == {"laptop", "university", "institute"}
    found = {path.name: (path / "n.txt").read_text() for path in here.iterdir()}
    assert found == {str(n): f"{n}\n" for n in range(1, 13)}
    wait_until(lambda: nothing_lent(grid[1]) and nothing_lent(grid[2]))


def test_a_pinned_job_runs_there_and_nowhere_else(grid):
    """``--site`` is obeyed although the job fits at home; an unknown site is an error."""
    done = grid[0].cli("run", "--json", "--site", "institute", "--", "hostname")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["site"] == "institute"
    done = grid[0].cli("run", "--site", "atlantis", "--", "true")
    assert (done.returncode, "No site called 'atlantis'" in done.stderr) == (64, True)


def test_offers_tell_why_each_loser_lost(grid):
    """All sites are judged with reasons, and nothing comes of it."""
    laptop = grid[0]
    before = status(laptop)
    done = laptop.cli("offers", "--cpus", "2")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 CPUs" in done.stdout
    plan = json.loads(laptop.cli("offers", "--cpus", "2", "--json").stdout)["plan"]
    found = {v["offer"]["site"]: (v["rank"], v["reasons"]) for v in plan["verdicts"]}
    assert found["university"] == (1, [])
    assert found["laptop"][1]
    assert found["institute"][1]
    done = laptop.cli("offers", "--time", "9h", "--json")
    plan = json.loads(done.stdout)["plan"]
    assert "lends for 1h 00m at most" in str(plan["verdicts"])
    assert status(laptop) == before
    assert status(grid[1])["leases_lent"] == 0


def test_a_guest_sees_nothing_of_its_host(grid, tmp_path):
    """Not the lender's state, keys, home or other files, and no network, not even loopback."""
    laptop, university, _ = grid
    secret = Path.home() / f".gridcloud-test-{os.getpid()}"
    secret.write_text("secret")
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            script = f"""
for path in {university.state} {university.state}/keys {university.folder} {tmp_path} {secret}; do
    test -e $path && echo seen $path
done
test $(ls /proc | grep -c '^[0-9]') -lt 12 || echo sees processes
python3 -c 'import socket; socket.create_connection(("127.0.0.1", {port}), 2)' 2>&1 | tail -1
env | grep -i gridcloud_s
exit 0
"""
            done = laptop.cli("run", "--cpus", "2", "--", "sh", "-c", script)
    finally:
        secret.unlink()
    assert done.returncode == 0, done.stderr
    (only,) = done.stdout.splitlines()
    assert "Error" in only


def test_communities_by_command_line(new_site):
    """Found, invite, join, members, list and leave; a member that is away is marked."""
    one, two = new_site("one"), new_site("two")
    one.start()
    two.start()
    assert "founded physics." in one.cli("community", "create", "physics").stdout
    code = one.cli("community", "invite", "physics").stdout.strip()
    joined = two.cli("community", "join", input=code)
    assert (joined.returncode, "joined physics." in joined.stdout) == (0, True), joined.stderr
    again = two.cli("community", "join", code)
    assert (again.returncode, "in physics already" in again.stderr) == (73, True)
    names = [m["site_name"] for m in json.loads(two.cli("community", "members", "--json").stdout)]
    assert names == ["one", "two"]
    assert "physics" in two.cli("community", "list").stdout
    two.stop()
    members = json.loads(one.cli("community", "members", "physics", "--json").stdout)
    assert "unreachable" in members[1]["problem"]
    two.start()
    assert two.cli("community", "leave", "physics").returncode == 0
    assert json.loads(two.cli("community", "list", "--json").stdout) == []
    members = json.loads(one.cli("community", "members", "--json").stdout)
    assert [member["site_name"] for member in members] == ["one"]


def test_two_communities_stay_apart(new_site):
    """A lender that names one community lends to that alone; who shares none is not seen."""
    one = new_site("one", settings(1))
    two = new_site("two", settings(2, LENDING + 'communities = ["physics"]\n'))
    three = new_site("three", settings(1))
    for site in (one, two, three):
        site.start()
    form("physics", one, two)
    form("history", three, two)
    with one.client() as client:
        assert client.members("physics")[1].site_name == "two"
        assert [each.name for each in client.communities()] == ["physics"]
        assert {v.offer.site for v in client.offers().plan.verdicts} == {"one", "two"}
    with two.client() as client:
        assert {each.name for each in client.communities()} == {"physics", "history"}
    assert one.cli("run", "--cpus", "2", "--", "hostname").stdout == "guest\n"
    assert three.cli("run", "--cpus", "2", "--", "hostname").returncode == 64
    assert "lends nothing in history" in problem(three, "two")


def test_invitations_that_are_no_good(new_site):
    """Expired, used, forged, garbled, or of a community since left: a cause, a status, no join."""
    one, two, three = new_site("one"), new_site("two"), new_site("three")
    one.start()
    two.start()
    three.start()
    form("physics", one)
    with one.client() as client:
        code = client.invite("physics").code
        brief = client.invite("physics", valid_for=timedelta(seconds=0.3)).code
        assert two.cli("community", "join", code).returncode == 0
        client.create_community("closed")
        left = client.invite("closed").code
        client.leave_community("closed")
    head, body, signature = brief.split(".")
    forged = f"{head}.{code.split('.')[1]}.{signature}"
    for bad, words in (
        (code, "already used"),
        (f"{head}.{body}", "not a signed document"),
        (forged, "signature"),
        (code[:-20], "signature"),
        ("hello", "not a join code"),
        (left, "left"),
    ):
        done = three.cli("community", "join", bad)
        assert done.returncode not in (0, 1, 2, 70), (words, done)
        assert words in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert json.loads(three.cli("community", "list", "--json").stdout) == []
    # Clocks that differ are forgiven a minute: here it is later than that.
    three.stop()
    start_changed(three, FAST_CLOCK)
    done = three.cli("community", "join", brief)
    assert (done.returncode, "expired" in done.stderr) == (77, True), done
    for arguments in (("invite", "nonesuch"), ("leave", "nonesuch"), ("create", "No Name")):
        done = three.cli("community", *arguments)
        assert done.returncode in (64, 66), done
        assert done.stderr


def test_a_clock_that_is_off_is_named(new_site):
    """Ten minutes of difference are refused with the clock as the cause, on both sides."""
    one, two = new_site("one"), new_site("two", settings(8, LENDING))
    one.start()
    two.start()
    form("physics", one, two)
    two.stop()
    start_changed(two, FAST_CLOCK)
    with one.client() as client:
        member = client.members("physics")[1]
        assert "clock is 10m" in member.problem
    assert "clock is 10m" in problem(one, "two")
    with two.client() as client:
        assert "clock is 10m" in client.members("physics")[0].problem
    with one.client() as client:
        code = client.invite("physics").code
    three = new_site("three")
    start_changed(three, FAST_CLOCK)
    done = three.cli("community", "join", code)
    assert (done.returncode, "clock" in done.stderr) == (73, True), done.stderr


def test_a_peer_that_cannot_serve_is_told_from_one_that_is_away(new_site):
    """Does not lend, is full, is down: three reasons; a job waits for the one that may yet come."""
    one = new_site("one", settings(1))
    miser = new_site("miser", settings(4))
    full = new_site("full", settings(2, LENDING))
    for site in (one, miser, full):
        site.start()
    form("physics", one, miser, full)
    with full.client() as client:
        (blocker,) = client.submit(JobSpec(command=("sleep", "300"), need=Need(cpus=2)))
        wait_until(lambda: client.job(blocker.id)[0].state is JobState.ACTIVE)
    with one.client() as client:
        need = Need(cpus=2)

        def reasons(name):
            verdicts = client.offers(need).plan.verdicts
            return str([v.reasons or v.offer.problem for v in verdicts if v.offer.site == name])

        wait_until(lambda: "0 of 2 CPUs" in reasons("full"), 20)
        assert "lends nothing" in reasons("miser") or "0 of 2" in reasons("miser")
        (job,) = client.submit(JobSpec(command=("hostname",), need=need))
        wait_until(lambda: any("waiting" in event.message for event in client.events(job.id)))
        with full.client() as lender:
            lender.cancel(blocker.id)
        (ended,) = client.wait(job.id, timedelta(seconds=40))
        assert (ended.state, ended.site) == (JobState.COMPLETED, "full"), ended
        full.stop()
        wait_until(lambda: "unreachable" in reasons("full"), 30)
        with contextlib.suppress(GridcloudError):
            client.submit(JobSpec(command=("hostname",), need=need))


def test_a_machine_that_answers_nonsense_fails_the_job(new_site):
    """Whatever a lender's machine says, the jobs end, with the cause, and the site lives on."""
    count = len(NONSENSE)
    # A job that may have begun is asked after for as long as its lease lasts, so that is short.
    lending = LENDING.replace("1h", "4s")
    one, liar = new_site("one", settings(1)), new_site("liar", settings(2 * count, lending))
    one.start()
    start_changed(liar, LIAR)
    form("physics", one, liar)
    spec = JobSpec(
        command=("true",),
        need=Need(cpus=2, memory_bytes=2**26),
        tasks=tuple(range(count)),
    )
    with one.client() as client:
        jobs = client.submit(spec)
        ended = client.wait(jobs[0].array_id, timedelta(seconds=50))
    assert {job.state for job in ended} == {JobState.FAILED}, (ended, one.log())
    assert all(job.message for job in ended)
    assert "Traceback" not in one.log()
    assert one.cli("run", "--", "true").returncode == 0
