"""Stacks: several machines, their volumes and networks described in one file, and what that file
comes to.

A file names machines, singly or by ranges (``node[01-04]``), what they have in common, and in which
order they are made. Reading it is strict: a word that means nothing is an error with its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from math import prod
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import MachineOrder, Name, Playbook, VolumeMount
from gridcloud.model.need import Need
from gridcloud.model.things import private_range
from gridcloud.model.written import Bytes, Duration

_RANGE = re.compile(r"\[(\d{1,9})-(\d{1,9})\]")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_LONGEST_NAME = 63
_MOST_MACHINES = 500

#: What ``{MACHINE.WORD}`` may ask of a machine that is there.
FACTS = ("address", "user", "port", "name", "provider", "region", "shape")


class MachineEntry(Frozen):
    """What a file says of one machine, of a range of them, or of all that use it as a template.

    What is left out comes from the template, then from ``defaults``. ``user_data`` and
    ``playbooks`` are files beside the stack's own. ``volumes`` are ``NAME:/MOUNT``. ``after`` names
    machines (or ranges) that must be ready first. In ``variables``, ``{name}`` is the machine's own
    name and ``{OTHER.address}`` a fact of one that it is made after.
    """

    template: str = ""
    cpus: Annotated[int, Field(ge=1, le=2**20)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    time: Duration | None = None
    image: str | None = None
    provider: str | None = None
    spot: bool | None = None
    network: str | None = None
    user_data: Annotated[str | None, Field(alias="user-data")] = None
    playbooks: tuple[str, ...] | None = None
    variables: dict[str, str] | None = None
    volumes: tuple[str, ...] | None = None
    after: tuple[str, ...] | None = None

    def over(self, base: MachineEntry) -> MachineEntry:
        """Return this with what it leaves out taken from ``base``; variables are joined."""
        said = {name for name in self.model_fields_set if getattr(self, name) is not None}
        update = {name: getattr(self, name) for name in said}
        if self.variables is not None and base.variables:
            update["variables"] = base.variables | self.variables
        return base.model_copy(update=update)


class VolumeEntry(Frozen):
    """A volume of a stack. It outlives the machines, and the stack unless it is told otherwise."""

    size: Annotated[Bytes, Field(ge=2**20)]


class NetworkEntry(Frozen):
    """A network of a stack: a private range of addresses, at a provider and in a region of it.

    Without a provider it is that of its machines, or the only one that makes networks by name.
    """

    cidr: Annotated[str, Field(max_length=32)]
    provider: Annotated[str, Field(max_length=64)] = ""
    region: Annotated[str, Field(max_length=128)] = ""

    _private = field_validator("cidr")(private_range)


class StackFile(Frozen):
    """A stack as it is written; see docs/how-to/describe-a-stack.md."""

    name: Name
    defaults: MachineEntry = MachineEntry()
    templates: dict[Name, MachineEntry] = {}
    volumes: dict[Name, VolumeEntry] = {}
    networks: Annotated[dict[Name, NetworkEntry], Field(max_length=16)] = {}
    machines: Annotated[dict[str, MachineEntry], Field(min_length=1)]
    outputs: dict[str, str] = {}

    @classmethod
    def read(cls, content: object) -> Self:
        """Return a stack of parsed YAML or TOML; raises `InvalidSpec` with the place and cause."""
        if not isinstance(content, dict):
            raise InvalidSpec(
                "A stack file has a name and machines.",
                hint="See docs/how-to/describe-a-stack.md.",
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise _told(error) from error


class StackMachine(Frozen):
    """One machine that a stack is to have. ``name`` is within the stack, as is that of its
    ``network``; ``playbooks`` and ``user_data`` are files, ``variables`` still have their
    placeholders."""

    name: str
    need: Need
    image: str = ""
    provider: str = ""
    region: str = ""
    network: str = ""
    spot: bool = False
    user_data: str = ""
    playbooks: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    volumes: tuple[VolumeMount, ...] = ()
    after: tuple[str, ...] = ()

    def order(
        self, stack: str, files: Mapping[str, str], facts: Mapping[str, Mapping[str, str]]
    ) -> MachineOrder:
        """Return what is asked of it: ``files`` has the text of user-data and the absolute path of
        playbooks by the name in the file, ``facts`` what is known of the machines before it."""
        values = {key: filled(text, self.name, facts) for key, text in self.variables.items()}
        return MachineOrder(
            name=full_name(stack, self.name),
            stack=stack,
            image=self.image,
            user_data=files[self.user_data] if self.user_data else "",
            playbooks=tuple(Playbook(path=files[p], variables=values) for p in self.playbooks),
            volumes=self.volumes,
            spot=self.spot,
            network=full_name(stack, self.network) if self.network else "",
        )


class Stack(Frozen):
    """What a file comes to. ``machines`` are in an order in which they can be made; ``networks``
    are by their names within the stack."""

    name: str
    machines: tuple[StackMachine, ...]
    volumes: dict[str, int] = {}
    networks: dict[str, NetworkEntry] = {}
    outputs: dict[str, str] = {}

    @classmethod
    def of(cls, file: StackFile) -> Self:
        """Work out a file: templates, ranges, volumes and the order.

        Raises `InvalidSpec` for what contradicts itself: unknown templates, volumes or machines,
        names that are no names or occur twice, circles of dependencies.
        """
        entries = {
            name: _whole(file, pattern, entry)
            for pattern, entry in file.machines.items()
            for name in _fresh(expand(pattern), file, pattern)
        }
        if len(entries) > _MOST_MACHINES:
            raise InvalidSpec(f"A stack has {_MOST_MACHINES} machines at most.")
        machines = {name: _machine(file, name, entry, entries) for name, entry in entries.items()}
        found = cls(
            name=file.name,
            machines=tuple(machines[name] for name in _ordered(machines)),
            volumes={name: volume.size for name, volume in file.volumes.items()},
            networks=_networks(file, machines.values()),
            outputs=file.outputs,
        )
        found._check_placeholders()
        return found

    def _check_placeholders(self) -> None:
        named = {machine.name: dict.fromkeys(FACTS, "") for machine in self.machines}
        for machine in self.machines:
            before = {name: named[name] for name in machine.after}
            for key, text in machine.variables.items():
                _checked(f"variables.{key} of {machine.name}", text, machine.name, before)
        for key, text in self.outputs.items():
            _checked(f"outputs.{key}", text, "", named)


def expand(pattern: str) -> list[str]:
    """Return the names of a pattern: ``node[01-03]`` is node01, node02 and node03.

    Several ranges in one pattern are combined. Raises `InvalidSpec` for a range that is none.
    """
    if prod(int(high) - int(low) + 1 for low, high in _RANGE.findall(pattern)) > _MOST_MACHINES:
        raise InvalidSpec(f"machines.{pattern}: {_MOST_MACHINES} machines are the most.")
    match = _RANGE.search(pattern)
    if match is None:
        if not _NAME.fullmatch(pattern):
            raise InvalidSpec(
                f"machines.{pattern}: that is no name.",
                hint="Small letters, digits and '-'; a range is written node[01-04].",
            )
        return [pattern]
    low, high = match.groups()
    first, last, width = int(low), int(high), len(low)
    if last < first or len(high) < width:
        raise InvalidSpec(f"machines.{pattern}: the range goes from {low} to {high}.")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [
        name
        for number in range(first, last + 1)
        for name in expand(f"{before}{number:0{width}}{after}")
    ]


def full_name(stack: str, machine: str) -> str:
    """Return what a stack's machine is called at its site; raises `InvalidSpec` if too long."""
    name = f"{stack}-{machine}"
    if len(name) > _LONGEST_NAME:
        raise InvalidSpec(f"{name} has over {_LONGEST_NAME} characters.", hint="Shorten a name.")
    return name


def filled(text: str, own: str, facts: Mapping[str, Mapping[str, str]]) -> str:
    """Return a text with its placeholders filled; raises `InvalidSpec` for one that means nothing.

    ``{{`` and ``}}`` stand for braces.
    """

    def put(match: re.Match[str]) -> str:
        word = match.group(1)
        if word == "name" and own:
            return own
        machine, _, fact = word.partition(".")
        if fact in facts.get(machine, {}):
            return facts[machine][fact]
        raise InvalidSpec(f"{{{word}}} means nothing here.", hint=_hint(own, facts))

    parts = re.split(r"(\{\{|\}\})", text)
    braces = {"{{": "{", "}}": "}"}
    return "".join(braces.get(part) or _PLACEHOLDER.sub(put, part) for part in parts)


def _hint(own: str, facts: Mapping[str, Mapping[str, str]]) -> str:
    known = ", ".join(sorted(facts)) or "none"
    itself = "{name}, or " if own else ""
    return f"Write {itself}{{MACHINE.FACT}}: machines {known}; facts {', '.join(FACTS)}."


def _checked(where: str, text: str, own: str, facts: Mapping[str, Mapping[str, str]]) -> None:
    try:
        filled(text, own, facts)
    except InvalidSpec as error:
        raise InvalidSpec(f"{where}: {error.message}", hint=error.hint) from error


def _fresh(names: Iterable[str], file: StackFile, pattern: str) -> Iterable[str]:
    for name in names:
        twice = [each for each in file.machines if each != pattern and name in expand(each)]
        if twice:
            raise InvalidSpec(f"machines: {name} is in {pattern} and in {twice[0]}.")
        full_name(file.name, name)
        yield name


def _whole(file: StackFile, pattern: str, entry: MachineEntry) -> MachineEntry:
    base = file.defaults
    if base.template or any(template.template for template in file.templates.values()):
        raise InvalidSpec("A template is made of no other template.")
    if entry.template:
        if entry.template not in file.templates:
            known = ", ".join(sorted(file.templates)) or "none"
            raise InvalidSpec(
                f"machines.{pattern}.template: there is no {entry.template!r}.",
                hint=f"Templates: {known}.",
            )
        base = file.templates[entry.template].over(base)
    return entry.over(base)


def _machine(
    file: StackFile, name: str, entry: MachineEntry, all_: Mapping[str, MachineEntry]
) -> StackMachine:
    after = sorted({each for pattern in entry.after or () for each in expand(pattern)})
    if unknown := [each for each in after if each not in all_]:
        raise InvalidSpec(f"machines.{name}.after: there is no machine {unknown[0]!r}.")
    if entry.variables and not entry.playbooks:
        raise InvalidSpec(f"machines.{name}.variables are for playbooks, and there are none.")
    need: dict[str, Any] = {"cpus": entry.cpus, "memory_bytes": entry.memory, "gpus": entry.gpus}
    need["time"] = entry.time or timedelta(hours=1)
    return StackMachine(
        name=name,
        need=Need(**{key: value for key, value in need.items() if value is not None}),
        image=entry.image or "",
        provider=entry.provider or "",
        network=entry.network or "",
        spot=bool(entry.spot),
        user_data=entry.user_data or "",
        playbooks=entry.playbooks or (),
        variables=entry.variables or {},
        volumes=tuple(_mount(file, name, text) for text in entry.volumes or ()),
        after=tuple(after),
    )


def _networks(file: StackFile, machines: Iterable[StackMachine]) -> dict[str, NetworkEntry]:
    """Return the networks, each with the provider that its machines name if it names none."""
    found = dict(file.networks)
    for machine in machines:
        if not machine.network:
            continue
        if machine.network not in found:
            known = ", ".join(sorted(found)) or "none"
            raise InvalidSpec(
                f"machines.{machine.name}.network: there is no {machine.network!r}.",
                hint=f"Networks: {known}.",
            )
        network = found[machine.network]
        if machine.provider and network.provider and machine.provider != network.provider:
            raise InvalidSpec(
                f"machines.{machine.name}: the network {machine.network} is at "
                f"{network.provider}, and the machine at {machine.provider}.",
                hint="A network is at one provider: name another one for either.",
            )
        at = {"provider": network.provider or machine.provider}
        found[machine.network] = network.model_copy(update=at)
    for name in found:
        full_name(file.name, name)
    return found


def _mount(file: StackFile, machine: str, text: str) -> VolumeMount:
    name, _, path = text.partition(":")
    if name not in file.volumes:
        known = ", ".join(sorted(file.volumes)) or "none"
        raise InvalidSpec(
            f"machines.{machine}.volumes: {text!r} names no volume of the stack.",
            hint=f"Write NAME:/MOUNT. Volumes: {known}.",
        )
    try:
        return VolumeMount(
            name=full_name(file.name, name), size_bytes=file.volumes[name].size, path=path
        )
    except ValidationError as error:
        raise InvalidSpec(
            f"machines.{machine}.volumes: {path!r} is no place to mount {name} at.",
            hint="Write NAME:/MOUNT.",
        ) from error


def _ordered(machines: Mapping[str, StackMachine]) -> list[str]:
    """Return the names so that each comes after those it waits for; else as they were written."""
    done: dict[str, None] = {}
    left = list(machines)
    while left:
        ready = [name for name in left if all(each in done for each in machines[name].after)]
        if not ready:
            raise InvalidSpec(f"after: {', '.join(left)} wait for one another.")
        done |= dict.fromkeys(ready)
        left = [name for name in left if name not in done]
    return list(done)


def _told(error: ValidationError) -> InvalidSpec:
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    match first["type"]:
        case "extra_forbidden":
            what = "there is no such setting"
        case "missing":
            what = "is missing"
        case _:
            what = f"{str(first['msg']).removeprefix('Value error, ').rstrip('.')}"
    return InvalidSpec(f"{place}: {what}.", hint="See docs/how-to/describe-a-stack.md.")
