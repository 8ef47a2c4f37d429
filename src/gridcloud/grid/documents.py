"""Documents: papers, signed. A document is a JWS in compact form (RFC 7515) that says one paper.

Its header holds exactly ``alg`` (``Ed25519``, RFC 9864; no other is ever accepted), ``typ`` (the
paper's kind, so that one kind can never pass for another) and ``kid`` (the signer's key, in hex).
Anyone can verify a document offline, knowing whose it must be.

One algorithm and one form need no library for all of them: verifying a document is most of what a
site does while it meets others, and took three times as long by one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from gridcloud.errors import Forbidden, InvalidSpec
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.papers import Key, Paper
from gridcloud.model.frozen import Frozen

#: Longer texts are refused unread.
MAX_DOCUMENT_BYTES = 64 * 1024
#: How far the clocks of signer and verifier may differ before times in documents count.
LEEWAY = timedelta(seconds=60)

Clock = Callable[[], datetime]
AnyPaper = TypeVar("AnyPaper", bound=Paper)
#: What was verified is remembered by its text: that many documents, none of them longer.
_REMEMBERED, _REMEMBERED_BYTES = 16_384, 2048
_LONGEST_PROBLEM = 200


class _Header(Frozen):
    alg: Literal["Ed25519"]
    typ: str
    kid: Key


_HEADER = TypeAdapter(_Header)


def sign(identity: Identity, paper: Paper) -> str:
    """Return the document of ``paper``; ``identity`` must be the one that the paper names."""
    if paper.signer != identity.key:
        raise Forbidden(
            f"{_what(type(paper))} of {short(paper.signer)} cannot be signed by {identity!r}."
        )
    header = _Header(alg="Ed25519", typ=paper.kind, kid=identity.key)
    parts = (header.model_dump_json().encode(), paper.model_dump_json().encode())
    text = ".".join(map(_encode, parts))
    document = f"{text}.{_encode(identity.sign(text.encode()))}"
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InvalidSpec(f"{_what(type(paper))} would be longer than {MAX_DOCUMENT_BYTES} bytes.")
    return document


def verify(document: str, paper: type[AnyPaper], issuer: str, now: datetime) -> AnyPaper:
    """Return what a document says, once it is proved to be of this kind, by ``issuer``, at ``now``.

    Raises `InvalidSpec` if it is malformed and `Forbidden` if it is somebody else's, not signed
    by them, expired or from the future (by more than `LEEWAY`). The signature of a text that was
    verified lately, by anyone in this process, is not computed again.
    """
    short_enough = len(document) <= _REMEMBERED_BYTES
    read: AnyPaper = (_remembered if short_enough else _verified)(document, paper, issuer)
    if now - read.begins_at < -LEEWAY:
        raise Forbidden(
            f"{_what(paper)} of {short(issuer)} holds only from {_shown(read.begins_at)} on.",
            hint=f"It is {_shown(now)} here. Set the clock that is wrong, by NTP.",
        )
    if read.lapses_at is not None and now - read.lapses_at >= LEEWAY:
        raise Forbidden(
            f"{_what(paper)} of {short(issuer)} expired at {_shown(read.lapses_at)}.",
            hint="Ask for a new one.",
        )
    return read


def claimed_signer(document: str) -> str:
    """Return the key that a document *says* has signed it; nothing is proved.

    Raises `InvalidSpec` if it is malformed.
    """
    return _header(document, "The document").kid


def _verified(document: str, paper: type[AnyPaper], issuer: str) -> AnyPaper:
    what = _what(paper)
    header = _header(document, what)
    if header.typ != paper.kind:
        raise InvalidSpec(f"A document that should be {paper.kind!r} is of another kind.")
    if header.kid != issuer:
        raise Forbidden(
            f"{what} should be signed by {short(issuer)}, but is by {short(header.kid)}."
        )
    text, _, seal = document.rpartition(".")
    try:
        signature = _decode(seal)
        if _encode(signature) != seal:  # one signature has one form: texts are compared
            raise ValueError("not the usual form")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(issuer)).verify(signature, text.encode())
        payload = _decode(text.partition(".")[2])
    except (InvalidSignature, ValueError) as error:
        raise Forbidden(
            f"The signature of {short(issuer)} under {_lower(what)} is wrong: "
            "it was forged, or damaged on the way.",
            hint="Ask for it again, and copy all of it.",
        ) from error
    try:
        read = paper.model_validate_json(payload)
    except ValidationError as error:
        raise InvalidSpec(
            f"{what} of {short(issuer)} cannot be read: {first_problem(error)}.",
            hint="Do both sites run the same version of gridcloud?",
        ) from error
    if read.signer != issuer:
        raise Forbidden(f"{what} names {short(read.signer)}, but {short(issuer)} signed it.")
    return read


@lru_cache(maxsize=_REMEMBERED)
def _remembered(document: str, paper: type[AnyPaper], issuer: str) -> AnyPaper:
    return _verified(document, paper, issuer)


def first_problem(error: ValidationError) -> str:
    """Return where and what the first problem is, as far as it can be shown: a peer chose it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:40] for part in first["loc"] if str(part).isidentifier())
    text = {"extra_forbidden": "there is an unknown field"}.get(first["type"], first["msg"])
    told = f"{where}: {text}" if where else text
    return "".join(each if each.isprintable() else "?" for each in told[:_LONGEST_PROBLEM])


def _header(document: str, what: str) -> _Header:
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InvalidSpec(f"{what} is longer than {MAX_DOCUMENT_BYTES} bytes.")
    try:
        parts = document.split(".")
        if len(parts) != 3 or not document.isascii():
            raise ValueError("not three parts")
        return _HEADER.validate_json(_decode(parts[0]))
    except (ValueError, binascii.Error) as error:
        raise InvalidSpec(
            f"{what} is not a signed document.", hint="Was all of it copied?"
        ) from error


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _what(paper: type[Paper]) -> str:
    return f"The {paper.kind.removeprefix('gridcloud-')}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _shown(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="seconds")
