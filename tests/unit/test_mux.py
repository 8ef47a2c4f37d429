"""Many streams over one channel: the rules, and what a hostile other end can do to them."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.grid.mux import (
    FIRST_WINDOW,
    LAST_WINDOW,
    MAX_PAYLOAD,
    MAX_STREAMS,
    BadFrame,
    Frame,
    Mux,
)


def frame(kind, number, payload=b""):
    return struct.pack(">BIH", kind, number, len(payload)) + payload


@pytest.fixture
def ends():
    return Mux(dialled=True), Mux(dialled=False)


def pass_all(one, other):
    """Carry bytes until both are quiet."""
    while one.waiting or other.waiting:
        other.receive(one.take())
        one.receive(other.take())


def test_what_is_written_is_read_at_the_other_end(ends):
    """Data comes in order, and then the end."""
    one, other = ends
    flow = one.open()
    one.send(flow, memoryview(b"hello "))
    one.send(flow, memoryview(b"you"))
    one.send_eof(flow)
    pass_all(one, other)
    theirs = other.opened.popleft()
    assert other.read(theirs, 100) == b"hello you"
    assert theirs.got_eof
    other.send(theirs, memoryview(b"and back"))
    other.send_eof(theirs)
    pass_all(one, other)
    assert one.read(flow, 3) == b"and"
    assert one.read(flow, 100) == b" back"
    assert one.flows == other.flows == 0


def test_both_ends_may_open_and_numbers_do_not_clash(ends):
    """A link is symmetric: whoever dialled, both open streams."""
    one, other = ends
    mine, theirs = one.open(), other.open()
    pass_all(one, other)
    assert mine.number % 2 == 1
    assert theirs.number % 2 == 0
    assert len(one.opened) == len(other.opened) == 1


def test_a_writer_waits_for_a_slow_reader_and_goes_on_when_it_reads(ends):
    """No more than a window is on its way; reading opens it again, and wider."""
    one, other = ends
    flow = one.open()
    sent = 0
    while size := one.send(flow, memoryview(bytes(MAX_PAYLOAD))):
        sent += size
    assert sent == FIRST_WINDOW
    pass_all(one, other)
    theirs = other.opened.popleft()
    for _ in range(100):
        other.read(theirs, FIRST_WINDOW)
        pass_all(one, other)
        while one.send(flow, memoryview(bytes(MAX_PAYLOAD))):
            pass_all(one, other)
    assert LAST_WINDOW // 2 <= len(theirs.unread) <= LAST_WINDOW


def test_letting_go_breaks_the_other_end_but_not_what_was_ended(ends):
    """After EOF and RESET what was written stays readable; without EOF the stream is broken."""
    one, other = ends
    ended, cut = one.open(), one.open()
    for flow in (ended, cut):
        one.send(flow, memoryview(b"x"))
    pass_all(one, other)
    first, second = other.opened.popleft(), other.opened.popleft()
    one.send_eof(ended)
    one.reset(ended)
    one.reset(cut)
    pass_all(one, other)
    assert first.got_eof
    assert other.read(first, 9) == b"x"
    assert second.broken
    assert not second.got_eof


def test_data_that_crosses_a_reset_is_ignored(ends):
    """A frame for a stream let go of is no fault of its sender."""
    one, other = ends
    flow = one.open()
    pass_all(one, other)
    theirs = other.opened.popleft()
    other.send(theirs, memoryview(b"late"))
    one.reset(flow)
    one.receive(other.take())
    other.receive(one.take())
    assert theirs.broken
    assert not flow.unread


def test_many_pings_cost_one_answer(ends):
    """A flood of pings does not grow what waits to be sent."""
    one, _ = ends
    one.receive(b"".join(frame(Frame.PING, 0, b"%08d" % n) for n in range(1000)))
    assert one.take() == frame(Frame.PONG, 0, b"00000999")
    assert one.take() == b""


def test_opening_and_letting_go_leaves_nothing(ends):
    """A peer cannot fill the line of streams to be taken by opening and resetting."""
    _, other = ends
    for number in range(1, 4001, 2):
        other.receive(frame(Frame.OPEN, number) + frame(Frame.RESET, number))
    assert other.flows == 0
    assert not other.opened


@pytest.mark.parametrize(
    "said",
    [
        frame(7, 1),
        frame(Frame.OPEN, 2),
        frame(Frame.OPEN, 0),
        frame(Frame.OPEN, 1, b"x"),
        frame(Frame.OPEN, 3) + frame(Frame.OPEN, 1),
        frame(Frame.OPEN, 1) * 2,
        frame(Frame.DATA, 1, b"x"),
        frame(Frame.DATA, 2, b"x"),
        frame(Frame.OPEN, 1) + frame(Frame.DATA, 1),
        struct.pack(">BIH", Frame.DATA, 1, MAX_PAYLOAD + 1),
        frame(Frame.OPEN, 1) + frame(Frame.DATA, 1, bytes(MAX_PAYLOAD)) * 3,
        frame(Frame.OPEN, 1) + frame(Frame.EOF, 1) * 2,
        frame(Frame.OPEN, 1) + frame(Frame.EOF, 1) + frame(Frame.DATA, 1, b"x"),
        frame(Frame.OPEN, 1) + frame(Frame.CREDIT, 1, b"\xff\xff\xff\xff"),
        frame(Frame.OPEN, 1) + frame(Frame.CREDIT, 1, b"\0"),
        frame(Frame.PING, 1, bytes(8)),
        frame(Frame.PING, 0, b"x"),
        b"".join(frame(Frame.OPEN, 1 + 2 * n) for n in range(MAX_STREAMS + 1)),
    ],
)
def test_what_breaks_a_rule_ends_the_channel(said):
    """Bad kinds, numbers, sizes, and more than was allowed are all refused."""
    with pytest.raises(BadFrame):
        Mux(dialled=False).receive(said)


_FRAMES = st.builds(
    frame, st.integers(0, 7), st.integers(0, 9), st.binary(max_size=40) | st.just(bytes(16384))
)


@given(st.lists(_FRAMES | st.binary(max_size=30), max_size=60), st.booleans())
def test_whatever_comes_what_is_kept_stays_bounded(chunks, dialled):
    """Random frames and noise either break a rule or stay within streams, windows and answers."""
    mux = Mux(dialled=dialled)
    mine = [mux.open(), mux.open()]
    mux.take()
    try:
        for chunk in chunks:
            mux.receive(chunk)
    except BadFrame:
        pass
    assert len(mux.opened) <= MAX_STREAMS
    assert all(len(flow.unread) <= FIRST_WINDOW for flow in [*mux.opened, *mine])
    assert mux.waiting <= 15
    mux.fail()
    assert mux.flows == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["open", "send", "eof", "read", "reset"]), st.integers(0, 5)),
        max_size=60,
    ),
    st.integers(1, 50),
)
def test_two_honest_ends_never_break_a_rule(steps, size):
    """Whatever is done at one end, in whatever pieces it arrives, the other understands."""
    one, other = Mux(dialled=True), Mux(dialled=False)
    flows = {one: [], other: []}
    for number, (what, which) in enumerate(steps):
        end = (one, other)[number % 2]
        if what == "open" and end.may_open:
            flows[end].append(end.open())
        elif flows[end]:
            flow = flows[end][which % len(flows[end])]
            if what == "send" and not flow.sent_eof and not flow.broken:
                end.send(flow, memoryview(bytes(size)))
            elif what == "eof":
                end.send_eof(flow)
            elif what == "read":
                end.read(flow, size)
            elif what == "reset":
                end.reset(flow)
        if number % 3 == 0:
            for source, target in ((one, other), (other, one)):
                data = source.take()
                for at in range(0, len(data), size):
                    target.receive(data[at : at + size])
                flows[target] += target.opened
                target.opened.clear()
    pass_all(one, other)
