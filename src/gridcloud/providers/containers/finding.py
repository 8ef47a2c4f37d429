"""Where the container engine listens, found as the programs of Docker and podman find theirs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gridcloud.errors import InvalidSpec, NotFound, Unavailable
from gridcloud.model.frozen import Frozen

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HINT = (
    "Start podman's service (systemctl --user start podman.socket) or Docker, or name the socket "
    'in the section: engine = "unix:///run/podman/podman.sock".'
)


class Address(Frozen):
    """Where an engine answers: a unix socket, or a port of this host; and who says so."""

    socket: str = ""
    host: str = ""
    port: int = 0
    told_by: str = ""

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else f"tcp://{self.host}:{self.port}"


def parse(text: str, told_by: str) -> Address:
    """Return an address as DOCKER_HOST has it.

    Only an engine of this host will do, as folders of this host are mounted. Raises `InvalidSpec`.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise _refused(text, told_by, "is no address") from error
    if parts.scheme == "unix" and parts.path.startswith("/"):
        return Address(socket=parts.path, told_by=told_by)
    if parts.scheme in ("tcp", "http") and parts.hostname in _LOOPBACK and port:
        return Address(host=parts.hostname, port=port, told_by=told_by)
    raise _refused(text, told_by, "is no engine of this host")


def find_engine(
    told: str, environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> Address:
    """Return the engine to use: the settings' if told, else DOCKER_HOST, CONTAINER_HOST, the
    current docker context, or the first socket there is in the usual places.

    Blocks for a few looks at files. Raises `InvalidSpec`, `NotFound`, and `Unavailable` if there
    is none.
    """
    if told:
        return parse(told, "the settings")
    for variable in ("DOCKER_HOST", "CONTAINER_HOST"):
        if value := environ.get(variable):
            return parse(value, variable)
    home = home or Path.home()
    if context := _context_host(environ, home):
        return context
    places = list(_usual_places(environ, home))
    for place in places:
        if _is_usable(place):
            return Address(socket=str(place), told_by="the usual places")
    raise Unavailable(
        f"No container engine was found; looked for {', '.join(map(str, places))}.", hint=_HINT
    )


def _usual_places(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "podman/podman.sock"
    elif os.geteuid():
        yield Path(f"/run/user/{os.geteuid()}/podman/podman.sock")
    yield Path("/run/podman/podman.sock")
    if runtime:
        yield Path(runtime) / "docker.sock"
    yield home / ".docker/run/docker.sock"
    yield Path("/var/run/docker.sock")


def _is_usable(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode) and os.access(path, os.R_OK | os.W_OK)
    except OSError:
        return False


def _context_host(environ: Mapping[str, str], home: Path) -> Address | None:
    """Return the engine of the docker context in use; None for the context called default."""
    folder = Path(environ.get("DOCKER_CONFIG") or home / ".docker")
    name = environ.get("DOCKER_CONTEXT") or _read(folder / "config.json").get("currentContext")
    if not name or name == "default" or not isinstance(name, str):
        return None
    file = folder / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
    endpoints = _read(file).get("Endpoints")
    endpoint = endpoints.get("docker") if isinstance(endpoints, dict) else None
    host = endpoint.get("Host") if isinstance(endpoint, dict) else None
    if not isinstance(host, str):
        raise NotFound(
            f"The docker context {name!r} says no host in {file}.",
            hint="See 'docker context ls', or name the engine in the section.",
        )
    return parse(host, f"docker context {name}")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"{file} cannot be read: {error}.", hint="Mend or remove it.") from error
    return found if isinstance(found, dict) else {}


def _refused(text: str, told_by: str, why: str) -> InvalidSpec:
    return InvalidSpec(
        f"{text!r} (from {told_by}) {why}.",
        hint="Give it as unix:///path/of/the.socket, or tcp://127.0.0.1:PORT.",
    )
