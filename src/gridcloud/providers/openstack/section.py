"""The settings of an OpenStack cloud."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from gridcloud.providers.cloud.section import CloudSection

_Text = Annotated[str, Field(max_length=255)]
_Part = Annotated[int, Field(ge=0, le=2**16)]


class OpenStackSection(CloudSection):
    """Which cloud, and what of it may be used.

    Credentials are where OpenStack's users have them: ``cloud`` names one in `clouds.yaml` (of
    the usual places, or ``clouds_file``); without it the environment's ``OS_*`` count. An OpenID
    Connect access token comes fresh from ``token_command`` or ``token_file`` whenever it is used.

    Without a ``network`` of its own, one is made for this site while it has machines there:
    ``subnet`` is its range. ``address`` is which one this site reaches machines at; ``auto`` is a
    floating one on a network that was made, else a fixed one. ``gpus`` tells how many GPUs the
    flavors have that match a pattern, and ``prices`` what an hour of them costs.
    """

    cloud: _Text = ""
    clouds_file: Path | None = None
    regions: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    zones: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    token_command: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    token_file: Path | None = None
    flavors: Annotated[tuple[_Text, ...], Field(max_length=256)] = ("*",)
    gpus: dict[_Text, _Part] = {}
    prices: dict[_Text, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    currency: Annotated[str, Field(max_length=8)] = ""
    network: _Text = ""
    subnet: str = "10.83.0.0/22"
    name_servers: Annotated[tuple[str, ...], Field(max_length=8)] = ()
    external_network: _Text = ""
    address: Literal["auto", "fixed", "floating"] = "auto"
    security_groups: Annotated[tuple[_Text, ...], Field(max_length=32)] = ()
    ssh_from: Annotated[tuple[str, ...], Field(max_length=64)] = ("0.0.0.0/0", "::/0")
    volume_type: _Text = ""

    @field_validator("subnet")
    @classmethod
    def _subnet(cls, text: str) -> str:
        network = IPv4Network(text)
        if network.prefixlen > 29:
            raise ValueError("a network for machines has 8 addresses at least")
        return str(network)

    @field_validator("ssh_from")
    @classmethod
    def _ranges(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(text)) for text in texts)

    @model_validator(mode="after")
    def _one_source(self) -> OpenStackSection:
        if self.token_command and self.token_file:
            raise ValueError("a token comes from token_command or from token_file, not from both")
        return self

    @property
    def floating(self) -> bool:
        """Whether machines are reached at floating addresses."""
        return self.address == "floating" or (self.address == "auto" and not self.network)
