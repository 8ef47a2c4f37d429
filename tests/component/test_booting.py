"""Machines that are really booted: real cloud-init, sshd, sudo and Ansible, told by a site."""

import asyncio
import json
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.model.lease import Endpoint, LeaseRole
from gridcloud.model.machine import Playbook, VolumeMount
from gridcloud.setup.documents import read_user_data
from testbeds import booted as testbed
from testbeds import sshd
from testbeds.preparing import Preparing, endpoint_of, lease_of

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(bool(testbed.lacking()), reason=testbed.lacking()),
    pytest.mark.xdist_group("booting"),
    # The first time a root file system is made; a machine then takes some seconds to boot.
    pytest.mark.timeout(600),
]
GIB = 2**30


@pytest.fixture
def site(tmp_path):
    return Preparing(tmp_path / "site")


HOSTILE = """#cloud-config
hostname: mine
users:
  - name: other
write_files:
  - path: /etc/ssh/sshd_config
    content: |
      PasswordAuthentication yes
      PermitRootLogin yes
  - path: /etc/motd
    content: done
runcmd:
  - [sh, -c, "echo ran >/root/ran"]
"""


async def test_a_machine_becomes_the_sites_whatever_its_user_data_says(site):
    """It shows the key it was given, lets in this lease's certificates alone, keeps the switch, and
    does what the person wrote; though that leaves out its account and replaces its sshd_config."""
    lease = lease_of(HOSTILE, name="node-1")
    first = await site.booting.first_boot(lease, "debian", 16 * 1024)
    assert await site.booting.first_boot(lease, "debian", 16 * 1024) == first
    with testbed.booted(first.user_data) as machine:
        endpoint = endpoint_of(machine, first)
        facts = await site.ready(lease, endpoint, machine)
        assert facts.hostname == "mine" and facts.cpus > 0
        assert await site.run(lease, endpoint, "sudo -n cat /root/ran /etc/motd") == (
            0,
            "ran\ndone",
        )
        root = endpoint.model_copy(update={"user": "root"})
        other = endpoint.model_copy(update={"user": "other"})
        for wrong in (root, other):
            with pytest.raises(Forbidden):
                await site.run(lease, wrong, "true")
        with pytest.raises(Forbidden):
            await site.run(lease, endpoint, "true", lease_id="lease-2")
        _, sshd_says = await site.run(lease, endpoint, "sudo -n /usr/sbin/sshd -T")
        assert {"passwordauthentication no", "kbdinteractiveauthentication no"} <= set(
            sshd_says.splitlines()
        )
        config = (machine.files / "etc/ssh/sshd_config").read_text()
        assert config.count("BEGIN gridcloud") == 1

        later = lease.model_copy(update={"ends_at": lease.ends_at + timedelta(hours=1)})
        await site.booting.move_end(later, endpoint)
        told = (machine.files / "var/lib/gridcloud/ends-at").read_text().split()
        assert abs(int(told[0]) - later.ends_at.timestamp()) <= 1
        assert 0 <= int(told[1]) - 7200 + 120 <= 122

        soon = lease.model_copy(update={"ends_at": datetime.now(UTC) + timedelta(seconds=1)})
        await site.booting.move_end(soon, endpoint)
        assert await asyncio.to_thread(machine.off, 60), machine.log()


async def test_a_machine_ends_though_its_site_is_gone(site):
    """Nobody tells it anything after its first boot, and it is off at its end."""
    lease = lease_of(lasts=timedelta(seconds=20))
    first = await site.booting.first_boot(lease, "root", 16 * 1024)
    with testbed.booted(first.user_data) as machine:
        assert await asyncio.to_thread(machine.off, 90), machine.log()
        assert datetime.now(UTC) >= lease.ends_at


async def test_a_script_that_fails_is_told_with_the_end_of_the_log(site):
    """A person learns what went wrong on the machine, and what was printed while it booted."""
    lease = lease_of("#!/bin/sh\necho the disk is full of eels\nexit 3\n")
    first = await site.booting.first_boot(lease, "root", 16 * 1024)
    with testbed.booted(first.user_data) as machine, pytest.raises(InvalidSpec) as caught:
        await site.ready(lease, endpoint_of(machine, first, "root"), machine)
    assert "scripts_user" in caught.value.message
    assert "full of eels" in caught.value.message
    assert any("full of eels" in message for _, message in site.notes)


async def test_an_image_without_cloud_init_is_told(site):
    """User-data for an image that reads none is an error; without user-data it is only noted."""
    lease = lease_of("#!/bin/sh\ntrue\n")
    first = await site.booting.first_boot(lease_of(), "root", 16 * 1024)
    (hook, *_) = read_user_data(first.user_data)
    script = hook.data.removeprefix(b"#cloud-boothook\n")
    with testbed.booted(script, cloud_init=False) as machine:
        endpoint = endpoint_of(machine, first, "root")
        with pytest.raises(InvalidSpec, match="no cloud-init"):
            await site.ready(lease, endpoint, machine)
        await site.ready(lease_of(), endpoint, machine)
    assert site.notes[-1] == ("ready", "the image has no cloud-init")


async def test_volumes_are_made_once_and_playbooks_run(site, tmp_path):
    """A blank volume gets a file system, a used one keeps its files, and one that holds something
    else is left alone; then the playbooks run, with their variables as they are."""
    playbook = tmp_path / "site.yml"
    playbook.write_text(
        "- hosts: all\n  become: true\n  tasks:\n"
        "    - copy: {content: '{{ word }}', dest: /srv/data/word}\n"
    )
    word = "it's {{ nothing }} $HOME"
    lease = lease_of(
        volumes=(VolumeMount(name="data", size_bytes=GIB, path="/srv/data"),),
        playbooks=(Playbook(path=str(playbook), variables={"word": word}),),
    )
    first = await site.booting.first_boot(lease, "debian", 16 * 1024)
    with testbed.booted(first.user_data, disk_bytes=GIB) as machine:
        endpoint = endpoint_of(machine, first)
        await site.ready(lease, endpoint, machine)
        await site.booting.set_up(lease, endpoint, {"data": "/dev/vdb"})
        assert any("making a file system" in message for _, message in site.notes)
        assert any("TASK [copy]" in message for _, message in site.notes)
        assert await site.run(lease, endpoint, "cat /srv/data/word") == (0, word)
        assert not list(Path(tempfile.gettempdir()).glob("gcpb-*")), "keys lie about"
        assert (await site.run(lease, endpoint, "touch /srv/data/mine"))[0] == 0

        site.notes.clear()
        await site.run(lease, endpoint, "sudo -n umount /srv/data")
        await site.booting.set_up(
            lease.model_copy(update={"order": lease.order.model_copy(update={"playbooks": ()})}),
            endpoint,
            {"data": "/dev/vdb"},
        )
        assert [message for _, message in site.notes] == [
            "gridcloud: the volume data is mounted at /srv/data"
        ]
        assert (await site.run(lease, endpoint, "cat /srv/data/word"))[1] == word

        await site.run(
            lease,
            endpoint,
            "sudo -n umount /srv/data; sudo -n wipefs -qa /dev/vdb;"
            " echo precious | sudo -n dd of=/dev/vdb bs=1 seek=4096 conv=notrunc",
        )
        with pytest.raises(InvalidSpec, match="left alone"):
            await site.booting.set_up(lease, endpoint, {"data": "/dev/vdb"})


@pytest.mark.skipif(not sshd.available(), reason="needs an OpenSSH server")
async def test_a_playbook_that_cannot_work_is_told_before_anything_is_made(site, tmp_path):
    """Its syntax is looked at when the user-data is; one that is missing is told at once; and a
    playbook that another site sends, which would run here, is refused."""
    broken = tmp_path / "broken.yml"
    broken.write_text("- hosts: all\n  tasks:\n    - no_such_module: {}\n")
    with pytest.raises(InvalidSpec, match="no_such_module"):
        order = (Playbook(path=str(broken)),)
        await site.booting.first_boot(lease_of(playbooks=order), "debian", 16 * 1024)
    absent = (Playbook(path=str(tmp_path / "absent.yml")),)
    with pytest.raises(InvalidSpec, match="no playbook"):
        await site.booting.first_boot(lease_of(playbooks=absent), "debian", 16 * 1024)
    lent = lease_of(playbooks=absent).model_copy(update={"role": LeaseRole.LENT})
    with pytest.raises(Forbidden):
        await site.booting.first_boot(lent, "debian", 16 * 1024)
    with pytest.raises(Forbidden):
        await site.booting.set_up(lent, Endpoint(host="h", user="u", host_keys=()), {})


CONFIGS = [
    "#cloud-config\npackages: [git, [curl, '1']]\nruncmd: [ls, [ls, -l]]\n",
    "#cloud-config\nusers: [default, {name: a, sudo: 'ALL=(ALL) NOPASSWD:ALL'}]\n",
    "#cloud-config\nwrite_files: [{path: /a, content: b, permissions: '0644'}]\n",
    "#cloud-config\nchpasswd: {expire: false}\nssh_pwauth: true\ntimezone: Europe/Copenhagen\n",
    "#cloud-config\nmounts: [[/dev/vdb, /mnt, auto, 'defaults,nofail', '0', '2']]\n",
    "#cloud-config\napt: {sources: {a: {source: 'deb http://example.org a b'}}}\n",
    "#cloud-config\npackages: 5\n",
    "#cloud-config\nruncmd: {a: b}\n",
    "#cloud-config\nwrite_files: [{content: b}]\n",
    "#cloud-config\nusers: [{nam: a}]\n",
    "#cloud-config\nbootcmd: [[1]]\n",
    "#cloud-config\nntp: {servers: a}\n",
    "#cloud-config\npower_state: {mode: sleep}\n",
    "#cloud-config\nmounts: []\n",
    "#cloud-config\na: [\n",
]
_JUDGE = """
import json, sys
from cloudinit import util
from cloudinit.config.schema import SchemaValidationError, get_schema, validate_cloudconfig_schema
from cloudinit.user_data import UserDataProcessor
class Paths:
    cloud_dir = "/tmp"
    def get_ipath_cur(self, name=None): return "/tmp"
    get_cpath = get_ipath_cur
asked = json.load(sys.stdin)
def fits(text):
    value = util.load_yaml(text, default=None)
    if value is None: return False
    try: validate_cloudconfig_schema(value, get_schema(), strict=True)
    except SchemaValidationError: return False
    return True
message = UserDataProcessor(Paths()).process(asked["document"].encode())
parts = [
    [part.get_content_type(), util.fully_decoded_payload(part)]
    for part in message.walk() if part.get_content_maintype() != "multipart"
]
json.dump({"fits": [fits(text) for text in asked["configs"]], "parts": parts}, sys.stdout)
"""


def judged_by_cloud_init(document):
    """What the real cloud-init says of configurations, and reads in a document."""
    done = subprocess.run(
        ["chroot", testbed.root(), "python3", "-c", _JUDGE],
        input=json.dumps({"configs": CONFIGS, "document": document.decode("ascii")}),
        env={"PATH": "/usr/sbin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


async def test_cloud_init_reads_what_we_write_and_we_refuse_what_it_refuses(site):
    """The real one finds in our document each part as it was, packed ones too; and finds fault with
    the same configurations."""
    long = "#!/bin/sh\n" + "echo a long line to be packed\n" * 900 + "echo 'Grüße'\n"
    parts = [
        *CONFIGS[:2],
        "#!/bin/sh\n" + "true; true\n" * 2000,
        long,
        "#cloud-boothook\n#!/bin/sh\n",
    ]
    archive = "#cloud-config-archive\n" + "".join(f"- {json.dumps(part)}\n" for part in parts)
    first = await site.booting.first_boot(lease_of(archive), "debian", 64 * 1024)
    said = judged_by_cloud_init(first.user_data)
    assert [text.strip() for _, text in said["parts"][1:-1]] == [part.strip() for part in parts]
    ours = [_accepted(text) for text in CONFIGS]
    assert ours == said["fits"]


def _accepted(text):
    try:
        read_user_data(text.encode())
    except InvalidSpec:
        return False
    return True
