"""Machines at Oracle Cloud: made once for each lease, found by their tags, read, removed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any, Literal

from oci.core.models import (
    CaptureConsoleHistoryDetails,
    CreateVnicDetails,
    InstanceOptions,
    InstanceSourceViaImageDetails,
    LaunchInstanceDetails,
    PreemptibleInstanceConfigDetails,
    TerminatePreemptionAction,
    UpdateInstanceDetails,
)

from gridcloud.errors import NotFound, Unavailable
from gridcloud.model.things import Tags
from gridcloud.providers.cloud.clouds import Build, Condition
from gridcloud.providers.oci import shapes
from gridcloud.providers.oci.asking import Region
from gridcloud.providers.oci.errors import code_of, not_understood
from gridcloud.providers.oci.tagging import gone, leaving, of_site

_CONDITIONS = {
    "RUNNING": Condition.RUNNING,
    "STOPPING": Condition.STOPPED,
    "STOPPED": Condition.STOPPED,
}
_MOST_TOKENS = 4
_LOG_BYTES, _LOG_ASKED_BYTES = 64 * 1024, 2**20
_LOG_SECONDS, _LOG_LOOK_SECONDS = 15.0, 0.5


async def of_lease(region: Region, site: str, lease_id: str = "") -> list[tuple[Any, Tags]]:
    """Return all machines of a lease, or of a site, that OCI still shows, the ended ones too; the
    oldest first."""
    found = await region.listed("compute", "list_instances", region.compartment)
    return of_site(found, site, lease_id)


def alive(found: list[tuple[Any, Tags]]) -> list[Any]:
    """Return those that have not ended, and are not about to."""
    return [one for one, _ in found if not leaving(one)]


def there(found: list[tuple[Any, Tags]]) -> list[Any]:
    """Return those that have not ended."""
    return [one for one, _ in found if not gone(one)]


def condition(found: Any) -> Condition:
    """Return how a machine is."""
    return _CONDITIONS.get(str(found.lifecycle_state), Condition.BUILDING)


async def create(region: Region, build: Build, spent: set[str], *, public: bool) -> str:
    """Make a machine, unless the lease has one; return its id.

    A token that was used for a machine that has ended gives that one again, or is refused as
    *spent*; so those that ended, and whether it was spent, are part of the token.
    """
    site, lease_id = build.tags.site, build.tags.lease
    found = await of_lease(region, site, lease_id)
    if live := alive(found):
        return str(live[0].id)
    ended = {str(one.id) for one, _ in found}
    details = await _details(region, build, public=public)
    for _ in range(_MOST_TOKENS):
        token = _token(build.token, ended | spent)
        made = await _launched(region, build, details, token, spent)
        if not leaving(made):
            break
        ended.add(str(made.id))
    else:
        raise Unavailable("OCI only gives machines that have ended.", hint="It is tried again.")
    kept, *others = alive(await of_lease(region, site, lease_id)) or [made]
    await remove(region, others)
    return str(kept.id)


async def remove(region: Region, found: list[Any]) -> None:
    """Begin to end machines, with the disks that they booted from."""
    for one in found:
        await region.delete("compute", "terminate_instance", one.id, preserve_boot_volume=False)


async def address(region: Region, machine: Any, which: Literal["public", "private"]) -> str:
    """Return the address of a machine; empty while it has none."""
    attached = await region.listed(
        "compute", "list_vnic_attachments", region.compartment, instance_id=machine.id
    )
    for one in attached:
        if str(one.lifecycle_state) != "ATTACHED" or not one.vnic_id:
            continue
        try:
            vnic = await region.ask("network", "get_vnic", one.vnic_id)
        except NotFound:
            continue
        if vnic.is_primary or len(attached) == 1:
            return str((vnic.public_ip if which == "public" else vnic.private_ip) or "")
    return ""


async def note_end(region: Region, found: list[Any], tags: Tags) -> None:
    """Write a new end into the tags of machines."""
    for one in found:
        told = {**(one.freeform_tags or {}), **tags.written()}
        await region.ask(
            "compute", "update_instance", one.id, UpdateInstanceDetails(freeform_tags=told)
        )


async def boot_log(region: Region, machine: Any, tags: Tags) -> str:
    """Return the end of a machine's console, which OCI has to copy first; empty without one."""
    details = CaptureConsoleHistoryDetails(
        instance_id=machine.id, display_name="gridcloud", freeform_tags=tags.written()
    )
    history = await region.ask("compute", "capture_console_history", details)
    try:
        until = asyncio.get_running_loop().time() + _LOG_SECONDS
        while str(history.lifecycle_state) in {"REQUESTED", "GETTING-HISTORY"}:
            if asyncio.get_running_loop().time() > until:
                return ""
            await asyncio.sleep(_LOG_LOOK_SECONDS)
            history = await region.ask("compute", "get_console_history", history.id)
        if str(history.lifecycle_state) != "SUCCEEDED":
            return ""
        text = await region.ask(
            "compute", "get_console_history_content", history.id, length=_LOG_ASKED_BYTES
        )
        written = text if isinstance(text, bytes) else str(text).encode()
        return written[-_LOG_BYTES:].decode(errors="ignore")
    finally:
        await region.delete("compute", "delete_console_history", history.id)


async def _details(region: Region, build: Build, *, public: bool) -> LaunchInstanceDetails:
    subnet, _, groups = build.network.partition("/")
    told = await shapes.told_of(region, build.shape) if build.shape.flexible else None
    spot = TerminatePreemptionAction(preserve_boot_volume=False)
    return LaunchInstanceDetails(
        availability_domain=build.place.partition("/")[2],
        compartment_id=region.compartment,
        display_name=build.name,
        shape=build.shape.name,
        shape_config=shapes.configured(build.shape, told, build.resources),
        source_details=InstanceSourceViaImageDetails(image_id=build.image.id),
        create_vnic_details=CreateVnicDetails(
            subnet_id=subnet,
            assign_public_ip=public,
            nsg_ids=groups.split(","),
            freeform_tags=build.tags.written(),
        ),
        instance_options=InstanceOptions(are_legacy_imds_endpoints_disabled=True),
        metadata={"user_data": base64.b64encode(build.user_data).decode()},
        freeform_tags=build.tags.written(),
        preemptible_instance_config=PreemptibleInstanceConfigDetails(preemption_action=spot)
        if build.spot
        else None,
    )


async def _launched(
    region: Region, build: Build, details: LaunchInstanceDetails, token: str, spent: set[str]
) -> Any:
    try:
        made = await region.ask("compute", "launch_instance", details, opc_retry_token=token)
    except Unavailable as error:
        if code_of(error) == "InvalidatedRetryToken":
            # What it made has gone, or was changed since; that one is looked for first.
            spent.add(token)
        raise
    except NotFound as error:
        # OCI does not say what is missing; the network may have gone with its last machine.
        if not await _network_there(region, build.network):
            raise Unavailable(
                "The network of the machine is gone.", hint="It is prepared again."
            ) from error
        raise
    if made is None or not isinstance(made.id, str):
        raise not_understood("make a machine")
    return made


async def _network_there(region: Region, network: str) -> bool:
    subnet, _, groups = network.partition("/")
    try:
        found = await asyncio.gather(
            region.ask("network", "get_subnet", subnet),
            *(region.ask("network", "get_network_security_group", g) for g in groups.split(",")),
        )
    except NotFound:
        return False
    return not any(leaving(one) for one in found)


def _token(token: str, ended: set[str]) -> str:
    if not ended:
        return token
    return f"{token}-{hashlib.sha256(' '.join(sorted(ended)).encode()).hexdigest()[:8]}"
