"""A site that kills itself (kill -9) at a chosen step: ``python dying.py MOMENT``."""

import os
import signal
import sys
from collections.abc import Callable

from gridcloud.data.files import LocalFiles
from gridcloud.executors.executor import Executor
from gridcloud.providers.local import LocalProvider
from gridcloud.site.__main__ import main
from gridcloud.site.places import Place


def die() -> None:
    """End at once, as by a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def instead(owner: type, name: str, act: Callable[..., object]) -> None:
    """Put ``act(original, *arguments)`` in place of a method."""
    original = getattr(owner, name)

    async def patched(*arguments: object, **named: object) -> object:
        return await act(original, *arguments, **named)

    setattr(owner, name, patched)


async def before(_original, *_arguments, **_named):
    """Die before the step."""
    die()


async def after(original, *arguments, **named):
    """Die when the step is done, before anybody learns of it."""
    await original(*arguments, **named)
    die()


async def when_started(original, self, name, launch, logs, started):
    """Die when the command has begun, before that is written down."""
    return await original(self, name, launch, logs, die)


MOMENTS = {
    "after-intent": (LocalProvider, "launch", before),
    "after-launch": (LocalProvider, "launch", after),
    "in-stage-in": (Executor, "prepare", after),
    "before-start": (Executor, "run", before),
    "after-start": (Executor, "run", when_started),
    "after-end": (Executor, "run", after),
    "before-stage-out": (Place, "stage_out", before),
    "in-stage-out": (LocalFiles, "get", after),
    "in-cleanup": (Place, "remove", before),
    "after-cleanup": (Place, "remove", after),
}

if __name__ == "__main__":
    instead(*MOMENTS[sys.argv.pop(1)])
    main()
