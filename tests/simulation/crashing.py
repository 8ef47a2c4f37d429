"""The event loop of a simulation: virtual time, a repeatable order, and processes that can crash.

A *process* is one run of one site. Everything it does happens in a context that names it; when it
is killed, nothing of that context ever runs again: no `finally`, no handler, as after ``kill -9``.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from asyncio import events
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context, ContextVar
from typing import Any

from simulation.virtual_time import VirtualTimeLoop


class Process:
    """One run of one site, on a host whose clock is ``clock_off`` seconds off."""

    def __init__(self, site: str, clock_off: float = 0.0) -> None:
        self.site = site
        self.clock_off = clock_off
        self.dead = False
        self._death: asyncio.Future[None] | None = None
        self._remains: list[asyncio.Task[Any]] = []

    def kill(self) -> None:
        """Have nothing of it ever run again."""
        self.dead = True
        # Kept, so that a garbage collection does not close them: that would run their `finally`.
        tasks = asyncio.all_tasks()
        self._remains = [t for t in tasks if isinstance(t, _Task) and t.process is self]
        if self._death is not None and not self._death.done():
            self._death.set_result(None)

    def death(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return what is done once it was killed."""
        if self._death is None:
            self._death = loop.create_future()
        return self._death

    def enter(self) -> None:
        """Make the running task, and all that it starts from now on, part of this process."""
        PROCESS.set(self)
        task = asyncio.current_task()
        if isinstance(task, _Task):
            task.process = self


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class _Handle(events.Handle):
    """A callback that does nothing once its process is dead."""

    __slots__ = ()

    def _run(self) -> None:
        process = self._context.get(PROCESS)  # type: ignore[attr-defined]
        if process is None or not process.dead:
            super()._run()  # type: ignore[misc]


class _TimerHandle(events.TimerHandle):
    __slots__ = ()

    def _run(self) -> None:
        process = self._context.get(PROCESS)  # type: ignore[attr-defined]
        if process is None or not process.dead:
            super()._run()  # type: ignore[misc]


class _Task(asyncio.Task[Any]):
    """Hashed by the order of making, so that sets of tasks iterate alike in every run."""

    def __init__(self, coro: Any, *, loop: CrashingLoop, **more: Any) -> None:
        self._serial = next(loop.serials)
        context = more.get("context")
        self.process = context.get(PROCESS) if context is not None else PROCESS.get()
        super().__init__(coro, loop=loop, **more)

    def __hash__(self) -> int:
        return self._serial


class _Future(asyncio.Future[Any]):
    def __init__(self, *, loop: CrashingLoop) -> None:
        self._serial = next(loop.serials)
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._serial


class CrashingLoop(VirtualTimeLoop):
    """See above. What would go to a thread is done at once: it takes no virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.serials = itertools.count()
        self.set_task_factory(lambda loop, coro, **more: _Task(coro, loop=self, **more))

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future with a repeatable place in sets."""
        return _Future(loop=self)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Do it now."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.loop.call_at`."""
        timer = _TimerHandle(when, callback, args, self, context)
        self._place(timer)
        return timer

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.loop.call_later`."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """See `asyncio.loop.call_soon`."""
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def _place(self, timer: asyncio.TimerHandle) -> None:
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]


def let_go(loop: CrashingLoop, processes: Iterable[Process]) -> None:
    """End all tasks and the loop, so that nothing lingers; the dead may run once more for it."""
    for process in processes:
        process.dead = False
    for _ in range(5):
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.sleep(1))
    loop.run_until_complete(_close(asyncio.all_tasks(loop)))
    loop.close()


async def _close(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Close what cannot be cancelled: it was to be woken while it was dead."""
    for task in tasks:
        coroutine = task.get_coro()
        if task is not asyncio.current_task() and isinstance(coroutine, Coroutine):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            with contextlib.suppress(Exception):
                coroutine.close()
