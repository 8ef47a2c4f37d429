"""The typed client of a site, asynchronous and synchronous."""

from gridcloud.client.asynchronous import AsyncClient, JobEvent
from gridcloud.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "JobEvent"]
