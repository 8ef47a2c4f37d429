"""One end of the overlay as a process, so that it can stand in a network namespace.

It takes one JSON list a line, what to do and how, and answers each with one line of JSON.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import structlog

from gridcloud.errors import GridcloudError
from gridcloud.grid.identity import Identity
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.transport import PeerAddress


class OverlayNode:
    """The test's hold on one: `do` something and wait for its answer."""

    def __init__(self, host, **options):
        self._process = host.popen(
            [sys.executable, Path(__file__), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.address = self.do("address")
        self.key = self.address["key"]

    def begin(self, *what):
        """Have it begin something; `answer` waits for the end."""
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self):
        """Return what came of the thing begun first."""
        line = self._process.stdout.readline()
        assert line, "the node ended"
        return json.loads(line)

    def do(self, *what):
        """Do something and return what came of it."""
        self.begin(*what)
        return self.answer()

    def ask(self, other, timeout=15, text="hello"):
        """Send a message to another node; return its reply, or why there is none."""
        return self.do("request", other.address, text, timeout)

    def close(self):
        """End it; what it holds goes with it."""
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


async def _serve(options):
    transport = OverlayTransport(Identity.generate(), **options)

    async def handler(key, message):
        return b"%s to %s" % (message, key[:8].encode())

    async def echo(_key, stream):
        while data := await stream.read(65536):
            await stream.write(data)
        await stream.write_eof()

    async def send(stream, size):
        await stream.write(b"x" * size)
        await stream.write_eof()

    transport.serve("echo", echo)
    await transport.start(handler)

    async def do(what, *how):
        match what:
            case "address":
                return transport.address().model_dump()
            case "request":
                peer = PeerAddress(**how[0])
                try:
                    return (await transport.request(peer, how[1].encode(), how[2])).decode()
                except GridcloudError as error:
                    return {"error": error.message}
            case "stream":
                peer = PeerAddress(**how[0])
                stream = await transport.open_stream(peer, "echo", 15)
                sending = asyncio.create_task(send(stream, how[1]))
                size = 0
                while data := await stream.read(65536):
                    size += len(data)
                await sending
                stream.close()
                return size
            case "path":
                path = transport.path(how[0])
                return path and path.model_dump()
            case "settle":
                helpers = [PeerAddress(**peer) for peer in how[0]]
                policy = how[1]
                transport.settle(
                    Neighbourhood(
                        relays_for=lambda _: helpers,
                        anchors=lambda: helpers,
                        may_introduce=lambda _s, _t: policy,
                        may_relay=lambda _s, _t: policy,
                    )
                )
                return None

    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await do(*json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    await transport.close()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_serve(json.loads(sys.argv[1])))
