"""An asyncio event loop whose clock is virtual: it jumps to the next timer instead of waiting.

An hour of a hundred sites passes in seconds, and twice the same program does the same in the same
order: there are no threads, sockets or signals in it, and its clock is moved by timers alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")

#: When virtual time begins.
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


class Stalled(RuntimeError):
    """Everything waits, and nothing is left that could ever happen."""


class _Jump:
    """Stands where a loop has its selector: "waits" by moving the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stalled("Every task waits for another, and no timer is set.")
        self.now += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """See above. ``time()`` begins at 0; what would wait for the world outside raises."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Jump()
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._selector.now

    def clock(self, off: timedelta = timedelta(0), drift: float = 0.0) -> Callable[[], datetime]:
        """Return a wall clock for one site, some way ``off`` and gaining ``drift`` s per second."""
        begin = EPOCH + off
        return lambda: begin + timedelta(seconds=self.time() * (1.0 + drift))

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """As `call_soon`: there is one thread."""
        self._check_thread()  # type: ignore[attr-defined]
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:
        """Refuse: a thread's time is real."""
        raise RuntimeError("There are no threads in virtual time.")

    def _process_events(self, event_list: list[Any]) -> None:
        """Do nothing: no events come from outside."""

    def _write_to_self(self) -> None:
        """Do nothing: nobody else could have to wake the loop."""

    def _add_reader(self, *_: Any) -> NoReturn:
        raise RuntimeError("There are no sockets in virtual time.")

    _add_writer = _add_reader
    _make_socket_transport = _add_reader
    _make_datagram_transport = _add_reader
    create_connection = create_server = create_datagram_endpoint = _add_reader


def run(main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run ``main()`` to its end in a virtual time of its own; see `VirtualTimeLoop`.

    Raises `Stalled` if it would wait for ever.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def now() -> float:
    """Return the virtual seconds since the running loop began."""
    return asyncio.get_running_loop().time()
