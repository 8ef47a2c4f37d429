"""Containers of podman or Docker on this host: for the owner's jobs, and to confine guests in."""

from gridcloud.providers.containers.provider import ContainersProvider
from gridcloud.providers.containers.recipe import ContainersSection

__all__ = ["ContainersProvider", "ContainersSection"]
