"""Machines at EC2: made once for each lease, found by their tags, read, removed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.model.things import ENDS_TAG, MACHINE, Tags, Thing
from gridcloud.providers.cloud.clouds import Build, Condition, Server
from gridcloud.providers.libcloud.asking import Json, Region, items
from gridcloud.providers.libcloud.errors import as_needed, code_of, not_understood
from gridcloud.providers.libcloud.images import disk_gib
from gridcloud.providers.libcloud.tagging import carrying, of, specified

_CONDITIONS = {
    "pending": Condition.BUILDING,
    "running": Condition.RUNNING,
    "stopping": Condition.STOPPED,
    "stopped": Condition.STOPPED,
}
_LEAVING, _GONE = "shutting-down", "terminated"
#: Ends that somebody wanted: of us, or of the machine by its own switch.
_WANTED = "Client.UserInitiated", "Client.InstanceInitiated"
_MOST_TOKENS = 4
_LOG_BYTES = 64 * 1024


async def of_lease(region: Region, site: str, lease_id: str) -> list[Json]:
    """Return all machines of a lease that EC2 still shows, the ended ones too, in an order that is
    always the same: the oldest first."""
    found = await _listed(region, site, lease_id)
    return sorted(found, key=lambda one: (str(one.get("launchTime")), str(one["instanceId"])))


def alive(found: list[Json]) -> list[Json]:
    """Return those that have not ended, and are not about to."""
    return [one for one in found if state(one) in _CONDITIONS]


def there(found: list[Json]) -> list[Json]:
    """Return those that have not ended."""
    return [one for one in found if state(one) != _GONE]


def state(found: Mapping[str, Any]) -> str:
    """Return the state of a machine in EC2's words."""
    told = found.get("instanceState")
    return str(told.get("name")) if isinstance(told, dict) else ""


async def of_site(region: Region, site: str) -> list[tuple[Json, Tags]]:
    """Return all machines of a site that have not ended."""
    found = there(await _listed(region, site))
    return [(one, tags) for one in found if (tags := of(one)) and tags.site == site]


def thing(found: Json, tags: Tags) -> Thing:
    """Return a machine as a thing."""
    return Thing(kind=MACHINE, id=str(found["instanceId"]), tags=tags)


async def create(region: Region, build: Build, image: Json, *, public: bool) -> str:
    """Make a machine, unless the lease has one; return its id. ``image`` is as EC2 tells it.

    A token that was used for a machine that has ended gives that one again, so those that ended
    are part of the token. Another cloud with this API may not know tokens: of two that were made
    at once all but the first are removed.
    """
    site, lease_id = build.tags.site, build.tags.lease
    found = await of_lease(region, site, lease_id)
    if live := alive(found):
        return str(live[0]["instanceId"])
    ended = {str(one["instanceId"]) for one in found}
    for _ in range(_MOST_TOKENS):
        made = await _run(region, build, _token(build.token, ended), image, public=public)
        if state(made) not in {_LEAVING, _GONE}:
            break
        ended.add(str(made["instanceId"]))
    else:
        raise Unavailable("EC2 only gives machines that have ended.", hint="It is tried again.")
    kept, *others = alive(await of_lease(region, site, lease_id)) or [made]
    await _terminate(region, others)
    return str(kept["instanceId"])


async def remove(region: Region, found: list[Json]) -> None:
    """Begin to end machines."""
    await _terminate(region, alive(found))


async def boot_log(region: Region, machine: str) -> str:
    """Return the end of a machine's console; empty where there is none."""
    try:
        answer = await region.ask("GetConsoleOutput", InstanceId=machine, Latest=True)
    except InvalidSpec:
        # Types on Xen show what there was some minutes ago, and know no `Latest`.
        answer = await region.ask("GetConsoleOutput", InstanceId=machine)
    except (NotFound, Conflict):
        return ""
    try:
        text = base64.b64decode(str(answer.get("output") or ""))
    except ValueError as error:
        raise not_understood("the console of a machine") from error
    return text[-_LOG_BYTES:].decode(errors="ignore")


async def note_end(region: Region, found: list[Json], tags: Tags) -> None:
    """Write a new end into the tags of machines."""
    if found:
        tag = {"Key": ENDS_TAG, "Value": tags.written()[ENDS_TAG]}
        ids = [str(one["instanceId"]) for one in found]
        await region.ask("CreateTags", ResourceId=ids, Tag=[tag])


def read(found: Mapping[str, Any], address: Literal["public", "private"]) -> Server:
    """Return how EC2 shows a machine."""
    told = found.get("ipAddress" if address == "public" else "privateIpAddress")
    return Server(
        id=str(found.get("instanceId")),
        condition=_CONDITIONS.get(state(found), Condition.BUILDING),
        address=str(told or ""),
    )


def failure(found: Mapping[str, Any]) -> Server | None:
    """Return a machine that EC2 ended by itself, with why; None for others that ended."""
    reason = found.get("stateReason")
    code = str(reason.get("code") or "") if isinstance(reason, dict) else ""
    if state(found) not in {_LEAVING, _GONE} or not code or code.startswith(_WANTED):
        return None
    message = str(reason.get("message") or code) if isinstance(reason, dict) else code
    return Server(id=str(found.get("instanceId")), condition=Condition.FAILED, reason=message)


async def _run(region: Region, build: Build, token: str, image: Json, *, public: bool) -> Json:
    subnet, _, groups = build.network.partition("/")
    kinds = ["instance", "volume", "network-interface"]
    wanted: Json = {
        "ImageId": build.image.id,
        "InstanceType": build.shape.name,
        "MinCount": 1,
        "MaxCount": 1,
        "ClientToken": token,
        "UserData": base64.b64encode(build.user_data).decode(),
        # It powers itself off at its end, and is deleted by that.
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "NetworkInterface": [
            {
                "DeviceIndex": 0,
                "SubnetId": subnet,
                "SecurityGroupId": groups.split(","),
                "AssociatePublicIpAddress": public,
                "DeleteOnTermination": True,
            }
        ],
    }
    if size := disk_gib(image):
        # An image may say that its disk is to be kept.
        ebs = {"DeleteOnTermination": True, "VolumeSize": size}
        root = {"DeviceName": image["rootDeviceName"], "Ebs": ebs}
        wanted["BlockDeviceMapping"] = [root]
    if build.spot:
        once = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        wanted["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": once}
        kinds.append("spot-instances-request")
    wanted["TagSpecification"] = specified(build.tags, build.name, *kinds)
    try:
        answer = await region.ask("RunInstances", **wanted)
    except GridcloudError as error:
        if code_of(error) == "IdempotentParameterMismatch":
            # An earlier attempt made it, with another end; it is not shown yet.
            raise Unavailable(error.message, hint="It is looked for.") from error
        raise as_needed(error) from error.__cause__
    made = items(answer, "instancesSet")
    if not made or not isinstance(made[0].get("instanceId"), str):
        raise not_understood("make a machine")
    return made[0]


async def _listed(region: Region, site: str, lease_id: str = "") -> list[Json]:
    reservations = await region.listed(
        "DescribeInstances", "reservationSet", Filter=carrying(site, lease_id)
    )
    found = [one for part in reservations for one in items(part, "instancesSet")]
    if any(not isinstance(one.get("instanceId"), str) for one in found):
        raise not_understood("list machines")
    return found


async def _terminate(region: Region, found: list[Json]) -> None:
    for one in found:  # one by one: an unknown id fails the whole call
        await region.delete("TerminateInstances", InstanceId=[str(one["instanceId"])])


def _token(token: str, ended: set[str]) -> str:
    if not ended:
        return token
    return f"{token}-{hashlib.sha256(' '.join(sorted(ended)).encode()).hexdigest()[:8]}"
