"""Playbooks against a real sshd by the real Ansible: only where the host key is, and to the end."""

import asyncio
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from gridcloud.access import keys
from gridcloud.access.certificates import UserCA
from gridcloud.errors import InvalidSpec, TimedOut, Unavailable
from gridcloud.model.lease import Endpoint
from gridcloud.model.machine import Playbook
from gridcloud.setup.playbooks import Login, run_playbook
from testbeds import sshd as testbed

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server"),
]
HANGS = "    - raw: echo begun\n    - raw: sleep 997\n"


@pytest.fixture(scope="module")
def ca():
    return UserCA(keys.ephemeral())


@pytest.fixture(scope="module")
def machine(ca):
    with testbed.sshd(
        host="127.0.0.45", trusted_ca=ca.trusted_line(), principals=["lease1"]
    ) as machine:
        yield machine


@pytest.fixture
def login(ca):
    key = keys.ephemeral()
    line, now = keys.public_line(key), datetime.now(UTC)
    return Login(
        key=key.export_private_key("openssh").decode(),
        certificate=lambda: ca.issue(line, "lease1", now, now + timedelta(minutes=5)),
    )


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Where temporary folders are made in this test. Its path is short, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="pb") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def playbook(tmp_path, tasks, **variables):
    path = tmp_path / "book.yml"
    path.write_text(f"- hosts: all\n  gather_facts: false\n  tasks:\n{tasks}")
    return Playbook(path=str(path), variables=variables)


def endpoint(machine, **changes):
    known = {"host": machine.host, "port": machine.port, "user": machine.user}
    return Endpoint(**(known | {"host_keys": (machine.host_key_line,)} | changes))


def left_of(folder):
    """What lies in the folder, and what runs with it among its arguments."""
    running = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]
    return list(folder.iterdir()), running


async def _nothing(_):
    return


async def test_variables_are_texts_and_output_comes_as_it_is_made(
    machine, login, tmp_path, own_folder
):
    """A value that looks like a template runs nothing here; a task is told while it is at work; and
    no key lies about afterwards."""
    mark = tmp_path / "ran"
    word = f"{{{{ lookup('pipe', 'touch {mark}') }}}} it's \"$HOME\" ü"
    told = []

    async def tell(lines):
        told.append(lines)
        if "first" in lines:
            (machine.home / "seen").touch()

    (machine.home / "seen").unlink(missing_ok=True)
    tasks = (
        "    - {name: first, raw: 'until [ -e seen ]; do sleep 0.1; done'}\n"
        "    - copy: {content: '{{ word }}', dest: '{{ ansible_env.HOME | default(home) }}/word'}\n"
    )
    book = playbook(tmp_path, tasks, word=word, home=str(machine.home))
    await run_playbook(book, endpoint(machine), login, tell)
    assert (machine.home / "word").read_text() == word
    assert not mark.exists()
    assert len(told) > 1
    assert left_of(own_folder) == ([], [])


async def test_a_task_that_fails_is_told_with_what_it_said(machine, login, tmp_path):
    """The end of the output is in the error."""
    book = playbook(tmp_path, "    - raw: echo eels >&2; exit 3\n")
    with pytest.raises(InvalidSpec, match="eels"):
        await run_playbook(book, endpoint(machine), login, _nothing)


async def test_another_host_key_is_not_spoken_to(machine, login, tmp_path):
    """Who shows another key gets no task; it may be tried again."""
    other = endpoint(machine, host_keys=(keys.public_line(keys.ephemeral()),))
    mark = machine.home / "mark"
    with pytest.raises(Unavailable, match="Host key"):
        await run_playbook(playbook(tmp_path, f"    - raw: touch {mark}\n"), other, login, _nothing)
    assert not mark.exists()


async def test_one_that_hangs_ends_with_its_time(machine, login, tmp_path, own_folder):
    """It is ended with all it started, and said to have hung."""
    with pytest.raises(TimedOut, match="was not done"):
        await run_playbook(
            playbook(tmp_path, HANGS), endpoint(machine), login, _nothing, timeout_seconds=8
        )
    assert left_of(own_folder) == ([], [])


async def test_one_that_is_cancelled_leaves_nothing(machine, login, tmp_path, own_folder):
    """A launch that is given up ends its playbook, and takes its keys with it."""
    begun = asyncio.Event()

    async def tell(lines):
        if "changed" in lines:
            begun.set()

    running = asyncio.create_task(
        run_playbook(playbook(tmp_path, HANGS), endpoint(machine), login, tell)
    )
    async with asyncio.timeout(60):
        await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert left_of(own_folder) == ([], [])
