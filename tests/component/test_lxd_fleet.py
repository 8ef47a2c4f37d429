"""Machines without a job at a real LXD: made, contextualised, entered, lengthened and gone."""

import json

import pytest

from testbeds import sshd as testbed
from testbeds.sites import wait_until

pytestmark = [
    pytest.mark.xdist_group("lxd"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(not testbed.available(), reason="needs OpenSSH"),
]


@pytest.fixture
def site(new_site, lxd):
    """Return a running site whose cloud is a project of the testbed."""
    settings = (
        f'[providers.cloud]\nkind = "lxd"\nsocket = "{lxd.socket}"\nproject = "{lxd.name}"\n'
        f'image = "{lxd.image("debian")}"\n'
        '[providers.cloud.shapes.small]\ncpus = 1\nmemory = "512MiB"\nprice = 0.5\n'
        'currency = "EUR"\n'
    )
    made = new_site(settings=settings)
    made.start()
    return made


def ssh(site, name, command):
    done = site.cli("machine", "ssh", name, "--", command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_machine_from_its_start_to_its_end(site, lxd, tmp_path):
    """User-data is carried out at its first boot; SSH lets in who asks the site, and its own switch
    hears of a later end; nothing is left at the cloud, and the site is not needed for a launch."""
    user_data = tmp_path / "user-data"
    user_data.write_text("#!/bin/sh\necho contextualised > /etc/mark\n")
    order = ("--name", "web", "--memory", "512M", "--user-data", str(user_data))
    assert site.cli("machine", "start", "--detach", *order).returncode == 0
    wait_until(lambda: lxd.instances())
    site.kill()  # at whatever step it is
    site.start()
    with site.client() as client:
        info = client.wait_machine("web")
        assert info.state.value == "ready", info.reason
        steps = [event.step.value for event in client.machine_events("web")]
    assert {"create", "reachable", "ready"} <= set(steps)
    assert len(lxd.instances()) == 1
    assert ssh(site, "web", "cat /etc/mark") == "contextualised\n"
    before = ssh(site, "web", "cut -d' ' -f1 /var/lib/gridcloud/ends-at")
    assert site.cli("machine", "extend", "web", "2h").returncode == 0
    after = ssh(site, "web", "cut -d' ' -f1 /var/lib/gridcloud/ends-at")
    assert 7100 < int(after) - int(before) < 7300
    shown = json.loads(site.cli("machine", "show", "web", "--json").stdout)["machine"]
    assert shown["order"]["user_data"] == user_data.read_text()
    assert site.cli("machine", "stop", "web").stdout == "web ended\n"
    assert lxd.left() == []
    wait_until(lambda: not list((site.state / "machines").iterdir()), 60)  # its host key


def test_a_cloud_is_proved(site, lxd):
    """By a machine that is made, logged in to and deleted."""
    done = site.cli("provider", "check", "cloud")
    assert done.returncode == 0, done.stderr
    assert "cloud works" in done.stdout
    assert lxd.left() == []


def test_user_data_that_is_wrong_is_told_before_anything_is_made(site, lxd, tmp_path):
    """With the line, and no instance is ever there."""
    user_data = tmp_path / "user-data"
    user_data.write_text("#cloud-config\nruncmd:\n  - [true]\n bad: indent\n")
    done = site.cli(
        "machine", "start", "--name", "web", "--memory", "512M", "--user-data", str(user_data)
    )
    assert done.returncode == 64
    assert "line 4" in done.stderr, done.stderr
    assert lxd.left() == []
