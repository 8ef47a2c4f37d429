"""Doing the same to many things, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def each(
    items: Iterable[T], act: Callable[[T], Awaitable[None]], *, at_once: int = 16
) -> None:
    """Await ``act`` for each item, up to ``at_once`` together; the first error ends the rest."""
    waiting = iter(items)

    async def work() -> None:
        for item in waiting:
            await act(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
