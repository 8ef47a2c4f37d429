"""A real OpenSSH server as "another machine": on a loopback address, or in its own network.

As root it serves a throw-away user made for it (and removed after); as a plain user it serves
that user. Logins are by certificate or key only. Needs /usr/sbin/sshd; `network=True` needs root
and iproute2.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SSHD = "/usr/sbin/sshd"
_counter = itertools.count()
_TIMEOUT = 20.0


@dataclass(frozen=True)
class Machine:
    """A running server: where it is, whom it lets in, and what it shows."""

    host: str
    port: int
    user: str
    home: Path
    host_key_line: str
    log: Path
    folder: Path

    def authorize(self, *lines: str) -> None:
        """Let the holders of these keys (authorized_keys lines) in, and nobody else."""
        (self.folder / "authorized_keys").write_text("".join(f"{line}\n" for line in lines))


def available() -> bool:
    """Whether there is an OpenSSH server to start."""
    return Path(SSHD).exists()


@contextlib.contextmanager
def sshd(
    *,
    host: str = "127.0.0.11",
    authorized: Sequence[str] = (),
    trusted_ca: str = "",
    principals: Sequence[str] = (),
    network: bool = False,
) -> Iterator[Machine]:
    """Start a server and stop it, with all its sessions, at the end.

    ``trusted_ca`` is a TrustedUserCAKeys line; certificates must then name one of
    ``principals`` (or the user, if none are told). With ``network`` the machine has a network
    namespace and host name of its own, and ``host`` is chosen.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="gridcloud-sshd-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)  # sshd reads the keys as the user it serves
        enter: list[str] = []
        if network:
            host, enter = stack.enter_context(_network())
        user = stack.enter_context(_throwaway_user()) if os.geteuid() == 0 else _myself()
        key = folder / "host_key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key)
        port = _start(stack, folder, host, enter, trusted_ca, principals)
        line = key.with_suffix(".pub").read_text().strip()
        machine = Machine(
            host=host,
            port=port,
            user=user.pw_name,
            home=Path(user.pw_dir),
            host_key_line=line,
            log=folder / "log",
            folder=folder,
        )
        machine.authorize(*authorized)
        yield machine


def _start(stack, folder, host, enter, trusted_ca, principals):
    config = folder / "sshd_config"
    lines = [
        f"ListenAddress {host}",
        f"HostKey {folder / 'host_key'}",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        f"AuthorizedKeysFile {folder / 'authorized_keys'}",
        "Subsystem sftp internal-sftp",
        "LogLevel VERBOSE",
        "MaxStartups 200",
    ]
    if trusted_ca:
        (folder / "ca").write_text(trusted_ca + "\n")
        lines.append(f"TrustedUserCAKeys {folder / 'ca'}")
    if principals:
        (folder / "principals").write_text("".join(f"{name}\n" for name in principals))
        lines.append(f"AuthorizedPrincipalsFile {folder / 'principals'}")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    deadline = time.monotonic() + _TIMEOUT
    while True:
        # In a network of its own every port is free; here another may take it before sshd does.
        port = 22 if enter else _free_port(host)
        config.write_text("\n".join([f"Port {port}", *lines, ""]))
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen(
                [*enter, SSHD, "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((host, port), 1) as link:
                if link.recv(4) == b"SSH-":
                    stack.callback(_stop, server)
                    return port
            time.sleep(0.02)
        _stop(server)
        if time.monotonic() >= deadline:
            raise RuntimeError(f"sshd did not start: {(folder / 'log').read_text()}")


def _stop(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()


def _free_port(host):
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _myself():
    return pwd.getpwuid(os.geteuid())


@contextlib.contextmanager
def _throwaway_user():
    name = f"gc{os.getpid()}n{next(_counter)}"
    _patiently("useradd", "--create-home", "--shell", "/bin/sh", name)
    try:
        _patiently("usermod", "--password", "*", name)  # else "locked", which sshd refuses
        user = pwd.getpwnam(name)
        yield user
        for process in psutil.process_iter(["uids"]):
            if process.info["uids"] and process.info["uids"].real == user.pw_uid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(5)
    finally:
        _patiently("userdel", "--force", "--remove", name)


@contextlib.contextmanager
def _network():
    """Make a network namespace reached over a veth pair; give its address and how to enter."""
    holder = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "infinity"])
    try:
        inside = Path(f"/proc/{holder.pid}/ns/net")
        while inside.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        number = holder.pid % 16384  # one /30 of 10.213.0.0/16 for each
        base = f"10.213.{number >> 6}.{(number & 63) << 2}".rpartition(".")
        ours, theirs = (f"{base[0]}.{int(base[2]) + n}" for n in (1, 2))
        link = f"gc{holder.pid}"
        enter = ["nsenter", "--target", str(holder.pid), "--net", "--uts"]
        _run("ip", "link", "add", link, "type", "veth", "peer", "eth0", "netns", str(holder.pid))
        _run("ip", "address", "add", f"{ours}/30", "dev", link)
        _run("ip", "link", "set", link, "up")
        _run(*enter, "ip", "address", "add", f"{theirs}/30", "dev", "eth0")
        _run(*enter, "ip", "link", "set", "eth0", "up")
        _run(*enter, "ip", "link", "set", "lo", "up")
        _run(*enter, "hostname", "another")
        yield theirs, enter
    finally:
        holder.kill()
        holder.wait()


def _patiently(*command):
    # Another test process may hold the lock on /etc/passwd.
    deadline = time.monotonic() + _TIMEOUT
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        locked = "lock" in done.stderr
        if not locked or time.monotonic() > deadline:
            raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
        time.sleep(0.1)


def _run(*command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
