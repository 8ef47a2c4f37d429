"""What LXD tells of an instance, read; and what it is told to make one."""

from __future__ import annotations

import ipaddress
from typing import Any

from gridcloud.errors import InvalidSpec
from gridcloud.model.things import Tags
from gridcloud.providers.cloud.clouds import Build, Condition, Server
from gridcloud.providers.lxd.api import segment
from gridcloud.providers.lxd.section import LXDSection

_PREFIX = "gridcloud-"
_NEVER_USED = "1970"
#: Errors and ways between being there and being off come and go; all but these are seen as that.
_CONDITIONS = {
    "Running": Condition.RUNNING,
    "Stopped": Condition.STOPPED,
    "Error": Condition.FAILED,
}


def name_of(lease_id: str) -> str:
    """Return what the instance of a lease is called. There is one name for one lease, so LXD itself
    sees to it that there is one instance."""
    return f"{_PREFIX}{lease_id}"


def lease_of(name: str) -> str:
    """Return whose an instance is by its name; empty if it is not named so."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else ""


def path_of(name: str) -> str:
    """Return where the API has an instance."""
    return f"/instances/{segment(name)}"


def user_keys(tags: Tags) -> dict[str, str]:
    """Return tags as LXD keeps them."""
    return {f"user.{key}": value for key, value in tags.written().items()}


def tags_of(told: dict[str, Any]) -> Tags | None:
    """Return the tags of an instance; None if no gridcloud site made it."""
    config = told.get("config") or {}
    return Tags.read({key.removeprefix("user."): value for key, value in config.items()})


def request(build: Build, section: LXDSection, source: dict[str, str]) -> dict[str, Any]:
    """Return what LXD is to make."""
    shape = section.shapes.get(build.shape.name)
    devices: dict[str, dict[str, str]] = dict(shape.devices) if shape else {}
    if build.shape.disk_bytes:
        size = str(build.shape.disk_bytes)
        devices["root"] = {"type": "disk", "path": "/", "pool": section.pool, "size": size}
    # What the profiles give is left as it is.
    if section.network or build.named_network:
        devices["eth0"] = {"type": "nic", "name": "eth0", "network": build.network}
    return {
        "name": name_of(build.tags.lease),
        "description": build.name,
        "type": section.type.value,
        "architecture": build.image.architecture,
        "profiles": list(section.profiles),
        # One that powers itself off is removed by LXD, so that its end needs nobody.
        "ephemeral": True,
        "source": source,
        "devices": devices,
        "config": {
            **section.config,
            "limits.cpu": str(build.resources.cpus),
            "limits.memory": str(build.resources.memory_bytes),
            "user.user-data": _text(build.user_data),
            **user_keys(build.tags),
        },
    }


def started_before(told: dict[str, Any]) -> bool:
    """Tell whether an instance was ever started."""
    return told.get("status") != "Stopped" or not str(
        told.get("last_used_at", _NEVER_USED)
    ).startswith((_NEVER_USED, "0001"))


def server_of(told: dict[str, Any]) -> Server:
    """Return how an instance is, from all that LXD tells of it, its state too."""
    condition = _CONDITIONS.get(str(told.get("status")), Condition.BUILDING)
    state = told.get("state") or {}
    return Server(
        id=told["name"],
        condition=condition,
        address=_address(state) if condition is Condition.RUNNING else "",
        reason="LXD shows it with an error" if condition is Condition.FAILED else "",
    )


def _address(state: dict[str, Any]) -> str:
    """Return the first address that may be reached from outside, IPv4 before IPv6."""
    found = []
    for name, card in sorted((state.get("network") or {}).items()):
        for entry in card.get("addresses") or []:
            address = ipaddress.ip_address(entry["address"].partition("%")[0])
            if name != "lo" and not address.is_loopback and not address.is_link_local:
                # A machine's own bridges, as of a container engine on it, are no way in.
                own = card.get("type") not in {None, "", "broadcast"} or not card.get("host_name")
                found.append((own, address.version, str(address)))
    return min(found)[2] if found else ""


def _text(user_data: bytes) -> str:
    try:
        return user_data.decode()
    except UnicodeDecodeError as error:
        raise InvalidSpec(
            "LXD takes user-data as text only, and this is not.",
            hint="Give it as a multipart document, where what is packed is in base64.",
        ) from error
