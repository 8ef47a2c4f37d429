"""A small client of the Docker Engine API, which podman serves as well; see decision 0011.

Every call but `Engine.attach` is repeated a few times when it may have failed by chance, so each
must be idempotent: containers are made and removed by a name that their lease gives.
API: https://docs.docker.com/reference/api/engine/version/v1.41/
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Collection, Mapping
from time import monotonic
from typing import Any

import aiohttp

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.providers.containers.finding import Address

#: All that is used has been there since this version; newer engines refuse older ones.
_OLDEST, _NEWEST = (1, 40), (1, 47)
_CALL_SECONDS = 60.0
#: How long one call may take in all, its repetitions included.
_PATIENCE_SECONDS = 90.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0
#: How often a call is made that may have failed by chance.
TRIES = 6
_CONNECTIONS = 64
_ANSWER_LIMIT_BYTES = 32 * 1024 * 1024
_LINE_LIMIT_BYTES = 1024 * 1024
_KINDS: dict[int, type[GridcloudError]] = {
    400: InvalidSpec,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
}


class Engine:
    """One engine. Nothing blocks; all errors are `GridcloudError`. Close it in the end."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._version = ""
        self._greeting = asyncio.Lock()

    async def close(self) -> None:
        """Let go of the connections, for good. Idempotent."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        fine: Collection[int] = (),
        tries: int = TRIES,
    ) -> Any:
        """Return the answer's JSON; None for an empty one, and for a status among ``fine``.

        Raises `NotFound`, `Conflict`, `InvalidSpec` or `Forbidden` as the engine says, and
        `Unavailable` or `TimedOut` when repeating did not help.
        """
        await self._agree(tries)
        return await self._patiently(
            lambda: self._once(method, f"/{self._version}{path}", query, body, fine), tries
        )

    async def greet(self, tries: int = TRIES) -> str:
        """Ask whether it is there; return what it calls itself, such as ``Libpod/4.3.1 (linux)``.

        Quick, unlike its ``/info`` and ``/version``: podman starts programs to answer those.
        """
        headers = await self._patiently(self._ping, tries)
        told = headers.get("Api-Version", "")
        try:
            major, minor = (int(part) for part in told.split(".", 1))
        except ValueError as error:
            raise Unavailable(
                f"What answers at {self.address} is no container engine.",
                hint="Name the socket of Docker or podman in the section: engine = …",
            ) from error
        if (major, minor) < _OLDEST:
            raise Unavailable(
                f"The engine at {self.address} speaks version {told} of the API.",
                hint="Install Docker 19.03 or podman 3 or newer.",
            )
        major, minor = min((major, minor), _NEWEST)
        self._version = f"v{major}.{minor}"
        return str(headers.get("Server", ""))

    async def pull(self, image: str, told: Callable[[str], None], seconds: float) -> None:
        """Fetch an image, telling lines of progress. Idempotent.

        Raises `NotFound` with the engine's words if it cannot be had, `TimedOut`.
        """
        await self._agree()
        url = self._url(f"/{self._version}/images/create")
        try:
            async with (
                asyncio.timeout(seconds),
                self._connected().post(
                    url, params={"fromImage": image}, timeout=aiohttp.ClientTimeout(total=None)
                ) as answer,
            ):
                if answer.status >= 400:
                    raise _no_image(image, _message(await answer.content.read(_LINE_LIMIT_BYTES)))
                buffer = b""
                async for chunk, _ in answer.content.iter_chunks():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        _heed(image, line, told)
                    if len(buffer) > _LINE_LIMIT_BYTES:
                        raise Unavailable(f"The engine's words about {image} make no sense.")
                _heed(image, buffer, told)
        except TimeoutError as error:
            raise TimedOut(
                f"The image {image} was not fetched within {seconds:g} s.",
                hint="Fetch it by hand, or raise pull_time in the section.",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(error) from error

    async def attach(self, exec_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Start a prepared exec and return the connection that has become its streams.

        Never repeated: whether the command was started cannot be known.
        """
        body = b'{"Detach": false, "Tty": false}'
        head = (
            f"POST /{self._version}/exec/{exec_id}/start HTTP/1.1\r\nHost: engine\r\n"
            "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                if self.address.socket:
                    opened = await asyncio.open_unix_connection(self.address.socket)
                else:
                    opened = await asyncio.open_connection(self.address.host, self.address.port)
                reader, writer = opened
                try:
                    writer.write(head.encode() + body)
                    answer = await reader.readuntil(b"\r\n\r\n")
                    status = int(answer.split(b" ", 2)[1])
                    if status in (101, 200):
                        return reader, writer
                    length = _length(answer)
                    told = await reader.readexactly(min(length, 65536)) if length else b""
                    raise _refusal(status, told, "")
                except BaseException:
                    writer.close()
                    raise
        except (TimeoutError, OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise self._away(error) from error

    async def _agree(self, tries: int = TRIES) -> None:
        """Agree on a version of the API, once."""
        async with self._greeting:
            if not self._version:
                await self.greet(tries)

    async def _ping(self) -> Mapping[str, str]:
        try:
            async with self._connected().get(self._url("/_ping")) as answer:
                content = await _bounded(answer.content)
                if answer.status >= 300:
                    raise _refusal(answer.status, content, "")
                return answer.headers
        except TimeoutError as error:
            raise TimedOut(
                f"The container engine at {self.address} does not answer.",
                hint="Look whether it hangs.",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(error) from error

    async def _patiently(self, attempt: Callable[[], Any], tries: int) -> Any:
        give_up = monotonic() + _PATIENCE_SECONDS
        pause = _FIRST_PAUSE
        first: GridcloudError | None = None
        for tries_left in reversed(range(tries)):
            try:
                return await attempt()
            except GridcloudError as error:
                least = error.after_seconds if isinstance(error, Throttled) else 0.0
                wait = max(pause, min(least, _LONGEST_PAUSE)) * random.uniform(0.8, 1.2)  # noqa: S311
                if not error.retryable and first is not None:
                    raise error from first  # which may be what led to this
                if not error.retryable or not tries_left or monotonic() + wait > give_up:
                    raise
                first = first or error
            await asyncio.sleep(wait)
            pause = min(pause * 2, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    async def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        fine: Collection[int],
    ) -> Any:
        try:
            async with self._connected().request(
                method, self._url(path), params=query, json=body
            ) as answer:
                content = await _bounded(answer.content)
                if answer.status in fine:
                    return None
                if answer.status >= 300:
                    raise _refusal(answer.status, content, answer.headers.get("Retry-After", ""))
        except TimeoutError as error:
            raise TimedOut(
                f"The container engine at {self.address} did not answer {method} {path}.",
                hint="Look whether it hangs; it is asked again.",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(error) from error
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unavailable(f"The engine at {self.address} answered with no JSON.") from error

    def _connected(self) -> aiohttp.ClientSession:
        if self._closed:  # what was under way when the site stopped must not connect anew
            raise Unavailable("The site is stopping.", hint="Start it again.")
        if self._session is None:
            socket = self.address.socket
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket, limit=_CONNECTIONS)
                if socket
                else aiohttp.TCPConnector(limit=_CONNECTIONS),
                timeout=aiohttp.ClientTimeout(total=_CALL_SECONDS),
                trust_env=False,
            )
        return self._session

    def _url(self, path: str) -> str:
        where = "engine" if self.address.socket else f"{self.address.host}:{self.address.port}"
        return f"http://{where}{path}"

    def _away(self, error: BaseException) -> Unavailable:
        return Unavailable(
            f"The container engine at {self.address} (from {self.address.told_by}) does not "
            f"answer: {error or type(error).__name__}.",
            hint="Start it, or see that this user may use its socket.",
        )


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    parts = bytearray()
    async for chunk in content.iter_any():
        parts += chunk
        if len(parts) > _ANSWER_LIMIT_BYTES:
            raise Unavailable("The container engine answered with far too much.")
    return bytes(parts)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return 0


def _message(content: bytes) -> str:
    text = content.decode(errors="replace").strip()
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            text = str(found.get("message") or found.get("cause") or text)
    # It goes to terminals: on one line, nothing that steers one, and no more than a few lines.
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())[:500].rstrip(".") or "no reason"


def _refusal(status: int, content: bytes, retry_after: str) -> GridcloudError:
    said = f"The container engine refused: {_message(content)}."
    hint = "Look at the section of this provider, and at the engine's own log."
    if status == 429:
        seconds = float(retry_after) if retry_after.isdigit() else 0.0
        return Throttled(said, hint="It is asked again.", after_seconds=seconds)
    return _KINDS.get(status, Unavailable)(said, hint=hint)


def _heed(image: str, line: bytes, told: Callable[[str], None]) -> None:
    """Pass on one line of a pull's progress; raises `NotFound` for one that says it failed."""
    if not line.strip():
        return
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(found, dict):
        return
    if found.get("error"):
        raise _no_image(image, _message(str(found["error"]).encode()))
    words = [str(found.get(key) or "") for key in ("id", "status", "progress")]
    told(_message(" ".join(filter(None, words)).encode()))


def _no_image(image: str, why: str) -> NotFound:
    return NotFound(
        f"The image {image} is not here and could not be fetched: {why}.",
        hint="Check its name, and whether its registry needs a login; or fetch it by hand.",
    )
