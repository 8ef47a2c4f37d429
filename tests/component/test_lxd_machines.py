"""Whole sites with machines that boot at a real LXD, and what goes wrong with them."""

import json
import subprocess
import time

import pytest

from testbeds.sites import GRIDCLOUD, wait_until

pytestmark = [pytest.mark.xdist_group("lxd"), pytest.mark.timeout(900)]
BOOTED = 240.0


@pytest.fixture
def new_lxd_site(new_site, lxd):
    """Return a function that starts a site whose machines are made at a project of the LXD."""

    def make(variant="debian", name="site", **patience):
        limits = ", ".join(f'{step} = "{limit}"' for step, limit in patience.items())
        site = new_site(
            name,
            f"""
[providers.lxd]
kind = "lxd"
socket = "{lxd.socket}"
project = "{lxd.name}"
image = "{lxd.image(variant)}"
user = "debian"
shapes.small = {{cpus = 1, memory = "512MiB", price = 0.1, currency = "EUR"}}
patience = {{{limits}}}
""",
        )
        site.start()
        return site

    return make


def patiently(site, *arguments):
    """Run a command that waits for a boot."""
    return subprocess.run(
        [GRIDCLOUD, *arguments],
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=BOOTED,
        check=False,
    )


def start(site, *more):
    """Start a machine called ``web`` and wait until it is ready or given up."""
    told = ("--name", "web", "--memory", "256M", "--yes")
    return patiently(site, "machine", "start", *told, *more)


def shown(site):
    return json.loads(site.cli("machine", "show", "web", "--json").stdout)["machine"]


def test_a_site_runs_a_job_on_a_machine_made_for_it(new_lxd_site, lxd):
    """`run` boots a machine with cloud-init, runs there, and nothing is left."""
    site = new_lxd_site()
    done = patiently(site, "run", "--kind", "lxd", "--memory", "256M", "--", "hostname")
    assert done.returncode == 0, done.stderr + site.log()
    assert done.stdout.strip().startswith("gridcloud")
    wait_until(lambda: not lxd.left())


def test_one_is_added_and_proved_by_a_machine(new_site, lxd):
    """`provider add` needs nobody to ask, and `check` makes a machine, logs in, and deletes it."""
    site = new_site()
    site.start()
    told = {"socket": lxd.socket, "project": lxd.name, "image": lxd.image(), "user": "debian"}
    told["shapes"] = '{small = {cpus = 1, memory = "512MiB"}}'
    given = [f"--set={setting}={value}" for setting, value in told.items()]
    added = site.cli("provider", "add", "lxd", *given)
    assert added.returncode == 0, added.stderr
    done = patiently(site, "provider", "check", "lxd")
    assert done.returncode == 0, done.stdout + done.stderr + site.log()
    wait_until(lambda: not lxd.left())


def test_user_data_and_a_volume_that_outlives_its_machine(new_lxd_site, lxd, tmp_path):
    """What cloud-init is told is done; what is written on the volume is there for the next."""
    site = new_lxd_site()
    data = tmp_path / "data"
    data.write_text("#cloud-config\nwrite_files: [{path: /etc/told, content: by cloud-init}]\n")
    more = ("--user-data", str(data), "--volume", "results:64M:/srv/results")
    done = start(site, *more)
    assert done.returncode == 0, done.stderr + site.log()
    told = site.cli("machine", "ssh", "web", "cat", "/etc/told")
    assert told.stdout.strip() == "by cloud-init", told.stderr
    written = site.cli("machine", "ssh", "web", "echo kept > /srv/results/file")
    assert written.returncode == 0, written.stderr
    assert site.cli("machine", "stop", "web").returncode == 0
    assert [volume["name"].rpartition("-")[2] for volume in lxd.volumes()] == ["results"]
    assert lxd.instances() == []
    done = start(site, "--volume", "results:0:/srv/results")
    assert done.returncode == 0, done.stderr
    again = site.cli("machine", "ssh", "web", "cat", "/srv/results/file")
    assert again.stdout.strip() == "kept", again.stderr


def test_a_site_killed_in_a_launch_goes_on_with_it(new_lxd_site, lxd):
    """After kill -9 the machine becomes ready, is the only one, and leaves nothing."""
    site = new_lxd_site()
    assert start(site, "--detach").returncode == 0
    wait_until(lambda: lxd.instances())
    site.kill()
    site.start()
    wait_until(lambda: shown(site)["state"] == "ready", BOOTED)
    assert len(lxd.instances()) == 1
    assert site.cli("machine", "stop", "web").returncode == 0
    assert lxd.left() == []


def test_a_machine_ends_itself_when_its_site_is_gone(new_lxd_site, lxd):
    """At its end it powers itself off and LXD deletes it, though nobody is there to do it."""
    site = new_lxd_site()
    assert start(site, "--time", "60s", "--detach").returncode == 0
    began = time.monotonic()
    wait_until(lambda: shown(site)["state"] == "ready", BOOTED)
    site.kill()
    assert lxd.instances()
    wait_until(lambda: not lxd.left(), BOOTED)
    assert time.monotonic() - began > 55


def test_a_machine_deleted_by_hand_is_no_error(new_lxd_site, lxd):
    """It can be stopped all the same, and nothing is found to be swept."""
    site = new_lxd_site()
    assert start(site).returncode == 0, site.log()
    (instance,) = lxd.instances()
    lxd.lxc("delete", "--force", instance["name"])
    assert site.cli("machine", "stop", "web").returncode == 0
    assert site.cli("sweep").returncode == 0
    assert lxd.left() == []


def test_a_job_whose_machine_is_deleted_by_hand_runs_on_another(new_lxd_site, lxd):
    """Of the only shape there is; whoever stays with it sees both being made, and why."""
    site = new_lxd_site()
    command = ("sh", "-c", "echo begun; sleep 20; echo done")
    need = ("--cpus", "1", "--memory", "256M", "--kind", "lxd")
    with subprocess.Popen(
        [GRIDCLOUD, "run", *need, "--", *command],
        env=site.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout.readline() == "begun\n", site.log()
            (instance,) = lxd.instances()
            lxd.lxc("delete", "--force", instance["name"])
            out, told = run.communicate(timeout=2 * BOOTED)
        finally:
            run.kill()
    assert (run.returncode, out) == (0, "begun\ndone\n"), told
    assert "was lost: somebody else deleted its machine. Back in line." in told
    assert told.count(" create: creating small") == 2
    wait_until(lambda: not lxd.left(), BOOTED)


STACK = """
name: lab
networks:
  inner: {cidr: 10.231.77.0/24}
defaults: {memory: 256M, time: 1h, network: inner}
machines:
  one: {}
  two: {after: [one]}
outputs:
  one: "{one.address}"
  two: "{two.address}"
"""


def test_machines_of_a_stack_reach_one_another_in_its_network(new_lxd_site, lxd, tmp_path):
    """Which is made before them and removed after them; a second 'up' changes nothing, and a
    network that was forgotten is swept."""
    site = new_lxd_site()
    file = tmp_path / "lab.yaml"
    file.write_text(STACK)
    plan = site.cli("stack", "plan", str(file))
    assert "make     network inner as 10.231.77.0/24 at lxd" in plan.stderr, plan.stderr
    done = patiently(site, "stack", "up", str(file), "--yes", "--json")
    assert done.returncode == 0, done.stderr + site.log()
    outputs = json.loads(done.stdout)["outputs"]
    assert all(address.startswith("10.231.77.") for address in outputs.values())
    reach = f"bash -c 'echo > /dev/tcp/{outputs['two']}/22'"
    seen = patiently(site, "machine", "ssh", "lab-one", reach)
    assert seen.returncode == 0, seen.stderr
    again = site.cli("stack", "up", str(file), "--yes")
    assert "nothing to do" in again.stderr
    swept = json.loads(site.cli("sweep", "--json").stdout)["things"]
    assert {thing["fate"] for thing in swept} == {"in use"}
    down = patiently(site, "stack", "down", str(file), "--yes")
    assert (down.returncode, down.stdout) == (0, "lab is down\n"), down.stderr
    assert json.loads(site.cli("sweep", "--json").stdout)["things"] == []
    with site.client() as client:
        client.make_network("forgotten", "10.231.78.0/24", "lxd")
        assert [one.name for one in client.networks().networks] == ["forgotten"]
        (thing,) = client.sweep(dry_run=False).things
        assert (thing.name, thing.fate.value) == ("forgotten", "removed")
        assert client.networks().networks == ()


def test_what_another_site_has_is_shown_and_removed_on_demand_alone(new_lxd_site):
    """Told apart; a sweep of one's own touches nothing of it, nor does showing it."""
    theirs, ours = new_lxd_site(name="theirs"), new_lxd_site(name="ours")
    with theirs.client() as client:
        client.make_network("lab", "10.231.79.0/24", "lxd")
        client.make_volume("data", 2**24, "lxd")
    assert ours.cli("sweep").stdout == "nothing at any provider carries this site's tag\n"
    shown = ours.cli("sweep", "--all-sites")
    assert "another's" in shown.stdout
    assert "left alone; --yes removes it" in shown.stderr
    refused = ours.cli("sweep", "--yes")
    assert (refused.returncode, "--all-sites" in refused.stderr) == (64, True)
    with theirs.client() as client:
        assert [one.name for one in client.networks().networks] == ["lab"]
    swept = json.loads(ours.cli("sweep", "--all-sites", "--yes", "--json").stdout)["things"]
    assert {thing["kind"]: thing["fate"] for thing in swept} == {
        "network": "removed",
        "volume": "kept",
    }
    with theirs.client() as client:
        assert client.networks().networks == ()
        client.remove_volume("data")


@pytest.mark.parametrize(
    ("variant", "step", "why"),
    [
        ("no-sshd", "reachable", "Its image needs cloud-init and an SSH server"),
        ("no-cloud-init", "ready", "host key"),
    ],
)
def test_an_image_that_cannot_serve_is_told_and_removed(new_lxd_site, lxd, variant, step, why):
    """Without an SSH server, or without cloud-init, the launch ends in time and says why."""
    site = new_lxd_site(variant, reachable="30s", ready="15s")
    done = start(site)
    assert done.returncode != 0
    assert f"{step}: given up" in done.stderr, done.stderr
    assert why in done.stderr, done.stderr
    assert "boot log" in done.stderr, done.stderr
    wait_until(lambda: not lxd.left())


def test_a_wrong_image_is_told_before_anything_is_made(new_lxd_site, lxd):
    """The error names what there is."""
    site = new_lxd_site()
    done = start(site, "--image", "debain")
    assert done.returncode != 0
    assert "debain" in done.stderr
    assert "debian" in done.stderr.replace("debain", "")
    assert lxd.left() == []
