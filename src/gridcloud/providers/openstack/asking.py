"""What to ask who adds an OpenStack cloud; choices are what OpenStack's own programs would find."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from gridcloud.model.asking import Question


def questions(
    environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> tuple[Question, ...]:
    """Return the questions; reads the first ``clouds.yaml`` of the usual places."""
    names = tuple(_names(environ, home or Path.home()))
    by_environment = "OS_AUTH_URL" in environ
    default = environ.get("OS_CLOUD", "") or (names[0] if len(names) == 1 else "")
    return (
        Question(
            setting="cloud",
            text="Which cloud of clouds.yaml"
            + (" (none: that of the OS_* variables)" if by_environment else ""),
            default="" if by_environment else default,
            choices=names,
            needed=not by_environment,
        ),
        Question(setting="image", text="Which image to boot: a name, an id, or OWNER/NAME with *"),
        Question(
            setting="external_network",
            text="Which external network gives addresses (none: the only one, if one is needed)",
        ),
    )


def _names(environ: Mapping[str, str], home: Path) -> list[str]:
    """Return the names of the clouds in the file that openstacksdk would read."""
    for place in _places(environ, home):
        try:
            content = yaml.safe_load(place.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the provider itself tells what is wrong with it
        clouds = content.get("clouds") if isinstance(content, dict) else None
        return sorted(map(str, clouds)) if isinstance(clouds, dict) else []
    return []


def _places(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    if told := environ.get("OS_CLIENT_CONFIG_FILE"):
        yield Path(told)
    for folder in (Path.cwd(), home / ".config" / "openstack", Path("/etc/openstack")):
        yield folder / "clouds.yaml"
        yield folder / "clouds.yml"
