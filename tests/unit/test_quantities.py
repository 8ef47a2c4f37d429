"""Quantities mean what people mean, and nonsense is refused."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import InvalidSpec
from gridcloud.model.quantities import (
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
    parse_tasks,
)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("0", 0), ("512", 512), ("4G", 4 * 2**30), ("1.5g", 3 * 2**29), ("512MiB", 2**29)],
)
def test_bytes(text, amount):
    """Prefixes are powers of 1024, in any case, with or without iB."""
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "-1", "4X", "G", "1e9", "four"])
def test_bytes_nonsense(text):
    """What is not an amount is an error that shows how to write one."""
    with pytest.raises(InvalidSpec, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400), ("1:30:00", 5400), ("10:00", 600)],
)
def test_duration(text, seconds):
    """Units and clock notation both work."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "-5s", "2 weeks", "1:2:3:4", "9" * 400 + "d"])
def test_duration_nonsense(text):
    """A bare number is refused too, since tools disagree what it means."""
    with pytest.raises(InvalidSpec):
        parse_duration(text)


@given(st.integers(0, 2**62))
def test_formatted_bytes_are_about_right(amount):
    """What is shown is within a hundredth of the truth."""
    shown = format_bytes(amount).replace(" ", "")
    assert parse_bytes(shown) == pytest.approx(amount, rel=0.01)


def test_formatted_duration():
    """The two largest units are shown."""
    shown = [format_duration(timedelta(seconds=s)) for s in (2.44, 65, 3700, 90000)]
    assert shown == ["2.4s", "1m 05s", "1h 01m", "1d 1h"]


def test_tasks():
    """Ranges, lists and steps mix; doubles count once."""
    assert parse_tasks("1-3,2,10-20:5") == (1, 2, 3, 10, 15, 20)


@pytest.mark.parametrize("text", ["", "5-1", "a-b", "1-5:0", "1-999999999", "-3", "1,,2"])
def test_tasks_nonsense(text):
    """Empty, reversed and enormous ranges are refused before any memory is spent."""
    with pytest.raises(InvalidSpec):
        parse_tasks(text)
