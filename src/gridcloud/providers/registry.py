"""Finding providers by entry point, built-in ones the same way; loaded when used."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Any

from gridcloud.errors import GridcloudError, InvalidSpec, Unavailable
from gridcloud.providers.base import Provider, ProviderContext

GROUP = "gridcloud.providers"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def kinds() -> list[str]:
    """Return the kinds that are installed, whether they load or not."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def make(name: str, kind: str, section: dict[str, Any], context: ProviderContext) -> Provider:
    """Return the provider of a settings section.

    Raises `InvalidSpec` for an unknown kind or bad section, `Unavailable` naming the cause for
    one that does not load.
    """
    if not _NAME.fullmatch(name):
        raise InvalidSpec(
            f"{name!r} cannot be the name of a provider.",
            hint="Use letters, digits, '-', '_' and '.'; 63 characters at most.",
        )
    found = list(entry_points(group=GROUP, name=kind))
    if not found:
        raise InvalidSpec(
            f"[providers.{name}] kind {kind!r} is not known."
            if kind
            else f"[providers.{name}] lacks its kind.",
            hint=f"Installed are: {', '.join(kinds())}.",
        )
    try:
        made = found[0].load()(name, section, context)
    except GridcloudError:
        raise
    except Exception as error:
        raise Unavailable(
            f"Provider kind {kind!r} does not load: {error!r}.",
            hint=f"It comes from {found[0].value}; reinstall that, or what it needs.",
        ) from error
    if not isinstance(made, Provider):
        raise Unavailable(
            f"Provider kind {kind!r} does not load: {found[0].value} is no provider.",
            hint="Its author must derive it from gridcloud.providers.base.Provider.",
        )
    return made
