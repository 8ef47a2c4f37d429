"""A site with a `testbeds.folder_cloud` whose machines are a real sshd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gridcloud.model.lease import Endpoint
from testbeds.folder_cloud import started_with
from testbeds.sites import SiteProcess
from testbeds.sshd import Machine, sshd


@contextlib.contextmanager
def reachable_site(
    folder: Path, cloud: Path, host: str, settings: str = ""
) -> Iterator[tuple[SiteProcess, Machine]]:
    """Give a running site, and the SSH server on ``host`` that trusts its certificates."""
    site = SiteProcess(folder / "site", "site", settings, started_with(folder))
    site.start()
    try:
        with site.client() as client:
            authority = client.site().user_ca
            with sshd(host=host, trusted_ca=authority, principals=("nobody-yet",)) as machine:
                endpoint = Endpoint(
                    host=machine.host,
                    port=machine.port,
                    user=machine.user,
                    host_keys=(machine.host_key_line,),
                )
                section = {
                    "kind": "folder",
                    "folder": str(cloud),
                    "endpoint": endpoint.model_dump_json(),
                    "principals": str(machine.folder / "principals"),
                }
                client.add_provider("cloud", section)
                yield site, machine
    finally:
        site.close()
