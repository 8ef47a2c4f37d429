"""Quantities in files that people write: a field of such a type takes ``4G`` or ``2h``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator

from gridcloud.errors import InvalidSpec
from gridcloud.model.quantities import parse_bytes, parse_duration


def as_written(parse: Callable[[str], object]) -> BeforeValidator:
    """Let a text stand for a quantity; a bad one becomes an error that names its place."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except InvalidSpec as error:
            raise ValueError(str(error)) from error

    return BeforeValidator(read)


Duration = Annotated[timedelta, as_written(parse_duration)]
Bytes = Annotated[int, as_written(parse_bytes)]
