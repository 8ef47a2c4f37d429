"""Machines at EC2, and at other clouds by Libcloud's drivers."""

from __future__ import annotations

from typing import Any, ClassVar

from gridcloud.errors import Unavailable
from gridcloud.model.asking import Question
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.clouds import Cloud
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.libcloud import questions
from gridcloud.providers.libcloud.section import EC2Section, LibcloudSection


class EC2Provider(CloudProvider):
    """Makes machines at Amazon's EC2, or at another cloud with its API."""

    kind: ClassVar[str] = "ec2"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(EC2Section, name, section)
        super().__init__(name, own, context, _ec2(own, context.site_key))

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`. Profiles are those of the user's ``~/.aws``."""
        return questions.of_ec2()


class LibcloudProvider(CloudProvider):
    """Makes machines by the driver of the settings."""

    kind: ClassVar[str] = "libcloud"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(LibcloudSection, name, section)
        super().__init__(name, own, context, _any(own, context.site_key))

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`."""
        return questions.of_any()


def _ec2(section: EC2Section, site_key: str) -> Cloud:
    try:
        from gridcloud.providers.libcloud.ec2 import EC2Cloud  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return EC2Cloud(section, site_key)


def _any(section: LibcloudSection, site_key: str) -> Cloud:
    try:
        from gridcloud.providers.libcloud.any_cloud import (  # noqa: PLC0415 - an extra
            LibcloudCloud,
        )
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return LibcloudCloud(section, site_key)


def _missing(error: ModuleNotFoundError) -> Unavailable:
    return Unavailable(
        f"Apache Libcloud is not installed: {error.name} is missing.",
        hint="Install it: pip install 'gridcloud[libcloud]'.",
    )
