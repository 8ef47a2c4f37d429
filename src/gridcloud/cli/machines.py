"""Machines without a job: make them, look at them, log in, lengthen and stop them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import DURATION, MEMORY, STRATEGIES, as_json, make_need, print_json
from gridcloud.cli.ordering import make_order, order_options

if TYPE_CHECKING:
    from gridcloud.model.fleet import LaunchNews, MachineInfo


@click.group()
def machine() -> None:
    """Machines at your clouds, without a job: to log in to, for as long as you say."""


@machine.command()
@click.option("--cpus", default=1, show_default=True, help="CPUs it needs.")
@click.option("--memory", type=MEMORY, help="Memory it needs, as 4G.  [default: 1G]")
@click.option("--gpus", default=0, show_default=True, help="GPUs it needs.")
@click.option(
    "--time",
    "time_",
    type=DURATION,
    default="1h",
    show_default=True,
    help="How long it lasts from now on; it is deleted then.",
)
@order_options
@click.option("--provider", default="", metavar="NAME", help="Only at this provider.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    help="Which offer is best.  [default: as the site's settings have it]",
)
@click.option("--name", default="", help="What to call it.  [default: made up]")
@click.option(
    "--count",
    type=click.IntRange(1, 500),
    default=1,
    show_default=True,
    help="So many of them, called NAME-1, NAME-2, ...",
)
@click.option("--all-or-nothing", is_flag=True, help="If one cannot be had, keep none.")
@click.option("--detach", is_flag=True, help="Print the names and return at once.")
@click.option("--yes", is_flag=True, help="Do not ask whether the plan is right.")
@as_json
def start(
    cpus: int,
    memory: int | None,
    gpus: int,
    time_: timedelta,
    image: str,
    user_data: str | None,
    playbooks: tuple[str, ...],
    variables: tuple[str, ...],
    volumes: tuple[str, ...],
    provider: str,
    strategy: str | None,
    name: str,
    count: int,
    *,
    spot: bool,
    all_or_nothing: bool,
    detach: bool,
    yes: bool,
    json_: bool,
) -> int:
    """Make a machine: the plan is shown first, then each step until it is ready.

    The smallest that fits is chosen over all providers and regions, and the next one where it
    cannot be had. Ctrl-C while waiting leaves the launch going on.
    """
    from gridcloud.cli.launching import agreed, follow
    from gridcloud.client import Client
    from gridcloud.model.choice import Strategy
    from gridcloud.model.fleet import MachineRequest

    request = MachineRequest(
        need=make_need(cpus, memory, gpus, time_),
        order=make_order(name, image, user_data, playbooks, variables, volumes, spot=spot),
        count=count,
        all_or_nothing=all_or_nothing,
        provider=provider,
        strategy=Strategy(strategy) if strategy else None,
    )
    with Client() as client:
        if not agreed(client.plan_machine(request), ask=not (yes or json_), quiet=json_):
            return 1
        begun = client.start_machine(request)
        names = [info.name for info in begun]
        if detach:
            print_json(begun) if json_ else click.echo("\n".join(names))
            return 0
        return follow(client, names, json_=json_)


@machine.command("list")
@click.option("--all", "all_", is_flag=True, help="Those that are over, too.")
@as_json
def list_(*, all_: bool, json_: bool) -> None:
    """List the machines there are, and what each cost so far."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.machines(ended=all_)
    if json_:
        return print_json(found)
    if not found:
        return click.echo("no machines; 'gridcloud machine start' makes one")
    rows = [
        (
            info.name,
            _state(info),
            render.plain(info.shape),
            render.plain(info.provider),
            render.plain(info.region),
            _address(info),
            _until(info),
            _money(info.spent, info.currency),
        )
        for info in found
    ]
    columns = ("name", "state", "shape", "provider", "region", "address", "until", "cost")
    empty = {"region": "", "address": "", "cost": ""}
    return render.table(*render.without(empty, columns, rows), right=("cost",))


@machine.command()
@click.option("--log", is_flag=True, help="The end of what it wrote to its console, too.")
@as_json
@click.argument("name")
def show(name: str, *, log: bool, json_: bool) -> None:
    """Show all of the machine NAME: where it is, what it was made of, and how that went."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        info, events = client.machine(name), client.machine_events(name)
        text = client.boot_log(name) if log else ""
    if json_:
        return print_json({"machine": info, "events": events} | ({"log": text} if log else {}))
    rows = [(what, render.plain(value)) for what, value in _facts(info) if value]
    render.table(("", ""), rows)
    for event in events:
        _tell(event)
    if log:
        click.echo(f"--- boot log ---\n{render.safe_lines(text) or '(there is none)'}")
    return None


@machine.command()
@click.option("--wait/--no-wait", default=True, help="Return once it is gone.  [default: wait]")
@as_json
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def stop(names: tuple[str, ...], *, wait: bool, json_: bool) -> int:
    """Stop machines and delete them, with all that is on them; volumes are kept."""
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.fleet import MachineState

    with Client() as client:
        found = [client.stop_machine(name) for name in names]
        if wait:
            found = [client.wait_machine(info.name, timedelta(minutes=15)) for info in found]
    if json_:
        print_json(found)
    left = [info for info in found if wait and info.state is MachineState.ENDING]
    for info in () if json_ else found:
        click.echo(f"{info.name} {info.state}")
    for info in left:
        why = render.safe(info.reason)
        click.echo(f"gridcloud: {info.name} is not gone yet ({why}); the site goes on", err=True)
    return 75 if left else 0


@machine.command()
@as_json
@click.argument("name")
@click.argument("by", type=DURATION)
def extend(name: str, by: timedelta, *, json_: bool) -> None:
    """Let the machine NAME last so much longer, as 2h."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        info = client.extend_machine(name, by)
    if json_:
        return print_json(info)
    return click.echo(f"{info.name} ends {render.clock(info.ends_at) if info.ends_at else 'never'}")


@machine.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-L",
    "forwards",
    multiple=True,
    metavar="PORT:HOST:PORT",
    help="Forward a port of this host to one there, as 8888:localhost:8888. Repeatable.",
)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(name: str, forwards: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Log in to the machine NAME by SSH, or run COMMAND there.

    The system's ssh is given a key and a certificate made for this once, and the machine's own
    host key; nothing of them stays. Its exit status becomes this command's.
    """
    from gridcloud.cli.login import log_in

    # What follows NAME comes as it is, the "--" before the command too.
    return log_in(name, forwards, command[1:] if command[:1] == ("--",) else command)


def _facts(info: MachineInfo) -> list[tuple[str, str]]:
    """Return what there is to be told of a machine."""
    import hashlib

    from gridcloud.cli import render

    order = info.order
    what = order.user_data.partition("\n")[0][:60] if order.user_data else ""
    digest = hashlib.sha256(order.user_data.encode()).hexdigest()[:16]
    volumes = [f"{volume.name} at {volume.path}" for volume in order.volumes]
    playbooks = [
        " ".join([book.path, *map("=".join, book.variables.items())]) for book in order.playbooks
    ]
    rate = f"{_money(info.cost, info.currency)} an hour" if info.cost is not None else "not known"
    spent = f", {_money(info.spent, info.currency)} so far" if info.spent is not None else ""
    return [
        ("name", info.name),
        ("state", f"{info.state} ({info.reason})" if info.reason else str(info.state)),
        ("need", str(info.need)),
        ("made as", ", ".join(filter(None, (info.shape, info.provider, info.region)))),
        ("address", _address(info)),
        ("lease", info.lease_id),
        ("id there", info.id),
        ("since", render.clock(info.created_at)),
        ("until", _until(info)),
        ("price", rate + spent if info.provider else ""),
        ("image", order.image or "the provider's own"),
        (
            "user-data",
            f"{what} ({len(order.user_data)} characters, sha256 {digest})" if what else "",
        ),
        ("playbooks", "; ".join(playbooks)),
        ("volumes", ", ".join(volumes)),
        ("spot", "yes" if order.spot else ""),
    ]


def _tell(event: LaunchNews) -> None:
    from gridcloud.cli.launching import line

    click.echo(line(event))


def _state(info: MachineInfo) -> str:
    from gridcloud.cli import render

    colours = {"ready": "green", "launching": "cyan", "failed": "red", "ending": "yellow"}
    colour = colours.get(info.state.value)
    word = f"[{colour}]{info.state}[/]" if colour else str(info.state)
    return f"{word} {render.plain(info.reason)[:80]}" if info.state.value == "failed" else word


def _address(info: MachineInfo) -> str:
    if info.endpoint is None:
        return ""
    port = f":{info.endpoint.port}" if info.endpoint.port != 22 else ""
    return f"{info.endpoint.user}@{info.endpoint.host}{port}"


def _until(info: MachineInfo) -> str:
    from gridcloud.cli import render

    end = info.ended_at or info.ends_at
    return render.clock(end) if end else ""


def _money(amount: float | None, currency: str) -> str:
    return "" if amount is None else f"{amount:.4g} {currency}".rstrip()
