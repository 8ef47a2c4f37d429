"""Machines at an OpenStack cloud, over the APIs of nova, neutron, glance and cinder."""

from __future__ import annotations

from typing import Any

from gridcloud.errors import Unavailable
from gridcloud.model.asking import Question
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.openstack.asking import questions
from gridcloud.providers.openstack.section import OpenStackSection

__all__ = ["OpenStackProvider", "OpenStackSection"]


class OpenStackProvider(CloudProvider):
    """Makes machines in the projects of an OpenStack cloud."""

    kind = "openstack"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(OpenStackSection, name, section)
        try:
            from gridcloud.providers.openstack.cloud import (  # noqa: PLC0415 - an extra
                OpenStackCloud,
            )
        except ModuleNotFoundError as error:
            raise Unavailable(
                f"[providers.{name}] the package {error.name} is not installed.",
                hint="Install it: pip install 'gridcloud[openstack]'.",
            ) from error
        super().__init__(name, own, context, OpenStackCloud(own, context.site_key))

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`. Clouds are those of the user's ``clouds.yaml``."""
        return questions()
