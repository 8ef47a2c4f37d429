"""Many streams over one ordered channel: the pure half, bytes in and bytes out.

A frame is ``kind (1 byte) | stream (4) | length (2) | payload``, numbers in network order. The
side that dialled gives its streams odd numbers, the other even ones; each side's numbers grow.

- ``OPEN``: a stream begins. ``DATA``: 1 to 16 KiB of it. ``EOF``: the sender writes no more.
- ``RESET``: the sender has let go of both directions; what it wrote before an ``EOF`` stays true.
  Of a stream that the other end has not begun to look at, nothing is left.
- ``CREDIT``: that many more bytes may be sent on the stream; each direction begins with
  `FIRST_WINDOW`, and it grows to `LAST_WINDOW` where what comes is read.
- ``PING``: eight bytes, which ``PONG`` gives back; stream 0.

What breaks a rule raises `BadFrame`, and the channel is of no use any more. What is kept of a peer
is bounded: `MAX_STREAMS` streams that it opened, with at most a window's bytes each unread.
"""

from __future__ import annotations

import struct
from collections import deque
from enum import IntEnum

FIRST_WINDOW = 32 * 1024
LAST_WINDOW = 512 * 1024
MAX_STREAMS = 96
MAX_PAYLOAD = 16 * 1024
#: A frame with less than that is a small one: it costs more than what it carries.
SMALL_PAYLOAD = 256
_HEADER = struct.Struct(">BIH")
_CREDIT = struct.Struct(">I")
_MAX_CREDIT = 16 * 1024 * 1024
_LAST_NUMBER = 2**32 - 2
_PING_BYTES = 8


class BadFrame(Exception):
    """The other end breaks the rules, or the numbers have run out."""


class Frame(IntEnum):
    """The kinds of frames."""

    OPEN = 0
    DATA = 1
    EOF = 2
    RESET = 3
    CREDIT = 4
    PING = 5
    PONG = 6


#: The least and the most bytes of each kind's payload.
_SIZES = {
    Frame.OPEN: (0, 0),
    Frame.DATA: (1, MAX_PAYLOAD),
    Frame.EOF: (0, 0),
    Frame.RESET: (0, 0),
    Frame.CREDIT: (_CREDIT.size, _CREDIT.size),
    Frame.PING: (_PING_BYTES, _PING_BYTES),
    Frame.PONG: (_PING_BYTES, _PING_BYTES),
}


class Flow:
    """What is known of one stream. Made and changed by `Mux` alone."""

    def __init__(self, number: int, *, mine: bool) -> None:
        self.number = number
        self.mine = mine
        self.unread = bytearray()
        self.may_send = FIRST_WINDOW
        self.may_come = FIRST_WINDOW
        self.window = FIRST_WINDOW
        self.consumed = 0
        self.sent_eof = False
        self.got_eof = False
        #: The other end, or the channel, let go of it; what is unread stays readable after an EOF.
        self.broken = False

    @property
    def over(self) -> bool:
        """Nothing will come or go on it any more."""
        return self.broken or (self.sent_eof and self.got_eof)


class Mux:
    """The streams of one channel. Not for several threads."""

    def __init__(self, *, dialled: bool) -> None:
        self._dialled = dialled
        self._next = 1 if dialled else 2
        self._last_of_theirs = 0
        self._flows: dict[int, Flow] = {}
        self._mine = 0
        self._theirs = 0
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._pong: bytes | None = None
        #: Streams that the other end opened and nobody has taken yet.
        self.opened: deque[Flow] = deque()
        #: How many small frames have come.
        self.small = 0
        #: The payload of the last ``PONG``.
        self.answered = b""

    @property
    def flows(self) -> int:
        """How many streams are open."""
        return len(self._flows)

    @property
    def waiting(self) -> int:
        """How many bytes wait to be sent."""
        return len(self._outgoing) + (0 if self._pong is None else _HEADER.size + _PING_BYTES)

    @property
    def may_open(self) -> bool:
        """Whether the other end would take one more stream."""
        return self._mine < MAX_STREAMS

    def take(self) -> bytes:
        """Return the bytes to send, and forget them."""
        if self._pong is not None:
            self._put(Frame.PONG, 0, self._pong)
            self._pong = None
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive(self, data: bytes) -> list[Flow]:
        """Take in bytes that came; return the streams that changed. Raises `BadFrame`."""
        self._incoming += data
        changed: dict[int, Flow] = {}
        at = 0
        while len(self._incoming) - at >= _HEADER.size:
            code, number, length = _HEADER.unpack_from(self._incoming, at)
            try:
                kind = Frame(code)
            except ValueError as error:
                raise BadFrame(f"no frame is of kind {code}") from error
            least, most = _SIZES[kind]
            if not least <= length <= most:
                raise BadFrame(f"{kind.name} of {length} bytes")
            end = at + _HEADER.size + length
            if end > len(self._incoming):
                break
            payload = bytes(self._incoming[at + _HEADER.size : end])
            at = end
            self.small += length < SMALL_PAYLOAD
            if (flow := self._on_frame(kind, number, payload)) is not None:
                changed[number] = flow
        del self._incoming[:at]
        return list(changed.values())

    def open(self) -> Flow:
        """Begin a stream; only if `may_open`. Raises `BadFrame` when the numbers have run out."""
        assert self.may_open
        if self._next > _LAST_NUMBER:
            raise BadFrame("too many streams were opened in all")
        flow = Flow(self._next, mine=True)
        self._next += 2
        self._mine += 1
        self._flows[flow.number] = flow
        self._put(Frame.OPEN, flow.number)
        return flow

    def send(self, flow: Flow, data: memoryview) -> int:
        """Send the beginning of ``data``, as much as may go now; return how many bytes that is."""
        assert not flow.sent_eof and not flow.broken
        size = min(len(data), flow.may_send, MAX_PAYLOAD)
        if size:
            self._put(Frame.DATA, flow.number, data[:size])
            flow.may_send -= size
        return size

    def send_eof(self, flow: Flow) -> None:
        """Say that no more comes; idempotent."""
        if not flow.sent_eof and not flow.broken:
            flow.sent_eof = True
            self._put(Frame.EOF, flow.number)
            self._forget_if_over(flow)

    def read(self, flow: Flow, limit: int) -> bytes:
        """Return up to ``limit`` unread bytes, and let the other end send more."""
        data = bytes(flow.unread[:limit])
        del flow.unread[:limit]
        flow.consumed += len(data)
        if flow.consumed >= flow.window // 2 and not flow.got_eof and not flow.broken:
            window = min(2 * flow.window, LAST_WINDOW)
            credit = flow.consumed + window - flow.window
            self._put(Frame.CREDIT, flow.number, _CREDIT.pack(credit))
            flow.may_come += credit
            flow.window = window
            flow.consumed = 0
        return data

    def reset(self, flow: Flow) -> None:
        """Let go of a stream; idempotent."""
        flow.unread.clear()
        if not flow.over:
            flow.broken = True
            self._put(Frame.RESET, flow.number)
            self._forget_if_over(flow)

    def ping(self, token: bytes) -> None:
        """Ask for a sign of life."""
        self._put(Frame.PING, 0, token)

    def fail(self) -> list[Flow]:
        """Break all streams, since the channel is gone; return them."""
        flows = list(self._flows.values())
        for flow in flows:
            flow.broken = True
        self._flows.clear()
        self._outgoing.clear()
        self._pong = None
        return flows

    def _on_frame(self, kind: Frame, number: int, payload: bytes) -> Flow | None:
        if kind in (Frame.PING, Frame.PONG):
            self._on_sign(kind, number, payload)
            return None
        if kind is Frame.OPEN:
            return self._on_open(number)
        flow = self._flows.get(number)
        if flow is None:
            self._check_known(number)
            return None  # of a stream we let go of: it crossed our RESET
        match kind:
            case Frame.DATA:
                if flow.got_eof or len(payload) > flow.may_come:
                    raise BadFrame("more data than allowed")
                flow.may_come -= len(payload)
                flow.unread += payload
            case Frame.EOF:
                if flow.got_eof:
                    raise BadFrame("a second end")
                flow.got_eof = True
            case Frame.RESET:
                flow.broken = True
                if flow in self.opened:  # else opening and letting go would fill this for free
                    self.opened.remove(flow)
            case Frame.CREDIT:
                flow.may_send += _CREDIT.unpack(payload)[0]
                if flow.may_send > _MAX_CREDIT:
                    raise BadFrame("too much credit")
        self._forget_if_over(flow)
        return flow

    def _on_sign(self, kind: Frame, number: int, payload: bytes) -> None:
        if number != 0:
            raise BadFrame(f"{kind.name} on a stream")
        if kind is Frame.PING:
            self._pong = payload  # of many at once the last: they cost one answer
        else:
            self.answered = payload

    def _on_open(self, number: int) -> Flow:
        if number % 2 == (1 if self._dialled else 0) or number <= self._last_of_theirs:
            raise BadFrame("a stream with a number not its opener's, or used before")
        if self._theirs >= MAX_STREAMS:
            raise BadFrame("too many streams")
        self._last_of_theirs = number
        flow = Flow(number, mine=False)
        self._flows[number] = flow
        self._theirs += 1
        self.opened.append(flow)
        return flow

    def _check_known(self, number: int) -> None:
        """Raise for a frame of a stream that never was."""
        mine = number % 2 == (1 if self._dialled else 0)
        if number == 0 or number > (self._next - 2 if mine else self._last_of_theirs):
            raise BadFrame("a stream that was never opened")

    def _forget_if_over(self, flow: Flow) -> None:
        if flow.over and self._flows.pop(flow.number, None) is not None:
            if flow.mine:
                self._mine -= 1
            else:
                self._theirs -= 1

    def _put(self, kind: Frame, number: int, payload: bytes | memoryview = b"") -> None:
        self._outgoing += _HEADER.pack(kind, number, len(payload))
        self._outgoing += payload
