"""Ports that stay the same over restarts, so that what peers know of a site stays true."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from gridcloud.errors import InvalidSpec


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` (IPv6 in brackets); raises `InvalidSpec`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidSpec(f"{text!r} is not an address.", hint="Write HOST:PORT.")
    return host.strip("[]"), int(port)


class Ports:
    """Remembers in ``file`` which port each purpose had."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def choose(self, purpose: str, host: str, port: int, kind: socket.SocketKind) -> int:
        """Return the port to use: the one told, else the one used before, else a free one.

        A port of before that is taken meanwhile is given up. Blocks for an instant.
        """
        if port:
            return port
        known = self._read()
        for candidate in (known.get(purpose, 0), 0):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    # Connections of a site that was killed linger on its port; a server that
                    # listens there still makes this fail. For UDP it would let two share a port.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
                chosen = int(probe.getsockname()[1])
                self._file.write_text(json.dumps(known | {purpose: chosen}))
                return chosen
        return 0

    def _read(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self._file.read_text())
            if isinstance(found, dict):
                return {str(k): v for k, v in found.items() if isinstance(v, int)}
        return {}
