"""The user-data of a machine: what its person wrote, joined with what makes it the site's.

Ours is a boothook, so it runs at every boot, before an SSH server starts and before anything that
the person's parts say is done; and once more as the last script, since those may have replaced
what it wrote. No cloud-config can switch it off. What it does is in ``prepare.sh`` and ``end.sh``.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.setup.parts import Kind, Part, kind_of
from gridcloud.setup.scripts import Script, text_of

#: Where ours is kept on a machine; root's alone.
FOLDER = "/var/lib/gridcloud"
END_SCRIPT = f"{FOLDER}/end.sh"
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LINE = re.compile(r"[ -~]+")
_PLAIN = re.compile(rb"[\n\t -~]*")


class Told(Frozen):
    """What a machine is told by its site.

    ``user`` is whom to log in as, with a certificate of the authority ``ca_line`` (a public key
    line) that names ``lease_id``. ``host_key`` is the private key, in OpenSSH's format, that its
    SSH server shows. It powers itself off at ``ends_at``, and at the latest when it has run for
    ``lasts``; without an end never. An empty ``hostname`` leaves it to the cloud.
    """

    lease_id: str
    user: str
    ca_line: str
    host_key: str
    hostname: str = ""
    ends_at: datetime | None = None
    lasts: timedelta | None = None


def joined(parts: Sequence[Part], told: Told, limit: int) -> bytes:
    """Return the user-data of all parts, ours first: a MIME multipart in plain ASCII.

    The same arguments always give the same bytes. What is more than ``limit`` bytes is packed, part
    by part. Raises `InvalidSpec` if it is still more, and for names that no machine could have.
    """
    all_parts = [*_before(told), *parts, _after()]
    document = _multipart(all_parts, packed=False)
    if len(document) > limit:
        document = _multipart(all_parts, packed=True)
    if len(document) > limit:
        ours = len(_multipart([*_before(told), _after()], packed=True))
        raise InvalidSpec(
            f"The user-data is {len(document)} bytes with what gridcloud adds ({ours}), and this "
            f"provider takes {limit}.",
            hint="Put large things where the machine can fetch them, as with #include.",
        )
    return document


def move_command(user: str, lease_id: str, ends_at: datetime, now: datetime) -> str:
    """Return the shell command by which a machine is told another end."""
    sudo = "" if user == "root" else "sudo -n "
    seconds = max(0, math.ceil((ends_at - now).total_seconds()))
    arguments = shlex.join([str(math.ceil(ends_at.timestamp())), str(seconds), lease_id])
    return f"{sudo}sh {END_SCRIPT} move {arguments}"


def _before(told: Told) -> Iterable[Part]:
    if not _USER.fullmatch(told.user):
        raise InvalidSpec(f"{told.user!r} cannot be the name of an account.")
    for line in (told.lease_id, told.ca_line):
        if not _LINE.fullmatch(line):
            raise InvalidSpec("A lease id or a certificate authority is not one line of text.")
    values = {
        "user": told.user,
        "lease": told.lease_id,
        "ca": told.ca_line,
        "host_key": told.host_key.strip() + "\n",
        "ends_epoch": "",
        "ends_seconds": "",
        "end_script": "",
    }
    if told.ends_at is not None and told.lasts is not None:
        values["ends_epoch"] = str(math.ceil(told.ends_at.timestamp()))
        values["ends_seconds"] = str(math.ceil(told.lasts.total_seconds()))
        values["end_script"] = text_of(Script.END)
    lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    text = f"#cloud-boothook\n#!/bin/sh\n{lines}{text_of(Script.PREPARE)}"
    yield Part(content_type=Kind.BOOTHOOK, data=text.encode(), filename="gridcloud")
    if told.hostname:
        if not _HOSTNAME.fullmatch(told.hostname):
            raise InvalidSpec(f"{told.hostname!r} cannot be the name of a machine.")
        # Quoted, since a name such as 1e3 or no would be something else in YAML.
        config = f'#cloud-config\nhostname: "{told.hostname}"\nmanage_etc_hosts: localhost\n'
        yield Part(content_type=Kind.CLOUD_CONFIG, data=config.encode(), filename="gridcloud-name")


def _after() -> Part:
    text = f"#!/bin/sh\nexec sh {FOLDER}/prepare.sh\n"
    return Part(content_type=Kind.SCRIPT, data=text.encode(), filename="zz-gridcloud")


def _multipart(parts: Sequence[Part], *, packed: bool) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.data).digest())
    boundary = f"gridcloud-{digest.hexdigest()[:32]}"
    head = f'Content-Type: multipart/mixed; boundary="{boundary}"\nMIME-Version: 1.0\n'
    pieces = [head.encode()]
    for part in parts:
        pieces += [f"\n--{boundary}\n".encode(), _written(part, packed=packed)]
    return b"".join([*pieces, f"\n--{boundary}--\n".encode()])


def _written(part: Part, *, packed: bool) -> bytes:
    content_type, data, encoding = part.content_type, part.data, "7bit"
    plain = _PLAIN.fullmatch(data) is not None
    if packed and plain and _tells_its_kind(part):
        small = gzip.compress(data, mtime=0)
        if len(small) * 4 / 3 < len(data):
            content_type, data, plain = "application/gzip", small, False
    if not plain:
        data, encoding = base64.encodebytes(data), "base64"
    lines = [
        f"Content-Type: {content_type}" + ('; charset="utf-8"' if "text/" in content_type else ""),
        f"Content-Transfer-Encoding: {encoding}",
    ]
    if part.filename:
        lines.append(f'Content-Disposition: attachment; filename="{part.filename}"')
    lines += [f"{name}: {value}" for name, value in part.headers.items()]
    return "\n".join([*lines, "", ""]).encode() + data


def _tells_its_kind(part: Part) -> bool:
    # cloud-init looks into a packed part for its kind, and forgets what was said beside it.
    told = set(part.headers) <= {"Launch-Index"}
    return told and kind_of(part.data.decode("ascii")) == part.content_type
