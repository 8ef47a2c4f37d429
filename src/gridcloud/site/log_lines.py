"""What goes into a site's log: so much of each event, and nothing that steers a terminal.

Peers cause lines: what they are refused, what breaks when they meddle. Without a bound one that
floods would fill the disk.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from structlog.typing import EventDict, WrappedLogger

from gridcloud.grid.rates import TokenBucket

#: Lines of one event: so many at once, and then a second.
AT_ONCE, PER_SECOND = 500.0, 1.0


@dataclass
class _Event:
    bucket: TokenBucket
    left_out: int = 0


@dataclass
class Restraint:
    """A structlog processor that leaves out what comes too often, and says how much that was.

    Events are counted by their name, which is always a constant of the program.
    """

    clock: Callable[[], float] = time.monotonic
    _events: dict[str, _Event] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with a full allowance for every event."""
        self._events = defaultdict(
            lambda: _Event(TokenBucket(PER_SECOND, AT_ONCE, self.clock())),
        )

    def __call__(self, _logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        """Return the line, or raise `structlog.DropEvent`."""
        event = self._events[str(line.get("event"))]
        if not event.bucket.try_take(1, self.clock()):
            event.left_out += 1
            raise structlog.DropEvent
        if event.left_out:
            line["left_out_before"], event.left_out = event.left_out, 0
        return line


def printable(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Return the line with nothing in its texts that a terminal would obey; ends of lines stay."""
    for name, text in line.items():
        if isinstance(text, str) and not text.isprintable():
            line[name] = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return line
