"""Campaigns of faults: launches hurt, cancelled and killed at random instants, and nothing is left.

A cloud's test gives a `Subject` and calls `hurt` for each of `seeds()`; its name contains
``faults``, so that ``make nightly`` finds it and runs it more often (``RUNS=500``). A run that
leaves something raises `Leaked`, which names the seed; ``SEED=N`` runs that one again.

    @pytest.mark.parametrize("seed", seeds())
    async def test_faults_leave_nothing(seed, ...):
        await hurt(seed, Subject(...))
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from gridcloud.errors import GridcloudError
from gridcloud.model.lease import Lease, Machine
from gridcloud.providers.base import Provider

_MOST_SWEEPS = 200


class Leaked(AssertionError):
    """Something is left that nobody knows of."""


def seeds(usual: int = 50) -> range:
    """Return the seeds to run: ``usual`` many, or as the environment says."""
    if os.environ.get("SEED"):
        return range(int(os.environ["SEED"]), int(os.environ["SEED"]) + 1)
    return range(int(os.environ.get("RUNS") or usual))


@dataclass
class Subject:
    """What is hurt.

    ``make`` gives a provider that remembers nothing, ``kill`` ends one as ``kill -9`` does: no
    request leaves it any more. ``calm`` ends all faults, and ``left`` tells the truth of what is
    there, past all faults. A launch takes about ``launch_seconds``; what is late appears within
    ``settles_seconds``.
    """

    make: Callable[[], Provider]
    new_lease: Callable[[], Lease]
    left: Callable[[], Awaitable[Sequence[object]]]
    kill: Callable[[Provider], None] = lambda provider: None
    calm: Callable[[], None] = lambda: None
    launch_seconds: float = 60.0
    settles_seconds: float = 5.0
    leases: int = 3
    #: What happened, for a failing run to tell.
    story: list[str] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Add to the story, with the seconds since the loop began."""
        self.story.append(f"{asyncio.get_running_loop().time():10.3f}  {what}")


async def hurt(seed: int, subject: Subject) -> None:
    """Run one campaign; raises `Leaked` if something is left of it in the end."""
    chance = random.Random(seed)
    try:
        live: dict[str, Lease] = {}
        for _ in range(chance.randint(1, 3)):
            await _life_of_a_site(chance, subject, live)
            if chance.random() < 0.5:
                live.clear()  # the store was lost as well
        subject.calm()
        await _swept(subject)
    except (Leaked, AssertionError) as error:
        told = "\n".join(subject.story)
        raise Leaked(f"seed {seed} (SEED={seed} runs it again): {error}\n{told}") from error


async def _life_of_a_site(chance: random.Random, subject: Subject, live: dict[str, Lease]) -> None:
    """Start, launch what is to be there, do this and that, and die or stop."""
    provider = subject.make()
    subject.tell(f"a site starts, with {len(live)} leases")
    while len(live) < subject.leases:
        lease = subject.new_lease()
        live[lease.id] = lease
    tasks: dict[str, asyncio.Task[object]] = {}
    for lease in live.values():
        tasks[lease.id] = asyncio.create_task(_launch(provider, subject, lease))
    others: list[asyncio.Task[object]] = []
    for _ in range(chance.randint(0, 4)):
        await asyncio.sleep(chance.uniform(0, subject.launch_seconds / 2))
        victim = chance.choice(sorted(tasks))
        match chance.choice(("cancel", "terminate", "mend", "wait")):
            case "cancel":
                subject.tell(f"cancel {victim}")
                tasks[victim].cancel()
            case "terminate":
                live.pop(victim, None)
                others.append(asyncio.create_task(_terminate(provider, subject, victim)))
            case "mend":
                others.append(asyncio.create_task(_mend(provider, subject, set(live))))
            case "wait":
                await asyncio.wait({tasks[victim]}, timeout=subject.launch_seconds)
    await _end(provider, subject, [*tasks.values(), *others], killed=chance.random() < 0.7)


async def _end(
    provider: Provider, subject: Subject, tasks: list[asyncio.Task[object]], *, killed: bool
) -> None:
    subject.tell("killed" if killed else "stopped")
    if killed:
        subject.kill(provider)
    for task in tasks:
        task.cancel()
    await provider.close()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        expected = GridcloudError | asyncio.CancelledError
        if isinstance(result, BaseException) and not isinstance(result, expected):
            raise result


async def _launch(provider: Provider, subject: Subject, lease: Lease) -> None:
    try:
        machine: Machine = await provider.launch(lease)
    except GridcloudError as error:
        subject.tell(f"launch {lease.id}: {error}")
    else:
        subject.tell(f"launch {lease.id}: {machine.id}")


async def _terminate(provider: Provider, subject: Subject, lease_id: str) -> None:
    try:
        await provider.terminate(lease_id)
    except GridcloudError as error:
        subject.tell(f"terminate {lease_id}: {error}")
    else:
        subject.tell(f"terminate {lease_id}: done")


async def _mend(provider: Provider, subject: Subject, live: set[str]) -> list[str]:
    """Do what a reconciler does: remove what no lease has; return what was found."""
    try:
        strays = [lease_id for lease_id in await provider.made() if lease_id not in live]
    except GridcloudError as error:
        subject.tell(f"made: {error}")
        return ["unknown"]
    await asyncio.gather(*(_terminate(provider, subject, lease_id) for lease_id in strays))
    return strays


async def _swept(subject: Subject) -> None:
    """With a new provider and no leases at all, remove what is listed until nothing comes up."""
    provider = subject.make()
    try:
        quiet = 0
        for _ in range(_MOST_SWEEPS):
            quiet = 0 if await _mend(provider, subject, set()) else quiet + 1
            if quiet == 2:
                break
            await asyncio.sleep(subject.settles_seconds)
        if left := await subject.left():
            raise Leaked(f"left behind: {left}")
        if quiet < 2:
            raise Leaked("it was never quiet")
    finally:
        await provider.close()
