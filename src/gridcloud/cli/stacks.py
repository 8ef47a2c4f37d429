"""Several machines, volumes and networks described in one file: what it comes to, up, down."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import as_json, print_json
from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.client import Client
    from gridcloud.model.accounts import NetworkReport
    from gridcloud.model.fleet import MachineInfo
    from gridcloud.model.stack import Stack, StackMachine
    from gridcloud.model.stack_plan import Change

_GONE_WITHIN = timedelta(minutes=15)
_FILE = click.argument("path", metavar="FILE", type=click.Path(dir_okay=False))


@click.group()
def stack() -> None:
    """Machines, volumes and networks described in one file (YAML or TOML)."""


@stack.command()
@as_json
@_FILE
def plan(path: str, *, json_: bool) -> None:
    """Show what 'up' would do, and what it would cost; change nothing."""
    from gridcloud.cli.stack_files import read_stack
    from gridcloud.client import Client
    from gridcloud.model.stack_plan import changes, lacking_networks

    wanted, files = read_stack(path)
    with Client() as client:
        wanted, networks = _placed(client, wanted)
        todo = changes(wanted, files, _there(client))
        if json_:
            lacking = lacking_networks(wanted, networks)
            return print_json({"stack": wanted.name, "networks": lacking, "changes": todo})
        return _show(client, wanted, networks, todo)


@stack.command()
@click.option("--yes", is_flag=True, help="Do not ask whether the plan is right.")
@as_json
@_FILE
def up(path: str, *, yes: bool, json_: bool) -> int:
    """Make the machines what FILE says: make what lacks, replace what differs, remove the rest.

    What is as it should be is left alone, so that this can be repeated at any time, also after it
    was interrupted. Networks are made before the machines, volumes with the first machine that
    mounts them, and kept.
    """
    from gridcloud.cli.stack_files import read_stack
    from gridcloud.client import Client
    from gridcloud.model.stack_plan import changes, facts_of, outputs

    wanted, files = read_stack(path)
    with Client() as client:
        wanted, networks = _placed(client, wanted)
        todo = changes(wanted, files, _there(client))
        if not json_:
            _show(client, wanted, networks, todo)
        if not _agreed(todo, yes=yes, quiet=json_):
            return 1
        wanted = _make_networks(client, wanted, networks, quiet=json_)
        status = _bring_up(client, wanted, files, todo, json_=json_)
        there = _there(client)
    told = outputs(wanted, facts_of(wanted, there))
    if json_:
        mine = [info for info in there if info.order.stack == wanted.name]
        print_json({"stack": wanted.name, "machines": mine, "outputs": told})
    for name, text in () if json_ else told.items():
        click.echo(f"{name}: {text}")
    if status:
        click.echo(f"gridcloud: not all is up; 'gridcloud stack up {path}' goes on", err=True)
    return status


@stack.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
@_FILE
def down(path: str, *, yes: bool, json_: bool) -> int:
    """Delete the machines of the stack in FILE, with all that is on them, then its networks;
    volumes are kept."""
    from gridcloud.cli.stack_files import read_stack
    from gridcloud.client import Client
    from gridcloud.model.stack_plan import Change, Step, downwards, networks_of

    wanted, _ = read_stack(path)
    with Client() as client:
        there = downwards(wanted, _there(client))
        todo = [Change(machine=info.name, step=Step.REMOVE) for info in there]
        networks = networks_of(wanted, client.networks()) if wanted.networks else []
        todo += [Change(machine=network.name, step=Step.REMOVE) for network in networks]
        for change in () if json_ else todo:
            click.echo(f"remove {change.machine}", err=True)
        if not _agreed(todo, yes=yes, quiet=json_):
            return 1
        left = _stop(client, [info.name for info in there])
        for network in () if left else networks:
            client.remove_network(network.name, network.provider)
    if json_:
        print_json({"stack": wanted.name, "removed": len(there) - len(left), "left": left})
    elif not left:
        click.echo(f"{wanted.name} is down" if todo else f"{wanted.name} was not up")
    return 75 if left else 0


@stack.command()
@as_json
@_FILE
def show(path: str, *, json_: bool) -> None:
    """Show the machines of the stack in FILE, and its outputs."""
    from gridcloud.cli import render
    from gridcloud.cli.stack_files import read_stack
    from gridcloud.client import Client
    from gridcloud.model.stack_plan import facts_of, outputs

    wanted, _ = read_stack(path)
    with Client() as client:
        there = [info for info in client.machines() if info.order.stack == wanted.name]
    told = outputs(wanted, facts_of(wanted, there))
    if json_:
        return print_json({"stack": wanted.name, "machines": there, "outputs": told})
    if not there:
        return click.echo(f"{wanted.name} is not up")
    rows = [
        (
            info.name,
            str(info.state),
            render.plain(info.shape),
            render.plain(info.provider),
            render.plain(info.endpoint.host if info.endpoint else ""),
            render.clock(info.ends_at) if info.ends_at else "",
        )
        for info in there
    ]
    render.table(("name", "state", "shape", "provider", "address", "until"), rows)
    for name, text in told.items():
        click.echo(f"{name}: {text}")
    return None


def _there(client: Client) -> list[MachineInfo]:
    """Return the machines of stacks in full: a list of them leaves their user-data out."""
    return [client.machine(info.name) for info in client.machines() if info.order.stack]


def _placed(client: Client, wanted: Stack) -> tuple[Stack, NetworkReport]:
    """Return a stack whose networks and machines are where they can be, and the networks there are;
    raises `InvalidSpec` where a network cannot be had."""
    from gridcloud.model.accounts import NetworkReport
    from gridcloud.model.stack_plan import placed

    if not wanted.networks:
        return wanted, NetworkReport(networks=())
    there = client.networks()
    return placed(wanted, there), there


def _make_networks(client: Client, wanted: Stack, there: NetworkReport, *, quiet: bool) -> Stack:
    """Make the networks that lack; return the stack with its machines where these are by now."""
    from gridcloud.model.stack import full_name
    from gridcloud.model.stack_plan import lacking_networks

    lacking = lacking_networks(wanted, there)
    for name, network in lacking.items():
        called = full_name(wanted.name, name)
        client.make_network(called, network.cidr, network.provider, network.region)
        if not quiet:
            click.echo(f"made the network {called} at {network.provider}", err=True)
    return _placed(client, wanted)[0] if lacking else wanted


def _show(client: Client, wanted: Stack, networks: NetworkReport, todo: list[Change]) -> None:
    from gridcloud.cli import render
    from gridcloud.model.stack_plan import Step, lacking_networks

    lacking = lacking_networks(wanted, networks)
    for name, network in lacking.items():
        where = f"{network.provider} {network.region}".rstrip()
        what = f"{Step.MAKE:8} network {name} as {network.cidr} at {where}"
        click.echo(render.safe(what), err=True)
    machines = {machine.name: machine for machine in wanted.machines}
    prices: dict[str, str] = {}
    for change in todo:
        where = ""
        if change.step in (Step.MAKE, Step.REPLACE):
            machine = machines[change.machine]
            alike = f"{machine.need}/{machine.provider}/{machine.region}/{machine.spot}"
            if alike not in prices:
                prices[alike] = _where(client, machine)
            where = f" as {prices[alike]}"
        why = f" ({change.why})" if change.why else ""
        click.echo(render.safe(f"{change.step:8} {change.machine}{where}{why}"), err=True)
    if not lacking and all(change.step is Step.KEEP for change in todo):
        click.echo(f"all is as {wanted.name} says: nothing to do", err=True)


def _where(client: Client, machine: StackMachine) -> str:
    """Return which shape would be made for a machine now, and at what price."""
    from gridcloud.cli.launching import told
    from gridcloud.model.fleet import MachineRequest
    from gridcloud.model.machine import MachineOrder

    order = MachineOrder(image=machine.image, spot=machine.spot)
    request = MachineRequest(
        need=machine.need, order=order, provider=machine.provider, region=machine.region
    )
    winners = client.plan_machine(request).plan.winners
    return told(winners[0], machine.need) if winners else "nothing that can be had now"


def _agreed(todo: list[Change], *, yes: bool, quiet: bool) -> bool:
    """Ask at a terminal; elsewhere go on, unless something would be lost."""
    from gridcloud.model.stack_plan import Step

    if yes or all(change.step is Step.KEEP for change in todo):
        return True
    if not quiet and sys.stdin.isatty() and sys.stderr.isatty():
        return click.confirm("Do this?", default=True, err=True)
    lost = [each.machine for each in todo if each.step in (Step.REMOVE, Step.REPLACE)]
    if lost:
        raise InvalidSpec(
            f"{', '.join(lost)} would be removed, and nobody is here to be asked.",
            hint="Look at the plan, and say --yes.",
        )
    return True


def _bring_up(
    client: Client, wanted: Stack, files: dict[str, str], todo: list[Change], *, json_: bool
) -> int:
    """Do what is to be done; return the exit status of the first round that fails."""
    from gridcloud.cli.launching import follow
    from gridcloud.model.fleet import MachineState
    from gridcloud.model.stack import full_name
    from gridcloud.model.stack_plan import Step, facts_of, request, rounds

    gone = [each.machine for each in todo if each.step in (Step.REMOVE, Step.REPLACE)]
    if _stop(client, [full_name(wanted.name, name) for name in gone]):
        return 75
    # What an interrupted 'up' began is waited for, since others may need it.
    begun = [info.name for info in _there(client) if info.order.stack == wanted.name]
    waiting = [name for name in begun if client.machine(name).state is MachineState.LAUNCHING]
    if waiting and (status := follow(client, waiting, json_=False, quiet=json_)):
        return status
    for machines in rounds(wanted, todo):
        facts = facts_of(wanted, _there(client))
        names = []
        for machine in machines:
            names += [
                info.name for info in client.start_machine(request(wanted, machine, files, facts))
            ]
        if status := follow(client, names, json_=False, quiet=json_):
            return status
    return 0


def _stop(client: Client, names: list[str]) -> list[str]:
    """Stop machines; return those that are not gone yet, which is told."""
    from gridcloud.model.fleet import MachineState

    for name in names:
        client.stop_machine(name)
    left = [
        name
        for name in names
        if client.wait_machine(name, _GONE_WITHIN).state is MachineState.ENDING
    ]
    for name in left:
        click.echo(f"gridcloud: {name} is not gone yet; the site goes on", err=True)
    return left
