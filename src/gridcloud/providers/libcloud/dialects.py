"""What Libcloud's drivers do differently, as data: how each is told what a machine is made of.

Only drivers that hand user-data to a new machine can be used, for without it the machine would
trust nobody and never end. A further one is a further line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gridcloud.errors import InvalidSpec


@dataclass(frozen=True)
class Dialect:
    """One driver. A path with a dot is a key of a dictionary that is an argument.

    ``provider`` is what Libcloud calls it, ``user_data`` and ``ssh_keys`` the arguments of
    ``create_node`` for these, ``cpus`` and ``locations`` what a size's ``extra`` calls them. Where
    ``hourly`` is not set, its prices are not of hours. ``zoned`` is set where a machine is made in
    a location. ``more`` are arguments that are always given.
    """

    provider: str
    user_data: str
    cpus: str
    user_data_limit: int
    ssh_keys: str = ""
    needs_ssh_key: bool = False
    locations: str = ""
    zoned: bool = True
    hourly: bool = False
    more: tuple[tuple[str, object], ...] = ()


DIALECTS = {
    "digitalocean": Dialect(
        provider="digitalocean",
        user_data="ex_user_data",
        cpus="vcpus",
        user_data_limit=64 * 1024,
        ssh_keys="ex_create_attr.ssh_keys",
        locations="regions",
        hourly=True,
        more=(("ex_create_attr.tags", ("gridcloud",)),),
    ),
    "vultr": Dialect(
        provider="vultr",
        user_data="ex_userdata",
        cpus="vcpu_count",
        user_data_limit=16 * 1024,
        ssh_keys="ex_ssh_key_ids",
        locations="locations",
    ),
    "cloudscale": Dialect(
        provider="cloudscale",
        user_data="ex_create_attr.user_data",
        cpus="vcpu_count",
        user_data_limit=32 * 1024,
        ssh_keys="ex_create_attr.ssh_keys",
        needs_ssh_key=True,
        zoned=False,
    ),
    "cloudstack": Dialect(
        provider="cloudstack",
        user_data="ex_userdata",
        cpus="cpu",
        user_data_limit=2 * 1024 // 4 * 3,
        more=(("ex_start_vm", True),),
    ),
}


def dialect(driver: str) -> Dialect:
    """Return how a driver is spoken to; raises `InvalidSpec` for one that cannot be used."""
    if driver in DIALECTS:
        return DIALECTS[driver]
    known = ", ".join(DIALECTS)
    if driver == "ec2":
        hint = 'EC2 has a kind of its own: kind = "ec2".'
    elif driver == "openstack":
        hint = 'OpenStack has a kind of its own: kind = "openstack".'
    else:
        hint = f"The drivers known to hand user-data to new machines are: {known}."
    raise InvalidSpec(f"Libcloud's driver {driver!r} cannot be used.", hint=hint)


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments whose paths have dots as dictionaries."""
    told: dict[str, Any] = {}
    for path, value in values.items():
        name, _, key = path.partition(".")
        if key:
            told.setdefault(name, {})[key] = value
        else:
            told[name] = value
    return told
