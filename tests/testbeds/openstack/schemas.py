"""The databases of a new OpenStack, made by its own programs; it takes a minute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testbeds.openstack.configuration import database
from testbeds.openstack.layout import AUTH_URL, REGION

DATABASES = (
    "keystone",
    "glance",
    "placement",
    "nova_api",
    "nova",
    "nova_cell0",
    "neutron",
    "cinder",
)


def make(run: Callable[..., None], etc: Path) -> None:
    """Make all tables, and keystone's administrator; ``run`` runs a program with arguments."""
    with ThreadPoolExecutor() as threads:
        for work in [
            threads.submit(part, run, etc) for part in (_keystone, _nova, _neutron, _others)
        ]:
            work.result()


def options(etc: Path, name: str) -> tuple[str, str]:
    """Return what tells a program where its settings are."""
    return "--config-file", f"{etc}/{name}/{'glance-api' if name == 'glance' else name}.conf"


def _keystone(run: Callable[..., None], etc: Path) -> None:
    program = ("keystone-manage", *options(etc, "keystone"))
    run(*program, "db_sync")
    for keys in ("fernet_setup", "credential_setup"):
        run(*program, keys, "--keystone-user=root", "--keystone-group=root")
    urls = [f"--bootstrap-{one}-url={AUTH_URL}" for one in ("public", "internal", "admin")]
    who = ("--bootstrap-password=admin", f"--bootstrap-region-id={REGION}")
    run(*program, "bootstrap", *who, *urls)


def _nova(run: Callable[..., None], etc: Path) -> None:
    program = ("nova-manage", *options(etc, "nova"))
    run(*program, "api_db", "sync")
    cell0 = f"--database_connection={database('nova_cell0')}"
    run(*program, "cell_v2", "map_cell0", cell0)
    run(*program, "db", "sync")
    run(*program, "cell_v2", "create_cell", "--name=cell1")


def _neutron(run: Callable[..., None], etc: Path) -> None:
    run("neutron-db-manage", *options(etc, "neutron"), "upgrade", "heads")


def _others(run: Callable[..., None], etc: Path) -> None:
    run("placement-manage", *options(etc, "placement"), "db", "sync")
    run("glance-manage", *options(etc, "glance"), "db_sync")
    run("cinder-manage", *options(etc, "cinder"), "db", "sync")
