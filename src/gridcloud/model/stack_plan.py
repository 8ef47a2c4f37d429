"""What has to be done so that the machines there are what a stack says. Pure.

Nothing is remembered of a stack but its machines, each of which knows what was asked of it. So
whoever has the file can bring the stack up or down, again and again, from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from gridcloud.errors import InvalidSpec
from gridcloud.model.accounts import NetworkInfo, NetworkReport
from gridcloud.model.fleet import MachineInfo, MachineRequest, MachineState
from gridcloud.model.frozen import Frozen
from gridcloud.model.stack import NetworkEntry, Stack, StackMachine, filled, full_name

_THERE = (MachineState.LAUNCHING, MachineState.READY)


class Step(StrEnum):
    """What is to be done about a machine of a stack."""

    KEEP = "keep"
    MAKE = "make"
    REPLACE = "replace"
    REMOVE = "remove"


class Change(Frozen):
    """One machine, by its name within the stack, what is done about it, and why."""

    machine: str
    step: Step
    why: str = ""


def changes(stack: Stack, files: Mapping[str, str], there: Iterable[MachineInfo]) -> list[Change]:
    """Return what is to be done about each machine, in the order to do it: what is in the way or
    in the stack no longer goes first.

    ``files`` is as in `StackMachine.order`; ``there`` are the site's machines, in full. A machine
    is kept if it is the same in every way but its end; one that is told facts of a machine that is
    made anew is made anew, too.
    """
    mine = {info.name: info for info in there if info.order.stack == stack.name and _there(info)}
    wanted = {full_name(stack.name, machine.name): machine for machine in stack.machines}
    found = [
        Change(machine=_short(stack, name), step=Step.REMOVE, why="is not in the file")
        for name in sorted(mine.keys() - wanted.keys())
    ]
    known = facts_of(stack, mine.values())
    for name, machine in wanted.items():
        info = mine.get(name)
        if info is None:
            found.append(Change(machine=machine.name, step=Step.MAKE))
        elif why := _differs(stack, machine, info, files, known):
            found.append(Change(machine=machine.name, step=Step.REPLACE, why=why))
        else:
            found.append(Change(machine=machine.name, step=Step.KEEP))
            continue
        known.pop(machine.name, None)
    return found


def placed(stack: Stack, there: NetworkReport) -> Stack:
    """Return a stack whose networks are at providers that can make them, in the regions where they
    are already, and its machines where their networks are.

    Raises `InvalidSpec` where that cannot be, before anything is made: no provider makes networks
    by name, or not the one that is named; there is another network of that name.
    """
    networks = {}
    for name, network in stack.networks.items():
        provider = network.provider or (there.makers[0] if len(there.makers) == 1 else "")
        if provider not in there.makers:
            none = f"the provider {provider!r} makes none by name"
            raise InvalidSpec(
                f"networks.{name}: {none if provider else 'at which provider is it to be?'}",
                hint=f"These make networks by name: {', '.join(there.makers) or 'none here'}.",
            )
        known = _known(stack, name, there)
        if known and (known.cidr, known.provider) != (network.cidr, provider):
            raise InvalidSpec(
                f"networks.{name}: it is there already, as {known.cidr} at {known.provider}.",
                hint="Bring the stack down first: its machines would have to leave it.",
            )
        region = network.region or (known.region if known else "")
        networks[name] = network.model_copy(update={"provider": provider, "region": region})
    machines = tuple(
        machine
        if not machine.network
        else machine.model_copy(
            update={
                "provider": networks[machine.network].provider,
                "region": networks[machine.network].region,
            }
        )
        for machine in stack.machines
    )
    return stack.model_copy(update={"networks": networks, "machines": machines})


def lacking_networks(stack: Stack, there: NetworkReport) -> dict[str, NetworkEntry]:
    """Return the networks of a stack that have to be made, by their names within it."""
    return {
        name: network
        for name, network in stack.networks.items()
        if _known(stack, name, there) is None
    }


def networks_of(stack: Stack, there: NetworkReport) -> list[NetworkInfo]:
    """Return the networks of a stack that are there."""
    return [known for name in stack.networks if (known := _known(stack, name, there))]


def _known(stack: Stack, name: str, there: NetworkReport) -> NetworkInfo | None:
    called = full_name(stack.name, name)
    return next((each for each in there.networks if each.name == called), None)


def facts_of(stack: Stack, there: Iterable[MachineInfo]) -> dict[str, dict[str, str]]:
    """Return what placeholders may say of the machines of a stack that are ready, by short name."""
    facts = {}
    for info in there:
        if info.order.stack != stack.name or info.state is not MachineState.READY:
            continue
        endpoint = info.endpoint
        facts[_short(stack, info.name)] = {
            "address": endpoint.host if endpoint else "",
            "user": endpoint.user if endpoint else "",
            "port": str(endpoint.port) if endpoint else "",
            "name": info.name,
            "provider": info.provider,
            "region": info.region,
            "shape": info.shape,
        }
    return facts


def request(
    stack: Stack,
    machine: StackMachine,
    files: Mapping[str, str],
    facts: Mapping[str, Mapping[str, str]],
) -> MachineRequest:
    """Return what a site is asked for one machine, once those before it are ready."""
    before = {name: facts[name] for name in machine.after if name in facts}
    return MachineRequest(
        need=machine.need,
        order=machine.order(stack.name, files, before),
        provider=machine.provider,
        region=machine.region,
    )


def outputs(stack: Stack, facts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the stack's outputs; one that speaks of a machine that is not ready is left out."""
    found = {}
    for name, text in stack.outputs.items():
        try:
            found[name] = filled(text, "", facts)
        except InvalidSpec:
            continue  # what is written was checked with the file: the machine is not there
    return found


def downwards(stack: Stack, there: Iterable[MachineInfo]) -> list[MachineInfo]:
    """Return the machines of a stack that are there, those that others need last."""
    order = {full_name(stack.name, each.name): at for at, each in enumerate(stack.machines)}
    mine = [info for info in there if info.order.stack == stack.name and _there(info)]
    return sorted(mine, key=lambda info: -order.get(info.name, len(order)))


def rounds(stack: Stack, todo: Sequence[Change]) -> list[list[StackMachine]]:
    """Return what is to be made in rounds: the machines of one can be made at the same time."""
    left = {each.machine for each in todo if each.step in (Step.MAKE, Step.REPLACE)}
    found: list[list[StackMachine]] = []
    while left:
        ready = [m for m in stack.machines if m.name in left and not left.intersection(m.after)]
        found.append(ready)
        left -= {machine.name for machine in ready}
    return found


def _there(info: MachineInfo) -> bool:
    return info.state in _THERE


def _short(stack: Stack, name: str) -> str:
    return name.removeprefix(f"{stack.name}-")


def _differs(
    stack: Stack,
    machine: StackMachine,
    info: MachineInfo,
    files: Mapping[str, str],
    facts: Mapping[str, Mapping[str, str]],
) -> str:
    """Return in which way a machine that is there is not what is wanted; empty if it is."""
    try:
        wanted = request(stack, machine, files, facts)
    except InvalidSpec:
        return "is told of a machine that is made anew"
    for what in ("cpus", "memory_bytes", "gpus"):
        if getattr(wanted.need, what) != getattr(info.need, what):
            return f"has other {what.removesuffix('_bytes')}"
    if machine.provider and info.provider and machine.provider != info.provider:
        return f"is at {info.provider}"
    for field in type(wanted.order).model_fields:
        if getattr(wanted.order, field) != getattr(info.order, field):
            return f"has other {field.replace('_', '-')}"
    return ""
