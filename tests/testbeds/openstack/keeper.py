"""The first process of the namespaces in which the testbed's OpenStack lives: it starts all
services, and ends when nobody uses them any more. What it started ends with it, however that is.

    python -m testbeds.openstack.keeper RUN TEMPLATE VENV ROOT

RUN is a folder of this run. TEMPLATE holds the databases of a cloud where nothing was made yet: it
is made first if it is not there, which takes a minute.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from testbeds.openstack import configuration, schemas
from testbeds.openstack.layout import HERE, INSIDE, PORTS

_START_SECONDS = 800.0


class Keeper:
    """See the module."""

    def __init__(self, run: Path, template: Path, venv: Path, root: Path) -> None:
        self.run, self.template, self.venv, self.root = run, template, venv, root
        self.state, self.logs, self.etc = run / "state", run / "logs", run / "etc"
        self.began = time.monotonic()
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            "PATH": f"{venv}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.state),
            "PYTHONWARNINGS": "ignore",
            "LC_ALL": "C.UTF-8",
            "OS_KEYSTONE_CONFIG_DIR": f"{self.etc}/keystone",
            "OS_GLANCE_CONFIG_DIR": f"{self.etc}/glance",
            "OS_PLACEMENT_CONFIG_DIR": f"{self.etc}/placement",
            "OS_NOVA_CONFIG_DIR": f"{self.etc}/nova",
            "OS_NEUTRON_CONFIG_DIR": f"{self.etc}/neutron",
            "OS_NEUTRON_CONFIG_FILES": "neutron.conf",
            "OS_CINDER_CONFIG_DIR": f"{self.etc}/cinder",
            # Plain threads: what nova recommends by now, and the virt driver needs.
            "OS_NOVA_DISABLE_EVENTLET_PATCHING": "1",
            "GUEST_ROOT": str(root),
            "GUEST_FOLDER": f"{run}/servers",
            "VOLUME_FOLDER": f"{run}/volumes",
        }
        self._environment.pop("PYTHONPATH", None)

    def keep(self) -> None:
        """Start everything, say so, and return when nobody uses it any more."""
        for folder in (self.state, self.logs, self.etc, self.run / "servers", self.run / "volumes"):
            folder.mkdir(parents=True)
        # Nobody is sure to make these before the first who needs them.
        for name in ("locks", "glance", "nova", "neutron", "cinder"):
            (self.state / name).mkdir()
        configuration.write(self.etc, self.state, self.venv, HERE / "inside")
        if self.template.is_dir():
            shutil.copytree(self.template, self.state, symlinks=True, dirs_exist_ok=True)
            self._start(fresh=False)
        else:
            self._start(fresh=True)
            self._save()
        (self.run / "ready").write_text(f"{time.monotonic() - self.began:.1f}\n")
        with (self.run.parent / "users.lock").open("w") as users:
            while True:
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._reap()
                    time.sleep(0.5)
                else:
                    (self.run / "ready").unlink()  # whoever comes now starts another one
                    return

    # --- starting

    def _start(self, *, fresh: bool) -> None:
        self._network()
        self._serve_queue()
        self._serve_database(fresh=fresh)
        if fresh:
            schemas.make(self._run, self.etc)
        if not fresh:
            self._begin("addresses", ["python", str(HERE / "inside/addresses.py")])
        self._serve("keystone", "identity", "keystone.wsgi.api", workers=2)
        if fresh:
            self._await_api("identity")
            self._call([sys.executable, "-m", "testbeds.openstack.register", "services"])
        self._serve("placement", "placement", "placement.wsgi.api")
        self._serve("glance", "image", "glance.wsgi.api")
        self._serve("nova-api", "compute", "nova.wsgi.osapi_compute")
        self._serve("neutron", "network", "neutron.wsgi.api")
        self._serve(
            "cinder-api", "volumev3", "cinder.wsgi.api", options=schemas.options(self.etc, "cinder")
        )
        self._await("the queue", lambda: _listens("127.0.0.1", 5672))
        nova, cinder = schemas.options(self.etc, "nova"), schemas.options(self.etc, "cinder")
        self._begin("nova-conductor", ["nova-conductor", *nova])
        self._begin("nova-scheduler", ["nova-scheduler", *nova])
        self._begin("cinder-scheduler", ["cinder-scheduler", *cinder])
        self._begin("cinder-volume", ["cinder-volume", *cinder])
        self._await_api("identity")
        self._await_api("placement")
        self._begin("nova-compute", ["nova-compute", *nova])
        for name in ("image", "compute", "network", "volumev3"):
            self._await_api(name)
        self._await("nova-compute", lambda: self._reports("nova", "nova-compute"))
        self._await("cinder-volume", lambda: self._reports("cinder", "cinder-volume"))
        if fresh:
            self._run("nova-manage", *nova, "cell_v2", "discover_hosts", "--by-service")
            self._call([sys.executable, "-m", "testbeds.openstack.register", "things"])

    def _network(self) -> None:
        script = "link set lo up\nlink add servers type bridge\nlink set servers up\n"
        subprocess.run(["ip", "-batch", "-"], input=script, text=True, check=True)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        # The names of network namespaces would otherwise be left on the host.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        (self.run / "network").write_text("")
        self._await("the cable to the host", lambda: _has_address(INSIDE))

    def _serve_queue(self) -> None:
        folder = self.state / "rabbit"
        more = {
            "RABBITMQ_NODENAME": "testbed@localhost",
            "RABBITMQ_MNESIA_BASE": str(folder),
            "RABBITMQ_LOG_BASE": str(self.logs / "rabbit"),
            "RABBITMQ_CONFIG_FILE": str(self.etc / "rabbit/rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.etc / "rabbit/enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.state / "rabbit.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        }
        self._begin("rabbit", ["/usr/lib/rabbitmq/bin/rabbitmq-server"], more)

    def _serve_database(self, *, fresh: bool) -> None:
        data = self.state / "mysql"
        if fresh:
            method = "--auth-root-authentication-method=normal"
            self._run("mariadb-install-db", "--user=root", f"--datadir={data}", method)
        self._begin(
            "mariadb",
            [
                *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}"),
                *(f"--socket={self.state}/mysql.sock", f"--pid-file={self.state}/mysql.pid"),
                *("--bind-address=127.0.0.1", "--skip-log-bin", "--max-connections=600"),
                # Nothing of it has to survive a crash.
                *("--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"),
                *("--innodb-buffer-pool-size=128M", "--innodb-log-file-size=8M"),
                *("--performance-schema=off", "--character-set-server=utf8mb3"),
            ],
        )
        self._await("the database", lambda: self._sql("select 1") is not None)
        if fresh:
            for name in schemas.DATABASES:
                self._sql(f"create database {name} character set utf8mb3")
            for host in ("127.0.0.1", "localhost"):
                self._sql(f"grant all on *.* to 'openstack'@'{host}' identified by 'openstack'")

    def _save(self) -> None:
        """Keep what was made as the template of later runs; then stop: the next run uses it."""
        database = self._services["mariadb"]
        for name, service in reversed(self._services.items()):
            if name != "mariadb":
                service.kill()
        database.terminate()
        database.wait()
        partial = self.template.with_suffix(f".{os.getpid()}.partial")
        kept = ("mysql", "fernet", "credentials", "nova", "glance")
        for name in kept:
            if (self.state / name).exists():
                shutil.copytree(self.state / name, partial / name)
        partial.rename(self.template)
        raise SystemExit(AGAIN)

    # --- small parts

    def _serve(
        self, name: str, service: str, module: str, workers: int = 1, options: Sequence[str] = ()
    ) -> None:
        where = f"{INSIDE}:{PORTS[service]}"
        server = str(HERE / "inside/serve.py")
        self._begin(name, ["python", server, where, str(workers), module, *options])

    def _begin(self, name: str, argv: Sequence[str], more: dict[str, str] | None = None) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self._services[name] = subprocess.Popen(
                [shutil.which(argv[0], path=self._path) or argv[0], *argv[1:]],
                env=self._environment | (more or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.state,
                start_new_session=True,
            )

    @property
    def _path(self) -> str:
        return self._environment["PATH"]

    def _run(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=self._path)
        self._call([path or program, *arguments], self._environment)

    def _call(self, argv: Sequence[str], environment: dict[str, str] | None = None) -> None:
        with (self.logs / "making.log").open("ab") as log:
            log.write(f"--- {time.monotonic() - self.began:.1f} {' '.join(argv)}\n".encode())
            log.flush()
            subprocess.run(argv, env=environment, stdout=log, stderr=log, check=True)

    def _sql(self, statement: str) -> str | None:
        argv = ["mariadb", f"--socket={self.state}/mysql.sock", "-uroot", "-BNe", statement]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return None if done.returncode else done.stdout.strip()

    def _reports(self, service: str, binary: str) -> bool:
        seen = f"select count(*) from {service}.services where `binary`='{binary}' and deleted=0"
        return self._sql(f"{seen} and updated_at > utc_timestamp() - interval 8 second") == "1"

    def _await_api(self, service: str) -> None:
        self._await(service, lambda: _answers(f"http://{INSIDE}:{PORTS[service]}/"))

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        while not there():
            for name, service in self._services.items():
                if service.poll() is not None:
                    raise SystemExit(f"{name} has ended: see {self.logs}/{name}.log")
            if time.monotonic() - self.began > _START_SECONDS:
                raise SystemExit(f"{what} does not come up: see {self.logs}")
            time.sleep(0.2)
        with (self.logs / "making.log").open("a") as log:
            log.write(f"--- {time.monotonic() - self.began:.1f} {what} is up\n")

    def _reap(self) -> None:
        """Wait for processes whose parents are gone, as the first process has to."""
        known = {service.pid for service in self._services.values()}
        with_status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if with_status and with_status.si_pid not in known:
            os.waitpid(with_status.si_pid, 0)


AGAIN = 75


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _has_address(address: str) -> bool:
    listed = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True)
    return f" {address}/" in listed.stdout


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Keeper(*map(Path, sys.argv[1:])).keep()
