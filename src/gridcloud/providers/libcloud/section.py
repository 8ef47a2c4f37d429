"""The settings of EC2, and of any other cloud that Libcloud knows."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gridcloud.providers.cloud.section import CloudSection

_Text = Annotated[str, Field(max_length=255)]
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class EC2Section(CloudSection):
    """Which account at EC2, and what of it may be used.

    Credentials are where the users of AWS have them: the ``AWS_*`` variables, else ``profile`` in
    `~/.aws/credentials` and `~/.aws/config`. ``network`` is empty to have one made for this site
    while it has machines there, ``default`` for the account's own, or the id of a VPC or a subnet;
    ``subnet`` is the range of one that is made. ``endpoint`` is that of another cloud with this
    API. ``prices`` are per hour, by patterns of instance types, where Libcloud's tables are wrong.
    """

    profile: _Text = ""
    regions: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    zones: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    image: Annotated[str, Field(max_length=512)] = "debian/debian-12-a*"
    types: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=200)] = ("*",)
    spot: bool = True
    prices: dict[_Text, _Price] = {}
    network: Annotated[str, Field(pattern=r"^(default|vpc-[0-9a-f]+|subnet-[0-9a-f]+)?$")] = ""
    subnet: str = "10.83.0.0/16"
    security_groups: Annotated[tuple[_Text, ...], Field(max_length=5)] = ()
    ssh_from: Annotated[tuple[str, ...], Field(max_length=50)] = ("0.0.0.0/0",)
    address: Literal["public", "private"] = "public"
    volume_type: Annotated[str, Field(pattern=r"^[a-z0-9]{2,16}$")] = "gp3"
    endpoint: Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$")] = ""

    @field_validator("subnet")
    @classmethod
    def _subnet(cls, text: str) -> str:
        network = IPv4Network(text)
        if not 16 <= network.prefixlen <= 24:
            raise ValueError("the range of a VPC that is cut for zones is from /16 to /24")
        return str(network)

    @field_validator("ssh_from")
    @classmethod
    def _ranges(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(text)) for text in texts)


class LibcloudSection(CloudSection):
    """Which of Libcloud's drivers, and what it is made with.

    ``arguments`` are those of the driver as Libcloud documents them (``region``, ``host``, ...);
    ``secrets`` are such arguments too, each read when it is used from where its value says:
    ``env:NAME`` or ``file:PATH``. ``sizes`` are patterns of the names of sizes. ``ssh_key`` is
    the id of a key at the cloud, for clouds that make no machine without one. ``endpoint`` is
    that of another cloud with the same API.
    """

    driver: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]
    secrets: dict[_Text, Annotated[str, Field(pattern=r"^(env:\w+|file:.+)$")]] = {}
    arguments: dict[_Text, str | bool | int] = {}
    locations: Annotated[tuple[_Text, ...], Field(max_length=64)] = ()
    sizes: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=200)] = ("*",)
    ssh_key: _Text = ""
    currency: Annotated[str, Field(max_length=8)] = "USD"
    endpoint: Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$")] = ""
