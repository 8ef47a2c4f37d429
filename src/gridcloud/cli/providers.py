"""The machines a site may use."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gridcloud.cli.options import MEMORY, as_json, print_json
from gridcloud.cli.provider_adding import AnyKind
from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.client import Client
    from gridcloud.model.api import ProviderInfo
    from gridcloud.model.fleet import MachineInfo, MachineRequest

#: What a machine for a check has at least, since less boots no usual image; and how long it lasts
#: at most, should this site vanish meanwhile.
_SMALLEST_BYTES, _CHECK_LASTS = 512 * 1024**2, timedelta(minutes=45)


@click.group()
def provider() -> None:
    """The machines this site may use."""


@provider.group(cls=AnyKind)
def add() -> None:
    """Add a source of machines; it is tried before it is kept in the settings file."""


@add.command()
@click.option("--host", required=True, help="Its name or address.")
@click.option("--user", required=True, help="The account to log in to.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=22,
    show_default=True,
    help="Where its sshd listens.",
)
@click.option("--identity", metavar="FILE", help="The private key.  [default: agent, ~/.ssh]")
@click.option(
    "--host-key",
    metavar="KEY",
    help="Its public key line or SHA256:… fingerprint; without it you are asked.",
)
@click.option("--cpus", type=click.IntRange(min=1), help="Use so many CPUs at most.")
@click.option("--memory", type=MEMORY, help="Use so much memory at most, as 8G.")
@click.option("--gpus", type=click.IntRange(min=0), help="Use so many GPUs at most.")
@click.option("--name", help="What to call it.  [default: from the host]")
@as_json
def ssh(
    host: str,
    user: str,
    port: int,
    identity: str | None,
    host_key: str | None,
    name: str | None,
    *,
    json_: bool,
    **limits: int | None,
) -> None:
    """Add a plain machine that has sshd and Python 3.8 or newer; nothing else is needed there."""
    import re

    from gridcloud.client import Client

    section: dict[str, Any] = {"kind": "ssh", "host": host, "port": port, "user": user}
    if identity:
        section["identity"] = str(Path(identity).expanduser().absolute())
    section |= {limit: value for limit, value in limits.items() if value is not None}
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-")[:31] or "machine"
    with Client() as client:
        section["host_keys"] = _agree_on_key(client, host, port, host_key)
        show_providers([client.add_provider(name, section)], json_=json_)


def _agree_on_key(client: Client, host: str, port: int, expected: str | None) -> list[str]:
    """Return the host key lines to trust: those shown that match, or that a person accepts."""
    shown = client.host_keys(host, port)
    pairs = dict(zip(shown.fingerprints, shown.keys, strict=True))
    if expected is not None:
        bare = " ".join(expected.split()[:2])
        for fingerprint, key in pairs.items():
            if bare in (fingerprint, " ".join(key.split()[:2])):
                return [key]
        raise InvalidSpec(
            f"{host} shows {', '.join(pairs)}, not the key that was expected; not added.",
            hint="Ask the machine's administrator which is right before going on.",
        )
    click.echo(f"{host} shows these keys:", err=True)
    for fingerprint, key in pairs.items():
        click.echo(f"  {key.split()[0]} {fingerprint}", err=True)
    if not sys.stdin.isatty():
        raise InvalidSpec(
            "Nobody is here to compare the keys.", hint="Give the right one with --host-key."
        )
    if not click.confirm("Are they the machine's own (ask its administrator)?", err=True):
        raise InvalidSpec(
            f"The keys of {host} were not accepted; not added.",
            hint="Ask the machine's administrator for its fingerprints.",
        )
    return list(pairs.values())


@provider.command("list")
@as_json
def list_(*, json_: bool) -> None:
    """List the sources of machines."""
    from gridcloud.client import Client

    with Client() as client:
        show_providers(client.providers(), json_=json_)


@provider.command()
@click.option("--quick", is_flag=True, help="Ask its API alone: make no machine.")
@as_json
@click.argument("name")
def check(name: str, *, quick: bool, json_: bool) -> int:
    """Prove that the provider NAME works, or say what is missing.

    A cloud is proved by making its smallest machine, logging in, and deleting it again, which may
    cost a little.
    """
    from gridcloud.cli.launching import checked
    from gridcloud.client import Client

    with Client() as client:
        info = client.check_provider(name)
        if info.problem or quick or not info.makes_machines:
            show_providers([info], json_=json_)
            return 69 if info.problem else 0
        (begun,) = client.start_machine(_smallest(name))
        try:
            found = checked(client, begun.name)
        except KeyboardInterrupt:
            client.stop_machine(begun.name)
            click.echo(f"\nending {begun.name}", err=True)
            return 130
    if json_:
        print_json({"provider": info, "machine": found})
    else:
        _say_proved(name, found)
    return 0 if found.ended_at else 69


def _smallest(name: str) -> MachineRequest:
    """Return what to ask for to prove that a cloud works."""
    from gridcloud.model.fleet import MachineRequest
    from gridcloud.model.identifiers import new_id
    from gridcloud.model.machine import MachineOrder
    from gridcloud.model.need import Need

    need = Need(memory_bytes=_SMALLEST_BYTES, time=_CHECK_LASTS)
    order = MachineOrder(name=f"check-{new_id(5)}")
    return MachineRequest(need=need, order=order, provider=name, check=True)


def _say_proved(name: str, found: MachineInfo) -> None:
    from gridcloud.cli import render

    if found.ended_at:
        return click.echo(f"{name} works: a {found.shape} was made, logged in to, and deleted")
    why = render.safe_lines(found.reason)
    return click.echo(f"gridcloud: {name} does not work: {why}", err=True)


@provider.command()
@as_json
@click.argument("name")
def remove(name: str, *, json_: bool) -> None:
    """Take the provider NAME out of the settings; the machine itself is left alone."""
    from gridcloud.client import Client

    with Client() as client:
        client.remove_provider(name)
    print_json({"removed": name}) if json_ else click.echo(f"removed {name}")


def show_providers(found: list[ProviderInfo], *, json_: bool) -> None:
    """Print providers as a table, or as JSON."""
    from gridcloud.cli import render
    from gridcloud.model.quantities import format_bytes

    if json_:
        return print_json(found)
    rows = [
        (
            info.name,
            info.kind,
            f"{info.free.cpus}/{info.capacity.cpus}",
            f"{format_bytes(info.free.memory_bytes)}/{format_bytes(info.capacity.memory_bytes)}",
            f"{info.free.gpus}/{info.capacity.gpus}",
            f"[red]{render.plain(info.problem)}[/]" if info.problem else render.plain(info.detail),
        )
        for info in found
    ]
    columns = ("name", "kind", "CPUs", "memory", "GPUs", "")
    return render.table(columns, rows, right=("CPUs", "memory", "GPUs"))
