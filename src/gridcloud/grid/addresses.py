"""Addresses to listen on and to be found at: ``IP:PORT``, with IPv6 in brackets."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable

from gridcloud.errors import InvalidSpec

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_listen(listen: str) -> tuple[IPAddress, int]:
    """Return IP and port; raises `InvalidSpec` for anything else, names of hosts included."""
    host, _, port = listen.rpartition(":")
    try:
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError("no such port")
        return ipaddress.ip_address(host.strip("[]")), number
    except ValueError as error:
        raise InvalidSpec(
            f"{listen!r} is not the address of a port.",
            hint="Write IP:PORT, such as 0.0.0.0:4433 or [::]:4433.",
        ) from error


def show(host: IPAddress | str, port: int) -> str:
    """Return ``IP:PORT``, the opposite of `parse_listen`."""
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def shown_by(listen: IPAddress, address: str) -> bool:
    """Say whether an address found by itself is one that a site listening so is found at."""
    host = parse_listen(address)[0]
    if host.is_link_local:
        return False  # means nothing without the interface, which differs from host to host
    return listen.is_unspecified or host.version == listen.version


def own_hosts(listen: IPAddress, known: Iterable[str] = ()) -> list[IPAddress]:
    """Return this host's addresses for who listens at ``listen``; no packet is sent.

    ``known`` are ``IP:PORT`` found otherwise; the addresses that routes leave by are added.
    """
    if not listen.is_unspecified:
        return [listen]
    found = [parse_listen(address)[0] for address in known]
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError, ValueError):
            probe = socket.socket(family, socket.SOCK_DGRAM)
            with probe:
                probe.connect((far, 9))  # sets the route only
                found.append(ipaddress.ip_address(probe.getsockname()[0]))
    if not found:
        found.append(ipaddress.ip_address("127.0.0.1" if listen.version == 4 else "::1"))
    versions = (4,) if listen.version == 4 else (4, 6)
    return [
        host
        for host in dict.fromkeys(found)
        if host.version in versions and not host.is_link_local and not host.is_unspecified
    ]
