"""The parts that cloud-init's user-data consists of: their kinds, and the rules of each kind.

The kinds and rules are cloud-init's (``handlers/``, versions 22.4 to 25.1). What it would ignore
with a warning in a log is an error here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from urllib.parse import urlsplit

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.setup.cloud_config import check_cloud_config


class Kind(StrEnum):
    """The content types of parts that cloud-init itself handles."""

    SCRIPT = "text/x-shellscript"
    PER_BOOT = "text/x-shellscript-per-boot"
    PER_INSTANCE = "text/x-shellscript-per-instance"
    PER_ONCE = "text/x-shellscript-per-once"
    BOOTHOOK = "text/cloud-boothook"
    CLOUD_CONFIG = "text/cloud-config"
    ARCHIVE = "text/cloud-config-archive"
    PATCH = "text/cloud-config-jsonp"
    INCLUDE = "text/x-include-url"
    INCLUDE_ONCE = "text/x-include-once-url"
    PART_HANDLER = "text/part-handler"
    TEMPLATE = "text/jinja2"


#: How texts of a kind begin, the longer beginning before the shorter one.
BEGINNINGS: Mapping[str, Kind] = {
    "#cloud-config-archive": Kind.ARCHIVE,
    "#cloud-config-jsonp": Kind.PATCH,
    "## template: jinja": Kind.TEMPLATE,
    "#cloud-boothook": Kind.BOOTHOOK,
    "#include-once": Kind.INCLUDE_ONCE,
    "#part-handler": Kind.PART_HANDLER,
    "#cloud-config": Kind.CLOUD_CONFIG,
    "#include": Kind.INCLUDE,
    "#!": Kind.SCRIPT,
}
_SCRIPTS = {Kind.SCRIPT, Kind.PER_BOOT, Kind.PER_INSTANCE, Kind.PER_ONCE}
_TEMPLATED = {Kind.SCRIPT, Kind.CLOUD_CONFIG, Kind.BOOTHOOK}
_INTERPRETER = re.compile(r"#![ \t]*/[^\s]+")
_URL = re.compile(r"[!-~]+")


class Part(Frozen):
    """One part: its content type (a `Kind`, or one for a part handler that comes with it), what is
    in it, and what was said beside it (``headers``: how it is merged, on which machine it is used).
    """

    content_type: str
    data: bytes
    filename: str = ""
    headers: dict[str, str] = {}


def kind_of(text: str) -> Kind | None:
    """Return the kind of a text by how it begins; None if cloud-init would not know what it is."""
    start = text.lstrip().lower()
    return next((kind for begin, kind in BEGINNINGS.items() if start.startswith(begin)), None)


def check_part(content_type: str, text: str, where: str) -> None:
    """Raise `InvalidSpec` for a part that cloud-init, or the machine, could not use.

    ``where`` tells people which part it is. Included addresses are not fetched.
    """
    match content_type:
        case Kind.CLOUD_CONFIG:
            check_cloud_config(text, where)
        case Kind.BOOTHOOK:
            _check_script(_after(text, "#cloud-boothook").lstrip(), where)
        case Kind.INCLUDE | Kind.INCLUDE_ONCE:
            _check_include(text, where)
        case Kind.PATCH:
            _check_patch(_after(text.lstrip(), "#cloud-config-jsonp"), where)
        case Kind.PART_HANDLER:
            for name in ("list_types", "handle_part"):
                if not re.search(rf"^(async )?def {name}\b|^{name}\b", text, re.MULTILINE):
                    raise InvalidSpec(f"{where} is a part handler without {name}().")
        case Kind.TEMPLATE:
            _check_template(text, where)
        case _ if content_type in _SCRIPTS:
            _check_script(text, where)


def _after(text: str, beginning: str) -> str:
    return text[len(beginning) :] if text.lower().startswith(beginning) else text


def _check_script(text: str, where: str) -> None:
    if not _INTERPRETER.match(text):
        raise InvalidSpec(
            f"{where} is a script that does not say what runs it.",
            hint="Its very first line is like #!/bin/sh, with the whole path of the program.",
        )


def _check_include(text: str, where: str) -> None:
    found = False
    for number, line in enumerate(text.splitlines(), 1):
        address = re.sub(r"(?i)^#include(-once)?", "", line).strip()
        if not address or address.startswith("#"):
            continue
        found = True
        if not _is_url(address):
            raise InvalidSpec(
                f"{where}, line {number}: {address[:100]!r} is no http or https address.",
                hint="An include has one address on each line.",
            )
    if not found:
        raise InvalidSpec(f"{where} includes nothing.", hint="Write one address on each line.")


def _is_url(address: str) -> bool:
    try:
        found = urlsplit(address)
        # The port is checked when it is asked for.
        valid = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:
        return False
    return bool(valid) and _URL.fullmatch(address) is not None


def _check_patch(text: str, where: str) -> None:
    try:
        steps = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidSpec(
            f"{where}, line {error.lineno}: this is not JSON: {error.msg}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise InvalidSpec(f"{where} is no JSON that can be read.") from error
    fits = isinstance(steps, list) and all(
        isinstance(step, dict) and isinstance(step.get("op"), str) and "path" in step
        for step in steps
    )
    if not fits:
        raise InvalidSpec(
            f"{where} is no JSON patch.", hint="It is a list of steps with op and path (RFC 6902)."
        )


def _check_template(text: str, where: str) -> None:
    if not text.lower().startswith("## template: jinja"):
        raise InvalidSpec(f"{where} is a template that does not say so in its very first line.")
    _, _, rest = text.partition("\n")
    rest = rest.lstrip()
    if rest.startswith("{"):
        return  # what it begins with is known only on the machine
    if kind_of(rest) not in _TEMPLATED:
        raise InvalidSpec(
            f"{where} is a template of nothing that cloud-init makes from templates.",
            hint="Its second line is #cloud-config, or that of a script such as #!/bin/sh.",
        )
