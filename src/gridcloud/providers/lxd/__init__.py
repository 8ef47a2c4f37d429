"""Machines at an LXD: system containers or virtual machines with cloud-init."""

from __future__ import annotations

from typing import Any, ClassVar

from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.lxd.cloud import LXDCloud
from gridcloud.providers.lxd.section import LXDSection


class LXDProvider(CloudProvider):
    """Makes machines at this host's LXD or at a remote one."""

    kind: ClassVar[str] = "lxd"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(LXDSection, name, section)
        super().__init__(name, own, context, LXDCloud(own, context.site_key))
