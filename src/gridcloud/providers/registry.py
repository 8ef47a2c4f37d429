"""Finding providers by entry point, built-in ones the same way; loaded when used."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from gridcloud.errors import InvalidSpec, Unavailable
from gridcloud.providers.base import Provider, ProviderContext

GROUP = "gridcloud.providers"


def kinds() -> list[str]:
    """Return the kinds that are installed, whether they load or not."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def make(name: str, kind: str, section: dict[str, Any], context: ProviderContext) -> Provider:
    """Return the provider of a settings section.

    Raises `InvalidSpec` for an unknown kind or bad section, `Unavailable` naming the cause for
    one that does not load.
    """
    found = list(entry_points(group=GROUP, name=kind))
    if not found:
        raise InvalidSpec(
            f"[providers.{name}] kind {kind!r} is not known."
            if kind
            else f"[providers.{name}] lacks its kind.",
            hint=f"Installed are: {', '.join(kinds())}.",
        )
    try:
        provider_class = found[0].load()
    except Exception as error:
        raise Unavailable(f"Provider kind {kind!r} does not load: {error!r}.") from error
    provider: Provider = provider_class(name, section, context)
    return provider
