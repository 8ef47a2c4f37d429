"""Telling from outside whether a new machine's SSH server answers."""

import asyncio
import contextlib

import pytest

from gridcloud.errors import Unavailable
from gridcloud.providers.cloud import watching
from gridcloud.providers.cloud.watching import ssh_answers


@contextlib.asynccontextmanager
async def server(says):
    """Serve on loopback something that says this at once and then waits; give its port."""
    open_ones = []

    async def serve(_, writer):
        open_ones.append(writer)
        writer.write(says)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for writer in open_ones:
            writer.close()


async def test_a_banner_is_enough():
    """Lines before the banner are allowed, as the protocol has it."""
    for says in (b"SSH-2.0-OpenSSH_9.2\r\n", b"Welcome.\r\nSSH-2.0-x\r\n"):
        async with server(says) as port:
            await ssh_answers("127.0.0.1", port)


async def test_nothing_there_is_told_at_once():
    """A refused connection says so."""
    async with server(b"") as port:
        pass
    with pytest.raises(Unavailable) as told:
        await ssh_answers("127.0.0.1", port)
    assert "connection refused" in told.value.message


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"x" * 100_000])
async def test_something_else_is_no_ssh_server(monkeypatch, says):
    """Silence, another protocol, or more than a banner can be: none is waited for long."""
    monkeypatch.setattr(watching, "_BANNER_SECONDS", 0.2)
    async with server(says) as port:
        with pytest.raises(Unavailable) as told:
            await ssh_answers("127.0.0.1", port)
        assert "no SSH server" in told.value.message


async def test_a_name_that_does_not_resolve():
    """It is an error of the usual kind."""
    with pytest.raises(Unavailable):
        await ssh_answers("surely.invalid", 22)
