"""An HTTP proxy in front of a cloud's API that hurts what passes: by a seed, so that a run replays.

    async with FaultProxy("http://127.0.0.1:8774", seed=7) as proxy:     # or unix:///run/api.socket
        cloud = Cloud(endpoint=proxy.url)                                # or proxy.socket, a path
        ...
        proxy.calm()                                                     # from now on all is well

In a test without an event loop, `in_a_thread` gives the same. It listens on loopback, on a port of
its own, or on the unix socket ``listen``. What happens to a request depends on the seed, its method
and path, and how many of these came before, so not on what else is under way at the same time.
`FaultProxy.hurt` lists what was done. ``proxy.down = True`` is an API that is away altogether.

Every request gets a connection of its own to the API and is answered with ``Connection: close``.
Upgraded ones (websockets, Docker's attached streams) pass through as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Self

_LINE_LIMIT = 2**20
_KINDS = (
    "error_before",
    "error_after",
    "cut_before",
    "withheld",
    "throttled",
    "duplicated",
    "stale",
)


@dataclass(frozen=True)
class Faults:
    """How often each fault happens, as parts of 1; together they are at most 1.

    - ``error_before``: answered 503 (or 500), and not passed on;
    - ``error_after``: passed on, carried out, and then answered 503 (or 500);
    - ``cut_before``: the connection is cut, and nothing was passed on;
    - ``withheld``: carried out, but no answer comes: cut after ``withheld_seconds``;
    - ``throttled``: 429 with ``Retry-After: retry_after``, and not passed on;
    - ``duplicated``: passed on twice, as a proxy that repeats does; the second answer is given;
    - ``stale``: a GET is answered as it was at most ``stale_seconds`` ago, if it was asked then.
    """

    error_before: float = 0.05
    error_after: float = 0.05
    cut_before: float = 0.03
    withheld: float = 0.03
    throttled: float = 0.05
    duplicated: float = 0.05
    stale: float = 0.10
    withheld_seconds: float = 1.0
    retry_after: str = "1"
    stale_seconds: float = 2.0

    def drawn(self, chance: random.Random) -> str:
        """Return the fault that befalls one request; empty for none."""
        left = chance.random()
        for kind in _KINDS:
            left -= getattr(self, kind)
            if left < 0:
                return kind
        return ""


#: Nothing happens.
CALM = Faults(*[0.0] * len(_KINDS))


def steady(method: str, target: str) -> bool:
    """Tell whether a GET shows a state, rather than waits for something to happen."""
    return method == "GET" and not any(word in target for word in ("/wait", "/events", "follow="))


@dataclass(eq=False)
class FaultProxy:
    """See the module. ``spare`` tells what is never hurt, such as the issuing of tokens;
    ``may_be_stale`` what an old answer is believable for; ``rewrite`` changes the bodies of
    answers, as for addresses of the API in them."""

    upstream: str
    seed: int = 0
    faults: Faults = Faults()
    listen: Path | None = None
    spare: Callable[[str, str], bool] = lambda method, target: False
    may_be_stale: Callable[[str, str], bool] = steady
    rewrite: Callable[[bytes], bytes] | None = None
    down: bool = False
    hurt: list[tuple[str, str, str]] = field(default_factory=list)
    passed: int = 0
    url: str = ""
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    _answers: dict[str, tuple[float, _Message]] = field(default_factory=dict)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def socket(self) -> Path:
        """The unix socket it listens on."""
        assert self.listen is not None, "it listens on a port"
        return self.listen

    async def __aenter__(self) -> Self:
        if self.listen:
            # An old socket is of a run that was killed.
            self.listen.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(
                self._accept, self.listen, limit=_LINE_LIMIT
            )
            self.url = f"unix://{self.listen}"
        else:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", 0, limit=_LINE_LIMIT
            )
            self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.listen:
            self.listen.unlink(missing_ok=True)

    def calm(self) -> None:
        """Let everything pass from now on."""
        self.faults, self.down = CALM, False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, ValueError, asyncio.CancelledError):
            pass  # a side that went away, or the end of the test: there is nobody to tell
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _Message.read_head(reader)
        if self.down:
            writer.transport.abort()
            return
        method, target = request.first.split(" ")[:2]
        if request.get("upgrade"):
            self.passed += 1
            await self._join(request, reader, writer)
            return
        if "100-continue" in request.get("expect").lower():
            request.drop("expect")
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await request.read_body(reader, is_request=True)
        fault = self._fault(method, target)
        if fault in {"error_before", "throttled"}:
            writer.write(self._refusal(fault, method, target))
        elif fault == "cut_before":
            writer.transport.abort()
            return
        elif fault == "stale":
            writer.write(self._answers[target][1].written())
        else:
            for _ in range(2 if fault == "duplicated" else 1):
                answer = await self._ask(request, None if fault else writer)
            if fault == "withheld":
                await asyncio.sleep(self.faults.withheld_seconds)
                writer.transport.abort()
                return
            if fault == "error_after":
                writer.write(self._refusal(fault, method, target))
            elif answer is not None:
                self._remember(method, target, answer)
                writer.write(answer.written())
        await writer.drain()

    def _fault(self, method: str, target: str) -> str:
        path = target.partition("?")[0]
        self._seen[method, path] += 1
        if self.spare(method, target):
            return ""
        chance = random.Random(f"{self.seed} {method} {path} {self._seen[method, path]}")
        fault = self.faults.drawn(chance)
        if fault == "stale":
            at, _ = self._answers.get(target, (-1e9, None))
            if method != "GET" or monotonic() - at > self.faults.stale_seconds:
                return ""
        if fault:
            self.hurt.append((fault, method, target))
        return fault

    def _remember(self, method: str, target: str, answer: _Message) -> None:
        if method == "GET" and self.may_be_stale(method, target):
            self._answers[target] = (monotonic(), answer)

    def _refusal(self, fault: str, method: str, target: str) -> bytes:
        if fault == "throttled":
            status, more = "429 Too Many Requests", f"Retry-After: {self.faults.retry_after}\r\n"
        else:
            even = len(self.hurt) % 2
            status, more = ("503 Service Unavailable" if even else "500 Internal Server Error"), ""
        body = f'{{"error": "{fault} of {method} {target}", "message": "a test of faults"}}'
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n{more}"
        return f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.upstream.startswith("unix://"):
            path = self.upstream.removeprefix("unix://")
            return await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
        host, _, port = self.upstream.removeprefix("http://").strip("/").rpartition(":")
        return await asyncio.open_connection(host, int(port), limit=_LINE_LIMIT)

    async def _ask(self, request: _Message, onward: asyncio.StreamWriter | None) -> _Message | None:
        """Pass a request on; return the answer, or None where it was streamed ``onward``."""
        self.passed += 1
        method, target = request.first.split(" ")[:2]
        reader, writer = await self._open()
        try:
            writer.write(request.closing().written())
            answer = await _Message.read_head(reader)
            while answer.first.split(" ")[1] == "100":
                answer = await _Message.read_head(reader)
            if onward is not None and not self.rewrite and not steady(method, target):
                onward.write(answer.closing().written())
                await _pump(reader, onward)
                return None
            empty = method == "HEAD" or answer.first.split(" ")[1] in {"204", "304"}
            if not empty:
                await answer.read_body(reader, is_request=False)
            if self.rewrite:
                answer = answer.with_body(self.rewrite(answer.body))
            return answer.closing()
        finally:
            writer.close()

    async def _join(
        self, request: _Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        above, below = await self._open()
        try:
            below.write(request.written())
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(above, writer))
                both.create_task(_pump(reader, below))
        except* OSError:
            pass  # one side went away
        finally:
            below.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


@dataclass
class _Message:
    """A request or an answer; ``body`` is as it was sent, in chunks or whole."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    @classmethod
    async def read_head(cls, reader: asyncio.StreamReader) -> _Message:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in head[1:] if line]
        return cls(head[0], [(name, value.strip()) for name, _, value in pairs])

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def drop(self, *names: str) -> None:
        self.headers = [(k, v) for k, v in self.headers if k.lower() not in names]

    async def read_body(self, reader: asyncio.StreamReader, *, is_request: bool) -> None:
        """Read it, and turn it into one of a told length."""
        if "chunked" in self.get("transfer-encoding").lower():
            while size := int((await reader.readline()).split(b";")[0], 16):
                self.body += await reader.readexactly(size)
                await reader.readline()
            while (await reader.readline()).strip():
                continue
        elif length := self.get("content-length"):
            self.body = await reader.readexactly(int(length))
            return
        elif not is_request:
            self.body = await reader.read()
        if self.body or not is_request:
            self.headers = self.with_body(self.body).headers

    def with_body(self, body: bytes) -> _Message:
        changed = _Message(self.first, list(self.headers), body)
        changed.drop("content-length", "transfer-encoding")
        changed.headers.append(("Content-Length", str(len(body))))
        return changed

    def closing(self) -> _Message:
        changed = _Message(self.first, list(self.headers), self.body)
        changed.drop("connection", "keep-alive")
        changed.headers.append(("Connection", "close"))
        return changed

    def written(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


@contextlib.contextmanager
def in_a_thread(proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Run a proxy beside a test that has no event loop."""
    ready, done = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    failures: list[BaseException] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with proxy:
            ready.set()
            await done.wait()

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="fault proxy", daemon=True)
    thread.start()
    ready.wait()
    try:
        if failures:
            raise failures[0]
        yield proxy
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(done.set)
        thread.join()
