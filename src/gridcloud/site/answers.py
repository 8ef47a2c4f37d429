"""What several providers answered that were asked at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from gridcloud.errors import GridcloudError

T = TypeVar("T")


def put_together(
    names: Iterable[str], answers: Iterable[Sequence[T] | BaseException]
) -> tuple[list[T], list[str]]:
    """Return all that they answered, and the problem of each provider that did not.

    ``answers`` are those of `asyncio.gather` with its exceptions, in the order of ``names``. What
    is no provider's problem but a fault is raised.
    """
    found: list[T] = []
    problems: list[str] = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, GridcloudError | TimeoutError):
            problems.append(f"{name}: {answer or 'it did not answer in time'}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found += answer
    return found, problems
