"""Where an LXD answers and how it is trusted: by what LXD's own command line is told.

That is ``LXD_SOCKET``, ``LXD_DIR``, and the folder ``LXD_CONF`` (else ``~/.config/lxc`` or the
snap's) with ``config.yml``, ``client.crt``, ``client.key`` and ``servercerts/``.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gridcloud.errors import Forbidden, InvalidSpec, NotFound, Unavailable

_SOCKETS = ("/var/snap/lxd/common/lxd/unix.socket", "/var/lib/lxd/unix.socket")
_FOLDERS = ("~/.config/lxc", "~/snap/lxd/common/config")
#: Servers of images that every ``lxc`` knows.
_KNOWN_IMAGES = {
    "images": "https://images.lxd.canonical.com",
    "ubuntu": "https://cloud-images.ubuntu.com/releases",
    "ubuntu-daily": "https://cloud-images.ubuntu.com/daily",
    "ubuntu-minimal": "https://cloud-images.ubuntu.com/minimal/releases",
}


@dataclass(frozen=True)
class Way:
    """How to reach an LXD: over a unix ``socket``, or at a ``url`` with ``tls``."""

    url: str
    socket: Path | None = None
    tls: ssl.SSLContext | None = None
    project: str = ""

    def __str__(self) -> str:
        return str(self.socket) if self.socket else self.url


class Remotes:
    """What LXD's own command line knows. Files are read when they are used."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment

    def way(self, remote: str, socket: Path | None) -> Way:
        """Return how to reach a remote, this host's LXD if none is named.

        Raises `NotFound` for an unknown remote or a missing key, `Unavailable` if there is no LXD
        here.
        """
        if socket is not None:
            return Way("http://lxd", socket.expanduser())
        if remote in {"", "local"}:
            return Way("http://lxd", self._local_socket())
        known = self._remotes()
        if remote not in known:
            raise NotFound(
                f"LXD's settings know no remote {remote!r}.",
                hint=f"Known are: {', '.join(sorted(known)) or 'none'}. `lxc remote add` adds one.",
            )
        address = str(known[remote].get("addr", ""))
        project = str(known[remote].get("project") or "")
        if address.startswith("unix:"):
            path = address.removeprefix("unix:").removeprefix("//")
            return Way("http://lxd", Path(path) if path else self._local_socket(), project=project)
        if not address.startswith("https://") or known[remote].get("protocol") == "simplestreams":
            raise InvalidSpec(
                f"The remote {remote} makes no machines: {address or 'it has no address'}.",
                hint="Name one that `lxc list NAME:` can ask.",
            )
        return Way(address.rstrip("/"), tls=self._trust(remote), project=project)

    def names(self) -> tuple[str, ...]:
        """Return the remotes that make machines."""
        return tuple(
            sorted(
                name
                for name, one in self._remotes().items()
                if one.get("protocol") != "simplestreams" and not one.get("public")
            )
        )

    def image_server(self, remote: str) -> tuple[str, str]:
        """Return the URL and the protocol of a server of images; raises `NotFound`."""
        told = self._remotes().get(remote, {})
        if told.get("public") or told.get("protocol") == "simplestreams":
            return str(told.get("addr", "")), str(told.get("protocol") or "lxd")
        if remote in _KNOWN_IMAGES:
            return _KNOWN_IMAGES[remote], "simplestreams"
        raise NotFound(
            f"There is no server of images called {remote!r}.",
            hint=f"There are for instance: {', '.join(_KNOWN_IMAGES)}. `lxc remote add` adds one.",
        )

    def _local_socket(self) -> Path:
        if told := self._environment.get("LXD_SOCKET"):
            return Path(told)
        if told := self._environment.get("LXD_DIR"):
            return Path(told) / "unix.socket"
        for path in map(Path, _SOCKETS):
            if path.exists():
                return path
        raise Unavailable(
            "There is no LXD on this host.",
            hint="Install it, or name a remote: `remote = ...`, as `lxc remote list` shows it.",
        )

    def _folder(self) -> Path:
        if told := self._environment.get("LXD_CONF"):
            return Path(told)
        folders = [Path(folder).expanduser() for folder in _FOLDERS]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def _remotes(self) -> dict[str, dict[str, Any]]:
        path = self._folder() / "config.yml"
        try:
            told = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidSpec(f"{path} cannot be read: {error}.", hint="Mend it.") from error
        remotes = told.get("remotes") if isinstance(told, dict) else None
        if not isinstance(remotes, dict):
            return {}
        return {str(name): one for name, one in remotes.items() if isinstance(one, dict)}

    def _trust(self, remote: str) -> ssl.SSLContext:
        """Return what proves this user to a remote, and the remote to this user."""
        folder = self._folder()
        pinned = folder / "servercerts" / f"{remote}.crt"
        context = ssl.create_default_context(cafile=str(pinned) if pinned.exists() else None)
        if pinned.exists():
            # It is this very certificate that is trusted, whatever it says of itself.
            context.check_hostname = False
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        try:
            context.load_cert_chain(folder / "client.crt", folder / "client.key")
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no client.crt and client.key in {folder}.",
                hint=f"`lxc remote add {remote} ADDRESS` makes them.",
            ) from error
        except (OSError, ssl.SSLError) as error:
            raise Forbidden(
                f"The client certificate in {folder} cannot be used: {error}.",
                hint="Look who may read it, and whether key and certificate belong together.",
            ) from error
        return context
