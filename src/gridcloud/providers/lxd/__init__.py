"""Machines at an LXD: system containers or virtual machines with cloud-init."""

from __future__ import annotations

from typing import Any, ClassVar

from gridcloud.errors import GridcloudError
from gridcloud.model.asking import Question
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.lxd.cloud import LXDCloud
from gridcloud.providers.lxd.connecting import Remotes
from gridcloud.providers.lxd.section import LXDSection


class LXDProvider(CloudProvider):
    """Makes machines at this host's LXD or at a remote one."""

    kind: ClassVar[str] = "lxd"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        own = read_section(LXDSection, name, section)
        super().__init__(name, own, context, LXDCloud(own, context.site_key))

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`. The remotes are those that LXD's own command line knows."""
        remotes = Remotes()
        known = remotes.names()
        try:
            remotes.way("", None)
            nearest = "local"
        except GridcloudError:
            nearest = ""
        return (
            Question(
                setting="remote",
                text="Which LXD, as `lxc remote list` shows it",
                default=nearest,
                choices=tuple(dict.fromkeys((nearest, *known) if nearest else known)),
            ),
            Question(setting="project", text="Which of its projects", default="default"),
            Question(
                setting="image",
                text="Which image to boot: an alias there, or REMOTE:ALIAS to be fetched",
                default="ubuntu:24.04",
            ),
        )
