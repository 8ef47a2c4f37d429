"""What is replaced in iroh's Python binding does the same as before."""

import asyncio
import ctypes

from hypothesis import given
from hypothesis import strategies as st
from iroh import iroh_ffi

from gridcloud.grid.iroh_binding import lighten


def test_this_binding_allows_both():
    """With the iroh installed nothing is left slow; a new iroh that does not fit is noticed."""
    assert lighten() == (True, True)
    assert lighten() == (True, True)


@given(st.lists(st.binary(max_size=5000), max_size=5))
def test_bytes_arrive_as_they_were(parts):
    """Whatever is written into a buffer of iroh's stands there whole and in order."""
    lighten()
    builder = iroh_ffi._UniffiRustBufferBuilder()
    for part in parts:
        builder.write(part)
        builder.write(memoryview(part))
    buffer = builder.finalize()
    whole = b"".join(part + part for part in parts)
    assert buffer.len == len(whole)
    assert ctypes.string_at(buffer.data, buffer.len) == whole
    buffer.free()


async def test_a_call_that_ends_at_once_leaves_others_their_turn():
    """The loop goes round for each call, so that nothing that flows freely keeps it to itself."""
    lighten()
    loop, turns = asyncio.get_running_loop(), []
    for number in range(3):
        future = loop.create_future()
        loop.call_soon(turns.append, number)
        handle = iroh_ffi._UniffiContinuationHandleMap.insert((loop, future))
        iroh_ffi._uniffi_continuation_callback(handle, 0)
        assert not future.done()
        assert await future == 0
    assert turns == [0, 1, 2]


async def test_a_call_that_ends_elsewhere_wakes_the_loop():
    """A result from a thread of iroh's own comes through, though the loop slept."""
    lighten()
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    handle = iroh_ffi._UniffiContinuationHandleMap.insert((loop, future))
    await asyncio.to_thread(iroh_ffi._uniffi_continuation_callback, handle, 1)
    assert await asyncio.wait_for(future, 10) == 1
    cancelled = loop.create_future()
    cancelled.cancel()
    handle = iroh_ffi._UniffiContinuationHandleMap.insert((loop, cancelled))
    iroh_ffi._uniffi_continuation_callback(handle, 0)
    await asyncio.sleep(0)
