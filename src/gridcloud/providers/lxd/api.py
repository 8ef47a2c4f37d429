"""LXD's REST API: one question, one answer, errors translated.

Source: https://documentation.ubuntu.com/lxd (REST API, API extensions), as of LXD 5.0.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

import aiohttp

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.providers.lxd.connecting import Way

_CALL_SECONDS = 60.0
#: How long LXD is asked to hold back the answer of an operation that goes on.
_WAIT_SLICE_SECONDS = 20
_LONGEST_ANSWER_BYTES = 64 * 2**20
_RETRY_AFTER_SECONDS = 5.0

#: What LXD says where its status says nothing: text → error and what to do about it.
_MEANINGS: tuple[tuple[str, type[GridcloudError], str], ...] = (
    (
        r"reached maximum|maximum aggregate|disk quota|no space left|cannot allocate memory",
        NoCapacity,
        "A limit of the LXD project, or the host's own, is reached.",
    ),
    (r"already exists|already running|already in use|in use|is busy|etag", Conflict, ""),
    (r"not authorized|forbidden|not trusted|restricted|is not allowed", Forbidden, ""),
    (
        r"failed getting remote image|no such host|i/o timeout|connection refused",
        Unavailable,
        "LXD could not fetch what it needs.",
    ),
    (r"not found|couldn't find", NotFound, ""),
    (r"invalid|unknown|unsupported|missing|must be|isn't supported|cannot be", InvalidSpec, ""),
)
_HINTS = {
    Forbidden: "Look at the rights of this user, and at the restrictions of the LXD project.",
    InvalidSpec: "Look at the settings of this provider, and at LXD's profile and project.",
    NotFound: "Look at the settings of this provider: project, profiles, network and pool.",
}


@dataclass(frozen=True)
class Answer:
    """What LXD answered: ``metadata``, the ETag, and the operation it began (empty if none)."""

    metadata: Any
    etag: str = ""
    operation: str = ""


class API:
    """One project of one LXD. Nothing is repeated; only `wait` waits."""

    def __init__(self, find: Callable[[], Way], project: str) -> None:
        self._find, self._project = find, project
        self._way: Way | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def project(self) -> str:
        """The project that is asked about."""
        way = self._way.project if self._way else ""
        return self._project or way or "default"

    async def get(self, path: str, **query: str) -> Any:
        """Return what is at ``path``."""
        return (await self.ask("GET", path, query=query)).metadata

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        etag: str = "",
    ) -> Answer:
        """Send a request and return its answer; an operation it begins goes on.

        ``path`` is behind ``/1.0``, its parts quoted by `segment`.
        """
        session, way = self._opened()
        url = f"{way.url}/1.0{path}?{urlencode({'project': self.project, **(query or {})})}"
        headers = {"If-Match": etag} if etag else {}
        try:
            async with session.request(method, url, json=body, headers=headers) as response:
                raw = await _body(response)
                if response.status >= 400:
                    _refuse(response.status, response.headers.get("Retry-After", ""), raw)
                answer = json.loads(raw)
                return Answer(
                    metadata=answer.get("metadata"),
                    etag=response.headers.get("ETag", ""),
                    operation=str(answer.get("operation") or ""),
                )
        except TimeoutError as error:
            raise TimedOut(
                f"LXD at {way} gave no answer in time.", hint="See whether it is overloaded."
            ) from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise Forbidden(
                f"LXD at {way} does not prove to be the one that was added: {error}.",
                hint="If its certificate was renewed, `lxc remote remove` and add it again.",
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise _unreachable(way, error) from error
        except (aiohttp.ClientError, OSError) as error:
            # What was sent may have been carried out.
            raise TimedOut(
                f"The connection to LXD at {way} was cut: {error or 'no reason is known'}.",
                hint="See whether LXD was restarted.",
            ) from error
        except (ValueError, AttributeError) as error:
            raise Unavailable(
                f"What answers at {way} is no LXD.", hint="Look at `socket` or `remote`."
            ) from error

    async def wait(self, operation: str) -> None:
        """Wait until an operation (its path, as an answer names it) is over; raises what it did.

        One that is not known any more is over, and how it ended is not known either.
        """
        path = operation.partition("?")[0].removeprefix("/1.0")
        while True:
            try:
                done = await self.get(f"{path}/wait", timeout=str(_WAIT_SLICE_SECONDS))
            except NotFound:
                return
            status = int(done.get("status_code", 0))
            if status >= 400 or done.get("err"):
                _refuse_text(str(done.get("err") or "the operation failed"))
            if status >= 200:
                return
            # A proxy may answer at once; an operation is not asked for more often than this.
            await asyncio.sleep(0.05)

    async def running(self, instance: str) -> list[str]:
        """Return the paths of the operations on an instance that go on."""
        known = await self.get("/operations", recursion="1")
        found = []
        for operation in (known or {}).get("running") or []:
            resources = operation.get("resources") or {}
            touched = [*(resources.get("instances") or []), *(resources.get("containers") or [])]
            names = {path.partition("?")[0].rpartition("/")[2] for path in touched}
            if instance in names:
                found.append(f"/1.0/operations/{operation['id']}")
        return found

    async def text(self, path: str, limit: int) -> str:
        """Return the end of a file that LXD has, ``limit`` bytes at most; empty if none."""
        session, way = self._opened()
        url = f"{way.url}/1.0{path}?{urlencode({'project': self.project})}"
        end = b""
        try:
            async with session.get(url) as response:
                if response.status == 404:
                    return ""
                if response.status >= 400:
                    raw = await _body(response)
                    _refuse(response.status, response.headers.get("Retry-After", ""), raw)
                async for chunk in response.content.iter_chunked(65536):
                    end = (end + chunk)[-limit:]
        except TimeoutError as error:
            raise TimedOut(f"LXD at {way} gave no answer in time.") from error
        except aiohttp.ClientConnectorError as error:
            raise _unreachable(way, error) from error
        except (aiohttp.ClientError, OSError) as error:
            raise TimedOut(f"The connection to LXD at {way} was cut.") from error
        return end.decode(errors="replace")

    async def close(self) -> None:
        """Give up the connections. Idempotent; the next question opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> tuple[aiohttp.ClientSession, Way]:
        if self._session is None or self._way is None:
            self._way = self._find()
            connector: aiohttp.BaseConnector
            if self._way.socket:
                connector = aiohttp.UnixConnector(str(self._way.socket))
            else:
                connector = aiohttp.TCPConnector(ssl=self._way.tls or True)
            limit = aiohttp.ClientTimeout(total=_CALL_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, timeout=limit)
        return self._session, self._way


def segment(name: str) -> str:
    """Return a name as one part of a path."""
    return quote(name, safe="")


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        body += chunk
        if len(body) > _LONGEST_ANSWER_BYTES:
            raise Unavailable(
                "LXD's answer has no end.", hint="Look what answers at `socket` or `remote`."
            )
    return bytes(body)


def _unreachable(way: Way, error: aiohttp.ClientConnectorError) -> GridcloudError:
    if isinstance(error.os_error, PermissionError):
        return Forbidden(
            f"This user may not speak to LXD at {way}.",
            hint="Add it to the group that owns the socket (`lxd`), and log in again.",
        )
    why = error.os_error.strerror or str(error)
    return Unavailable(f"LXD at {way} does not answer: {why}.", hint="See whether it runs.")


def _refuse(status: int, retry_after: str, raw: bytes) -> NoReturn:
    try:
        text = str(json.loads(raw).get("error") or "")
    except (ValueError, AttributeError):
        text = ""
    said = _sentence(text or f"status {status}")
    match status:
        case 429:
            seconds = float(retry_after) if retry_after.isdecimal() else _RETRY_AFTER_SECONDS
            raise Throttled(said, hint="LXD wants fewer requests.", after_seconds=seconds)
        case 401 | 403:
            raise Forbidden(said, hint=_HINTS[Forbidden])
        case 404:
            raise NotFound(said, hint=_HINTS[NotFound])
        case 409 | 412:
            raise Conflict(said, hint="Somebody else changed it at the same time.")
        case 502 | 503 | 504:
            raise Unavailable(said, hint="See whether LXD is well.")
    # LXD answers much of what it refuses with 500, and some of what may pass with 400.
    _refuse_text(text or f"status {status}", InvalidSpec if status == 400 else Unavailable)


def _refuse_text(text: str, otherwise: type[GridcloudError] = Unavailable) -> NoReturn:
    for pattern, error, hint in _MEANINGS:
        if re.search(pattern, text, re.IGNORECASE):
            raise error(_sentence(text), hint=hint or _HINTS.get(error, "It is tried again."))
    raise otherwise(_sentence(text), hint=_HINTS.get(otherwise, "LXD's own log tells more."))


def _sentence(text: str) -> str:
    return f"LXD says: {text.strip()[:1000].rstrip('.')}."
