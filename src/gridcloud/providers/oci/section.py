"""The settings of Oracle Cloud."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gridcloud.providers.cloud.section import CloudSection

_Text = Annotated[str, Field(max_length=255)]
_Ocid = Annotated[str, Field(max_length=255, pattern=r"^ocid1\.[a-zA-Z0-9_.-]+$")]
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OCISection(CloudSection):
    """Which account at Oracle Cloud, and what of it may be used.

    Credentials are where the users of OCI have them: ``auth`` says how to log in, and is found out
    where it is empty; ``profile`` is one of `~/.oci/config`. Machines are made in ``compartment``,
    the tenancy's root unless told. ``network`` is the OCID of a subnet, empty to have a network
    made for this site while it has machines there; ``subnet`` is the range of one that is made.
    ``endpoint`` is that of a cloud with this API elsewhere; ``{service}`` and ``{region}`` in it
    are replaced. ``prices`` are per hour of a whole machine, by patterns of shapes.
    """

    profile: _Text = ""
    config_file: Annotated[str, Field(max_length=4096)] = ""
    auth: Literal["", "api_key", "security_token", "instance_principal", "resource_principal"] = ""
    compartment: Annotated[
        str, Field(max_length=255, pattern=r"^(ocid1\.(compartment|tenancy)\.[a-zA-Z0-9_.-]+)?$")
    ] = ""
    regions: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    zones: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    image: Annotated[str, Field(max_length=512)] = "platform/Canonical-Ubuntu-24.04-[2a]*"
    shapes: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=200)] = ("VM.*",)
    spot: bool = True
    prices: dict[_Text, _Price] = {}
    currency: Annotated[str, Field(max_length=8)] = "USD"
    network: Annotated[
        str, Field(max_length=255, pattern=r"^(ocid1\.subnet\.[a-zA-Z0-9_.-]+)?$")
    ] = ""
    subnet: str = "10.83.0.0/20"
    security_groups: Annotated[tuple[_Ocid, ...], Field(max_length=5)] = ()
    ssh_from: Annotated[tuple[str, ...], Field(max_length=50)] = ("0.0.0.0/0",)
    address: Literal["public", "private"] = "public"
    volume_performance: Annotated[int, Field(ge=0, le=120, multiple_of=10)] = 10
    endpoint: Annotated[str, Field(max_length=255, pattern=r"^(https?://\S+)?$")] = ""

    @field_validator("regions", "zones", mode="before")
    @classmethod
    def _one(cls, told: object) -> object:
        return (told,) if isinstance(told, str) else told

    @field_validator("subnet")
    @classmethod
    def _subnet(cls, text: str) -> str:
        network = IPv4Network(text)
        if not 16 <= network.prefixlen <= 29:
            raise ValueError("the range of a network at OCI is from /16 to /29")
        return str(network)

    @field_validator("ssh_from")
    @classmethod
    def _ranges(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(IPv4Network(text)) for text in texts)
