"""Machines without a job, through a real site: by the command line, with real SSH, over crashes."""

import json
import os
import pty
import signal
import subprocess

import pytest

from testbeds import sshd as testbed
from testbeds.folder_cloud import started_with
from testbeds.folder_site import reachable_site
from testbeds.sites import GRIDCLOUD, SiteProcess, wait_until


@pytest.fixture
def cloud(tmp_path):
    """Return the folder of a cloud."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    return folder


@pytest.fixture
def site(tmp_path, cloud):
    """Return a site that knows that cloud."""
    settings = f'[providers.cloud]\nkind = "folder"\nfolder = "{cloud}"\n'
    made = SiteProcess(tmp_path / "site", "site", settings, started_with(tmp_path))
    made.start()
    yield made
    made.close()


def machines(cloud):
    return sorted(path.stem for path in cloud.glob("*.machine"))


def calls(cloud, what):
    return [line for line in (cloud / "calls").read_text().splitlines() if line.startswith(what)]


def start(site, *more):
    return site.cli("machine", "start", "--name", "web", *more)


def test_start_list_show_extend_stop(site, cloud):
    """Plan, steps and price are told; the machine is listed, lengthened and gone in the end."""
    done = start(site, "--time", "2h")
    assert done.returncode == 0, done.stderr
    assert "plan: site/cloud small in here (1 CPU, 2 GiB): 0.25 EUR an hour" in done.stderr
    assert "next: site/cloud large" in done.stderr
    assert "shape: chosen: site/cloud small in here" in done.stderr
    assert "gridcloud machine ssh web" in done.stdout
    assert len(machines(cloud)) == 1
    listed = site.cli("machine", "list").stdout
    assert "web" in listed
    assert "ready" in listed
    shown = site.cli("machine", "show", "web", "--log").stdout
    assert "login:" in shown
    before = json.loads(site.cli("machine", "show", "web", "--json").stdout)["machine"]
    assert site.cli("machine", "extend", "web", "3h").returncode == 0
    after = json.loads(site.cli("machine", "show", "web", "--json").stdout)["machine"]
    assert after["ends_at"] > before["ends_at"]
    assert len(calls(cloud, "lengthen")) == 1
    assert site.cli("machine", "stop", "web").stdout == "web ended\n"
    assert machines(cloud) == []
    assert "no machines" in site.cli("machine", "list").stdout
    assert "web" in site.cli("machine", "list", "--all").stdout


def test_costs_are_told(site, cloud):
    """By month, provider and shape, in the provider's currency; and as CSV."""
    start(site)
    site.cli("machine", "stop", "web")
    (row,) = json.loads(site.cli("costs", "--json").stdout)["rows"]
    assert (row["provider"], row["shape"], row["currency"]) == ("cloud", "small", "EUR")
    assert row["machines"] == 1
    assert "in all:" in site.cli("costs").stdout
    assert site.cli("costs", "--csv").stdout.startswith("month,provider,shape")
    assert site.cli("costs", "--since", "2990-01-01").stdout == "no machine was made at a cloud\n"


def test_a_cloud_is_proved_by_a_machine(site, cloud):
    """``provider check`` makes one and deletes it; ``--quick`` makes none."""
    done = site.cli("provider", "check", "cloud")
    assert done.returncode == 0, done.stderr
    assert "cloud works: a small was made, logged in to, and deleted" in done.stdout
    assert len(calls(cloud, "launch")) == 1
    assert machines(cloud) == []
    assert site.cli("provider", "check", "--quick", "cloud").returncode == 0
    assert len(calls(cloud, "launch")) == 1


def test_a_cloud_that_cannot_make_one_is_told(tmp_path, cloud):
    """With the cloud's own words, and an exit status."""
    settings = f'[providers.cloud]\nkind = "folder"\nfolder = "{cloud}"\nmachines = 0\n'
    site = SiteProcess(tmp_path / "site", "site", settings, started_with(tmp_path))
    try:
        site.start()
        done = site.cli("provider", "check", "cloud")
        assert done.returncode != 0
        assert "quota" in done.stderr
    finally:
        site.close()


def test_a_killed_site_goes_on_with_a_launch(site, cloud):
    """The same machine becomes ready after a restart; nothing is made twice."""
    (cloud / "slow").touch()
    start(site, "--detach")
    wait_until(lambda: machines(cloud))
    first = machines(cloud)
    site.kill()
    site.start()
    (cloud / "slow").unlink()
    with site.client() as client:
        assert client.wait_machine("web").state.value == "ready"
    assert machines(cloud) == first


def test_an_interrupted_wait_leaves_the_launch_going_on(site, cloud):
    """Ctrl-C ends the watching, and says how to go on."""
    (cloud / "slow").touch()
    waiting = subprocess.Popen(
        [GRIDCLOUD, "machine", "start", "--name", "web"],
        env=site.environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_until(lambda: machines(cloud))
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "machine stop web" in said
    (cloud / "slow").unlink()
    with site.client() as client:
        assert client.wait_machine("web").state.value == "ready"


def test_what_ends_by_itself_is_noticed(site, cloud):
    """A machine whose end has come is given back with nobody asking; one that somebody deleted by
    hand is off the books, and said to be gone."""
    start(site)
    (name,) = machines(cloud)
    assert site.cli("machine", "start", "--name", "brief", "--time", "4s").returncode == 0
    (cloud / f"{name}.machine").unlink()
    with site.client() as client:
        wait_until(lambda: client.machine("brief").state.value == "ended", 120)
        assert client.machine("brief").reason == "its end has come"
        assert machines(cloud) == []
        wait_until(lambda: client.machine("web").state.value == "ended", 120)
        assert "deleted by somebody else" in client.machine("web").reason


def test_an_api_that_is_away_forgets_nothing(site, cloud):
    """What was asked for meanwhile is done when it is back; the site says what is wrong."""
    start(site)
    (cloud / "down").touch()
    done = site.cli("machine", "stop", "--no-wait", "web")
    assert done.stdout == "web ending\n"
    with site.client() as client:
        wait_until(lambda: any("does not answer" in p for p in client.status().problems), 60)
        assert client.machine("web").state.value == "ending"
    assert len(machines(cloud)) == 1
    site.kill()
    (cloud / "down").unlink()
    site.start()
    wait_until(lambda: not machines(cloud), 60)


def test_sweep_with_an_empty_store(site, cloud, tmp_path):
    """Losing the store loses no machine: all that carries the site's tag is found and removed."""
    start(site)
    (cloud / "data.volume").touch()
    report = json.loads(site.cli("sweep", "--dry-run", "--json").stdout)
    assert sorted(thing["fate"] for thing in report["things"]) == ["in use", "kept"]
    site.kill()
    for path in site.state.glob("site.db*"):
        path.unlink()
    (cloud / "unlisted").touch()  # or the house-keeping would be first
    site.start()
    shown = site.cli("sweep", "--dry-run")
    assert "stray" in shown.stdout
    assert len(machines(cloud)) == 1
    assert "removed" in site.cli("sweep").stdout
    assert machines(cloud) == []
    assert (cloud / "data.volume").exists()


def test_bad_orders_are_told_before_anything_is_made(site, cloud, tmp_path):
    """Each names the option that is wrong."""
    for words, told in (
        (("--volume", "data"), "--volume data is no volume"),
        (("--user-data", str(tmp_path / "absent")), "No such file"),
        (("--playbook", "absent.yml"), "there is no such file"),
        (("--var", "a=b"), "--playbook"),
        (("--name", "Not_A_Name"), "--name"),
        (("--cpus", "99"), "No provider here ever makes"),
        (("--spot",), "spot"),
    ):
        done = site.cli("machine", "start", *words)
        assert done.returncode != 0
        assert told in done.stderr, done.stderr
    assert machines(cloud) == []


@pytest.fixture
def reachable(tmp_path, cloud):
    """Return a site whose machines are a real sshd that trusts its certificates."""
    with reachable_site(tmp_path, cloud, "127.0.0.41") as found:
        yield found


@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
def test_ssh_runs_commands_and_ends_as_they_end(reachable, tmp_path):
    """By a certificate made for this once; nothing of it stays in the temporary folder."""
    site, _ = reachable
    assert start(site).returncode == 0
    (tmp_path / "tmp").mkdir()
    temporary = {"TMPDIR": str(tmp_path / "tmp")}
    done = site.cli("machine", "ssh", "web", "--", "echo $((6*7)); exit 5", env=temporary)
    assert (done.stdout, done.returncode) == ("42\n", 5), done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
def test_ssh_gives_a_terminal(reachable):
    """At a terminal, what runs there has one."""
    site, _ = reachable
    assert start(site).returncode == 0
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [GRIDCLOUD, "machine", "ssh", "web"],
        env=site.environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    os.write(leader, b"test -t 0 && echo it-is-a-$((1+1))-way-terminal; exit\n")
    said = b""
    while b"it-is-a-2-way-terminal" not in said:
        said += os.read(leader, 4096)
    assert process.wait(30) == 0
    os.close(leader)


@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
def test_a_terminated_ssh_leaves_no_key(reachable, tmp_path):
    """SIGTERM ends ssh as well, and the key goes with it."""
    site, _ = reachable
    assert start(site).returncode == 0
    folder = tmp_path / "tmp"
    folder.mkdir()
    with subprocess.Popen(
        [GRIDCLOUD, "machine", "ssh", "web", "--", "echo on; sleep 60"],
        env=site.environment | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"on\n"
        assert list(folder.iterdir())
        process.terminate()
        process.wait(30)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
def test_a_certificate_is_for_its_own_lease(reachable):
    """A machine of another lease does not let it in."""
    site, machine = reachable
    assert start(site).returncode == 0
    (machine.folder / "principals").write_text("another-lease\n")
    done = site.cli("machine", "ssh", "web", "--", "true")
    assert done.returncode == 255
    assert "Permission denied" in done.stderr
