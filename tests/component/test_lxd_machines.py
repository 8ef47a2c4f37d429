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

    def make(variant="debian", **patience):
        limits = ", ".join(f'{step} = "{limit}"' for step, limit in patience.items())
        site = new_site(
            settings=f"""
[providers.lxd]
kind = "lxd"
socket = "{lxd.socket}"
project = "{lxd.name}"
image = "{lxd.image(variant)}"
user = "debian"
shapes.small = {{cpus = 1, memory = "512MiB", price = 0.1, currency = "EUR"}}
patience = {{{limits}}}
"""
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
