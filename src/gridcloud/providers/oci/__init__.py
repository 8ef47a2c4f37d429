"""Machines at Oracle Cloud, through Oracle's own SDK."""

from __future__ import annotations

from typing import Any, ClassVar

from gridcloud.errors import Unavailable
from gridcloud.model.asking import Question
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.clouds import Cloud
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.oci.profiles import questions
from gridcloud.providers.oci.section import OCISection

__all__ = ["OCIProvider", "OCISection"]


class OCIProvider(CloudProvider):
    """Makes machines in a compartment of Oracle Cloud."""

    kind: ClassVar[str] = "oci"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(OCISection, name, section)
        super().__init__(name, own, context, _cloud(own, context.site_key))

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`. Profiles are those of the user's ``~/.oci/config``."""
        return questions()


def _cloud(section: OCISection, site_key: str) -> Cloud:
    try:
        from gridcloud.providers.oci.cloud import OCICloud  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"Oracle's SDK is not installed: {error.name} is missing.",
            hint="Install it: pip install 'gridcloud[oci]'.",
        ) from error
    return OCICloud(section, site_key)
