"""Reading cloud-init's user-data, of all its kinds, and checking it before anything is paid for.

Unpacks as cloud-init does (``user_data.py``, versions 22.4 to 25.1): gzip, MIME multiparts and
archives, in one another. Bounded in size, number and depth. What is decided on the machine itself
cannot be checked: what an included address serves, what a template becomes.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import email
import re
import zlib
from collections.abc import Iterator
from email.message import Message
from typing import Any

from gridcloud.errors import InvalidSpec
from gridcloud.setup.parts import BEGINNINGS, Kind, Part, check_part, kind_of
from gridcloud.setup.yaml_text import read_yaml

#: What all parts together may be once unpacked, how many there may be, and how deeply nested.
MOST_BYTES = 1024 * 1024
MOST_PARTS = 64
_MOST_DEPTH = 4
_MOST_BOUNDARIES = 32
_BASE64 = "base64:"
_GZIP = b"\x1f\x8b"
_GZIP_TYPES = {
    f"application/{name}"
    for name in ("gzip", "gzip-compressed", "gzipped", "x-gunzip", "x-gzip", "x-gzip-compressed")
}
#: Types that say nothing: what is in it does.
_BY_CONTENT = {"text/plain", "text/x-not-multipart", "application/octet-stream", Kind.SCRIPT}
_HEADERS = ("Merge-Type", "X-Merge-Type", "Launch-Index")
_MIME_START = re.compile(r"[!-9;-~]+:[ \t]")
_HEADER = re.compile(r"[ -~]{1,200}")
_FILENAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_CONTENT_TYPE = re.compile(r"[a-z0-9.+-]{1,64}/[a-z0-9.+-]{1,64}")


def decoded(user_data: str) -> bytes:
    """Return user-data as bytes: of a text, or of what follows ``base64:``."""
    if not user_data.startswith(_BASE64):
        return user_data.encode()
    try:
        return base64.b64decode("".join(user_data[len(_BASE64) :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidSpec(f"The user-data is no base64 after {_BASE64!r}: {error}.") from error


def read_user_data(data: bytes) -> tuple[Part, ...]:
    """Return the parts of a user-data document, checked; none if it is empty.

    Takes milliseconds, seconds for a very large one: not for an event loop. Raises `InvalidSpec`,
    with the line where there is one, for what cloud-init would not understand or would ignore.
    """
    if not data.strip():
        return ()
    parts = tuple(_Reader().read(data, 0))
    handled = any(part.content_type == Kind.PART_HANDLER for part in parts)
    for number, part in enumerate(parts, 1):
        where = "The user-data"
        if len(parts) > 1:
            where = f"Part {number} of the user-data ({part.filename or part.content_type})"
        _check(part, where, handled)
    return parts


def _check(part: Part, where: str, handled: bool) -> None:
    if part.content_type not in set(Kind):
        if handled:
            return
        raise InvalidSpec(
            f"{where} has a type that cloud-init does not know.",
            hint=f"It knows {', '.join(Kind)}, and what a part handler brings.",
        )
    check_part(part.content_type, _text(part.data, where), where)


class _Reader:
    """Unpacks one document, and counts what comes out."""

    def __init__(self) -> None:
        self._bytes = 0
        self._parts = 0

    def read(self, data: bytes, depth: int) -> Iterator[Part]:
        """Give the parts of a document that says itself what it is."""
        if depth > _MOST_DEPTH:
            raise InvalidSpec(f"The user-data is nested more than {_MOST_DEPTH} deep.")
        if data.startswith(_GZIP):
            yield from self.read(self._unzipped(data), depth + 1)
            return
        text = _text(data, "The user-data")
        if _MIME_START.match(text) and "mime-version:" in text[:4096].lower():
            yield from self._mime(text, depth)
            return
        yield from self._typed(_kind(text), data, "", {}, depth)

    def _typed(
        self, content_type: str, data: bytes, filename: str, headers: dict[str, str], depth: int
    ) -> Iterator[Part]:
        self._count(data)
        if content_type == Kind.ARCHIVE:
            yield from self._archive(_text(data, "The archive"), depth + 1)
            return
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise InvalidSpec(f"The user-data has more than {MOST_PARTS} parts.")
        name = filename if _FILENAME.fullmatch(filename) else ""
        yield Part(content_type=content_type, data=data, filename=name, headers=headers)

    def _mime(self, text: str, depth: int) -> Iterator[Part]:
        if text.lower().count("boundary=") > _MOST_BOUNDARIES:
            raise InvalidSpec("The user-data has too many multiparts in one another.")
        try:
            message = email.message_from_string(text)
            leaves = [part for part in message.walk() if not part.is_multipart()]
            defects = [defect for part in message.walk() for defect in part.defects]
        except RecursionError as error:
            raise InvalidSpec("The user-data is nested too deeply.") from error
        if defects:
            raise InvalidSpec(
                f"The user-data is a broken MIME document: {type(defects[0]).__name__}.",
                hint="Make it with `cloud-init devel make-mime`, or look for what was cut off.",
            )
        for part in leaves:
            if part.get_content_maintype() == "multipart":
                continue  # one without any parts
            yield from self._leaf(part, depth)

    def _leaf(self, part: Message, depth: int) -> Iterator[Part]:
        data = part.get_payload(decode=True)
        if not isinstance(data, bytes) or part.defects:
            raise InvalidSpec("A part of the user-data is not encoded as it says.")
        headers = _headers({name: part[name] for name in _HEADERS})
        filename = part.get_filename() or ""
        said = part.get_content_type()
        if said in _GZIP_TYPES or data.startswith(_GZIP):
            inner = tuple(self.read(self._unzipped(data), depth + 1))
            if len(inner) != 1:
                raise InvalidSpec(
                    "A packed part of the user-data is a multipart of its own.",
                    hint="cloud-init reads one part in each; pack the whole document instead.",
                )
            yield inner[0].model_copy(update={"filename": filename[:64], "headers": headers})
            return
        if said.startswith("text/"):
            data = _recoded(part, data)
        if said in _BY_CONTENT:
            text = _text(data, "A part of the user-data")
            said = (kind_of(text) or said) if said == Kind.SCRIPT else _kind(text)
        if not _CONTENT_TYPE.fullmatch(said):
            raise InvalidSpec(f"A part of the user-data has no content type: {said[:80]!r}.")
        yield from self._typed(said, data, filename, headers, depth)

    def _archive(self, text: str, depth: int) -> Iterator[Part]:
        if depth > _MOST_DEPTH:
            raise InvalidSpec(f"The user-data is nested more than {_MOST_DEPTH} deep.")
        archive = read_yaml(text, "The archive in the user-data")
        if not isinstance(archive.value, list) or not archive.value:
            raise InvalidSpec("An archive in the user-data is a list of parts.")
        for index, entry in enumerate(archive.value):
            where = f"The archive in the user-data, line {archive.line([index])}"
            found: dict[Any, Any] = entry if isinstance(entry, dict) else {"content": entry}
            content = found.get("content")
            if not isinstance(content, str | bytes) or not content:
                raise InvalidSpec(f"{where}: the part has no content.")
            data = content.encode(errors="replace") if isinstance(content, str) else content
            said = found.get("type") or kind_of(_text(data, where)) or Kind.CLOUD_CONFIG
            if not isinstance(said, str) or not _CONTENT_TYPE.fullmatch(said):
                raise InvalidSpec(f"{where}: the type of the part is none: {str(said)[:80]!r}.")
            headers = _headers(
                {each: found.get(each, found.get(each.lower())) for each in _HEADERS}
            )
            filename = str(found.get("filename", ""))
            yield from self._typed(said, data, filename, headers, depth)

    def _unzipped(self, data: bytes) -> bytes:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            text = unpacker.decompress(data, MOST_BYTES + 1)
        except zlib.error as error:
            raise InvalidSpec(f"The packed user-data is damaged: {error}.") from error
        self._limit(len(text))
        if not unpacker.eof or unpacker.unused_data:
            raise InvalidSpec(
                "The packed user-data is cut off, or something follows it.",
                hint="Pack it again with gzip.",
            )
        return text

    def _count(self, data: bytes) -> None:
        self._bytes += len(data)
        self._limit(self._bytes)

    def _limit(self, size: int) -> None:
        if size > MOST_BYTES:
            raise InvalidSpec(
                f"The user-data is more than {MOST_BYTES // 1024} KiB once unpacked.",
                hint="Put large things where the machine can fetch them.",
            )


def _text(data: bytes, where: str) -> str:
    if b"\x00" in data:
        raise InvalidSpec(f"{where} holds a NUL character, so it is no text.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidSpec(
            f"{where} is neither text in UTF-8 nor packed by gzip (at byte {error.start})."
        ) from error


def _headers(found: dict[str, Any]) -> dict[str, str]:
    headers = {
        name: " ".join(str(value).split()) for name, value in found.items() if value is not None
    }
    for name, value in headers.items():
        if not _HEADER.fullmatch(value):
            raise InvalidSpec(f"The {name} of a part of the user-data is {value[:60]!r}.")
    return headers


def _recoded(part: Message, data: bytes) -> bytes:
    charset = part.get_content_charset("utf-8")
    if charset in ("utf-8", "us-ascii"):
        return data
    try:
        return data.decode(charset).encode()
    except (LookupError, ValueError) as error:
        raise InvalidSpec(f"A part of the user-data is not in {charset[:40]}.") from error


def _kind(text: str) -> Kind:
    kind = kind_of(text)
    if kind is not None:
        return kind
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")[:60]
    if first.startswith("\ufeff"):
        raise InvalidSpec("The user-data begins with a byte order mark.", hint="Save it without.")
    near = difflib.get_close_matches(first.lower(), list(BEGINNINGS), 1)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise InvalidSpec(
        f"The user-data begins with {first!r}, which is no kind that cloud-init knows.",
        hint=f"{meant}A script begins with #!, a configuration with #cloud-config.",
    )
