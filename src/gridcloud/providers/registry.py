"""Finding providers by entry point, built-in ones the same way; loaded when used."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from gridcloud.errors import GridcloudError, InvalidSpec, Unavailable
from gridcloud.model.asking import ProviderKind
from gridcloud.providers.base import Provider, ProviderContext

T = TypeVar("T")
GROUP = "gridcloud.providers"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def kinds() -> list[str]:
    """Return the kinds that are installed, whether they load or not."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def about(kind: str) -> ProviderKind:
    """Return what to ask who adds a provider of a kind; reads small files. Raises `InvalidSpec`
    for an unknown kind."""
    entry = _entry(kind)
    try:
        return ProviderKind(kind=kind, questions=_used(entry, lambda made: made.questions()))
    except GridcloudError as error:
        return ProviderKind(kind=kind, problem=str(error))


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
    entry = _entry(kind, f"[providers.{name}] ")
    made = _used(entry, lambda provider: provider(name, section, context))
    if not isinstance(made, Provider):
        raise Unavailable(
            f"Provider kind {kind!r} does not load: {entry.value} is no provider.",
            hint="Its author must derive it from gridcloud.providers.base.Provider.",
        )
    return made


def _entry(kind: str, where: str = "") -> EntryPoint:
    found = list(entry_points(group=GROUP, name=kind))
    if not found:
        raise InvalidSpec(
            f"{where}kind {kind!r} is not known." if kind else f"{where}lacks its kind.",
            hint=f"Installed are: {', '.join(kinds())}.",
        )
    return found[0]


def _used(entry: EntryPoint, use: Callable[[Any], T]) -> T:
    """Load a provider's class and use it; what it raises of its own becomes `Unavailable`."""
    try:
        return use(entry.load())
    except GridcloudError:
        raise
    except Exception as error:
        raise Unavailable(
            f"Provider kind {entry.name!r} does not load: {error!r}.",
            hint=f"It comes from {entry.value}; reinstall that, or what it needs.",
        ) from error
