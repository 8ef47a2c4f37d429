"""gridcloud: use, lend and borrow compute across organisations, with no central server."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gridcloud.client.asynchronous import AsyncClient as AsyncClient
    from gridcloud.client.synchronous import Client as Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    # Loaded on first use, so that the command line and the supervisor start quickly.
    if name == "AsyncClient":
        from gridcloud.client.asynchronous import AsyncClient  # noqa: PLC0415

        return AsyncClient
    if name == "Client":
        from gridcloud.client.synchronous import Client  # noqa: PLC0415

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
