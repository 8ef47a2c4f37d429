"""A lending site that starts no sandboxes: what a lease costs without them.

All else is as with ``python -m gridcloud.site``.
"""

from __future__ import annotations

from gridcloud.model.lease import Lease, Machine
from gridcloud.providers.local import GUEST_HOME, JOBS, LocalProvider
from gridcloud.site.__main__ import main


async def launch(provider: LocalProvider, lease: Lease) -> Machine:
    """Say that there is a sandbox."""
    return Machine(
        lease_id=lease.id, provider=provider.name, folder=f"{GUEST_HOME}/{JOBS}", sandbox=True
    )


async def terminate(_provider: LocalProvider, _lease_id: str) -> None:
    """There is nothing to end."""


if __name__ == "__main__":
    LocalProvider.launch = launch  # type: ignore[method-assign]
    LocalProvider.terminate = terminate  # type: ignore[method-assign]
    main()
