"""What the emulated Oracle Cloud of `oci_server` does for each request, and refuses to do."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

from testbeds.oci_catalogue import DOMAINS, IMAGES, ONLY_IN, SHAPES, TENANCY, X86
from testbeds.oci_state import Asked, Refusal, State, in_use, missing

_METADATA_BYTES = 32_000


def _listing(kind: str) -> Callable[[State, Asked], list[dict[str, Any]]]:
    def handle(state: State, asked: Asked) -> list[dict[str, Any]]:
        found = state.listed(kind, asked.region, asked.compartment)
        for name, value in asked.query.items():
            if name in {"instanceId", "volumeId", "vcnId", "lifecycleState"}:
                found = [one for one in found if one.get(name) == value]
        if kind not in {"instance", "volumeattachment"}:
            found = [one for one in found if one["lifecycleState"] != "TERMINATED"]
        return found

    return handle


def _getting(kind: str) -> Callable[[State, Asked], dict[str, Any]]:
    return lambda state, asked: state.there(asked.id, kind)


def _list_shapes(state: State, asked: Asked) -> list[dict[str, Any]]:
    domain, name = asked.query.get("availabilityDomain", ""), asked.query.get("shape", "")
    if domain and domain not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "there is no such availability domain")
    assert asked.compartment
    return [
        one
        for one in SHAPES.values()
        if name in {"", one["shape"]}
        and (not domain or domain in ONLY_IN.get(one["shape"], DOMAINS))
    ]


def _list_domains(state: State, asked: Asked) -> list[dict[str, Any]]:
    return [
        {"id": f"ocid1.availabilitydomain.oc1..{n}", "name": name, "compartmentId": TENANCY}
        for n, name in enumerate(DOMAINS)
    ]


def _boots(image: dict[str, Any], shape: str) -> bool:
    return ("aarch64" in image["displayName"]) == (shape not in X86)


def _list_images(state: State, asked: Asked) -> list[dict[str, Any]]:
    shape = asked.query.get("shape", "")
    return [
        one
        for one in IMAGES.values()
        if one["compartmentId"] in {None, asked.compartment} and (not shape or _boots(one, shape))
    ]


def _get_image(state: State, asked: Asked) -> dict[str, Any]:
    found = [one for one in IMAGES.values() if one["id"] == asked.id]
    if not found:
        raise missing()
    return found[0]


def _image_shapes(state: State, asked: Asked) -> list[dict[str, Any]]:
    image = _get_image(state, asked)
    return [{"imageId": image["id"], "shape": name} for name in SHAPES if _boots(image, name)]


def _launch(state: State, asked: Asked) -> dict[str, Any]:
    told = asked.told
    domain, shape = told["availabilityDomain"], SHAPES.get(str(told.get("shape")))
    if shape is None or domain not in ONLY_IN.get(shape["shape"], DOMAINS):
        raise missing()
    source = told.get("sourceDetails") or {}
    image = _get_image(state, Asked(asked.region, {}, {}, (str(source.get("imageId")),)))
    if not _boots(image, shape["shape"]):
        raise Refusal(400, "InvalidParameter", "The image does not boot on this shape.")
    metadata = told.get("metadata") or {}
    if sum(len(key) + len(value) for key, value in metadata.items()) > _METADATA_BYTES:
        raise Refusal(400, "InvalidParameter", "The metadata is over 32000 bytes.")
    base64.b64decode(metadata.get("user_data", ""), validate=True)
    vnic = told.get("createVnicDetails") or {}
    subnet = state.living(vnic.get("subnetId"), "subnet")
    for group in vnic.get("nsgIds") or []:
        if state.living(group, "networksecuritygroup")["vcnId"] != subnet["vcnId"]:
            raise Refusal(400, "InvalidParameter", "A group is of another VCN.")
    if vnic.get("assignPublicIp") and subnet.get("prohibitPublicIpOnVnic"):
        raise Refusal(400, "InvalidParameter", "The subnet has no public addresses.")
    if told.get("preemptibleInstanceConfig") and shape["shape"].startswith("BM."):
        raise Refusal(400, "InvalidParameter", "Bare metal is not preemptible.")
    ocpus = _size(shape, told.get("shapeConfig"))
    limit = next((name for name in shape["quotaNames"] if name in state.limits), "")
    if limit.endswith("core-count") and ocpus > _available(state, limit):
        raise Refusal(400, "LimitExceeded", f"The following service limits were exceeded: {limit}.")
    return state.add(
        "instance",
        asked.region,
        "PROVISIONING",
        "RUNNING",
        availabilityDomain=domain,
        compartmentId=told["compartmentId"],
        displayName=told.get("displayName"),
        freeformTags=told.get("freeformTags") or {},
        imageId=image["id"],
        metadata=metadata,
        region=asked.region,
        shape=shape["shape"],
        _asked=told,
        _ocpus=ocpus,
    )


def _size(shape: dict[str, Any], told: dict[str, Any] | None) -> float:
    if not shape["isFlexible"]:
        if told:
            raise Refusal(400, "InvalidParameter", "The shape is not flexible.")
        return float(shape["ocpus"])
    if not told or not told.get("ocpus") or not told.get("memoryInGBs"):
        raise Refusal(400, "InvalidParameter", "A flexible shape needs ocpus and memoryInGBs.")
    ocpus, memory = told["ocpus"], told["memoryInGBs"]
    cores, room = shape["ocpuOptions"], shape["memoryOptions"]
    fits = (
        cores["min"] <= ocpus <= cores["max"]
        and ocpus == int(ocpus)
        and room["minInGBs"] <= memory <= room["maxInGBs"]
        and room["minPerOcpuInGBs"] * ocpus <= memory <= room["maxPerOcpuInGBs"] * ocpus
    )
    if not fits:
        raise Refusal(400, "InvalidParameter", f"{ocpus} OCPUs with {memory} GB is out of bounds.")
    return float(ocpus)


def _available(state: State, limit: str) -> int:
    used = sum(
        one["_ocpus"]
        for one in state.listed("instance")
        if one["lifecycleState"] != "TERMINATED" and limit in SHAPES[one["shape"]]["quotaNames"]
    )
    return max(0, int(state.limits[limit] - (used if limit.endswith("core-count") else 0)))


def _terminate(state: State, asked: Asked) -> None:
    one = state.there(asked.id, "instance")
    if asked.query.get("preserveBootVolume") != "false":
        raise Refusal(400, "InvalidParameter", "the testbed wants its boot volumes removed")
    if one["lifecycleState"] not in {"TERMINATING", "TERMINATED"}:
        state.move(one, "TERMINATING", "TERMINATED")
        for other in state.listed("volumeattachment"):
            if other["instanceId"] == one["id"]:
                state.move(other, "DETACHING", "DETACHED")


def _update_instance(state: State, asked: Asked) -> dict[str, Any]:
    one = state.living(asked.id, "instance")
    one["freeformTags"] = asked.told.get("freeformTags", one["freeformTags"])
    return one


def _create_vcn(state: State, asked: Asked) -> dict[str, Any]:
    told = asked.told
    blocks = told.get("cidrBlocks") or []
    for block in blocks:
        if not 16 <= IPv4Network(block).prefixlen <= 30:
            raise Refusal(400, "InvalidParameter", "The range is of a wrong size.")
    one = _plain(state, asked, "vcn", cidrBlock=blocks[0], cidrBlocks=blocks)
    rule = {"protocol": "6", "source": "0.0.0.0/0", "sourceType": "CIDR_BLOCK"}
    rules = state.add(
        "securitylist",
        asked.region,
        "AVAILABLE",
        "",
        compartmentId=told["compartmentId"],
        displayName="Default Security List",
        vcnId=one["id"],
        ingressSecurityRules=[rule],
        egressSecurityRules=[{"protocol": "all", "destination": "0.0.0.0/0"}],
    )
    one["defaultSecurityListId"] = rules["id"]
    return one


def _plain(state: State, asked: Asked, kind: str, **more: Any) -> dict[str, Any]:
    told = asked.told
    return state.add(
        kind,
        asked.region,
        "PROVISIONING",
        "AVAILABLE",
        compartmentId=told["compartmentId"],
        displayName=told.get("displayName"),
        freeformTags=told.get("freeformTags") or {},
        **more,
    )


def _create_gateway(state: State, asked: Asked) -> dict[str, Any]:
    vcn = state.living(asked.told["vcnId"], "vcn")
    if any(one["vcnId"] == vcn["id"] for one in state.of("internetgateway")):
        raise Refusal(400, "LimitExceeded", "A VCN has one internet gateway.")
    return _plain(state, asked, "internetgateway", vcnId=vcn["id"], isEnabled=True)


def _create_table(state: State, asked: Asked) -> dict[str, Any]:
    vcn = state.living(asked.told["vcnId"], "vcn")
    for rule in asked.told["routeRules"]:
        state.living(rule["networkEntityId"], "internetgateway")
        if not rule.get("destination") or rule.get("destinationType") != "CIDR_BLOCK":
            raise Refusal(400, "InvalidParameter", "A route needs a destination and its type.")
    rules = asked.told["routeRules"]
    return _plain(state, asked, "routetable", vcnId=vcn["id"], routeRules=rules)


def _create_subnet(state: State, asked: Asked) -> dict[str, Any]:
    told = asked.told
    vcn = state.living(told["vcnId"], "vcn")
    table = state.living(told["routeTableId"], "routetable")
    network = IPv4Network(told["cidrBlock"])
    if not network.subnet_of(IPv4Network(vcn["cidrBlock"])):
        raise Refusal(400, "InvalidParameter", "The range is outside that of the VCN.")
    if any(
        one["vcnId"] == vcn["id"] and IPv4Network(one["cidrBlock"]).overlaps(network)
        for one in state.of("subnet")
    ):
        raise Refusal(400, "InvalidParameter", "The range overlaps that of another subnet.")
    return _plain(
        state,
        asked,
        "subnet",
        vcnId=vcn["id"],
        cidrBlock=told["cidrBlock"],
        routeTableId=table["id"],
        prohibitPublicIpOnVnic=bool(told.get("prohibitPublicIpOnVnic")),
        virtualRouterIp=str(network[1]),
        virtualRouterMac="00:00:17:00:00:01",
    )


def _create_group(state: State, asked: Asked) -> dict[str, Any]:
    vcn = state.living(asked.told["vcnId"], "vcn")
    return _plain(state, asked, "networksecuritygroup", vcnId=vcn["id"], _rules=[])


def _add_rules(state: State, asked: Asked) -> dict[str, Any]:
    group = state.living(asked.id, "networksecuritygroup")
    for rule in asked.told.get("securityRules") or []:
        side = "source" if rule["direction"] == "INGRESS" else "destination"
        if not rule.get(side) or rule.get(f"{side}Type") != "CIDR_BLOCK":
            raise Refusal(400, "InvalidParameter", f"A rule needs {side} and its type.")
        group["_rules"].append({**rule, "id": uuid.uuid4().hex[:6].upper()})
    return {"securityRules": group["_rules"]}


def _list_rules(state: State, asked: Asked) -> list[dict[str, Any]]:
    return list(state.there(asked.id, "networksecuritygroup")["_rules"])


def _update_list(state: State, asked: Asked) -> dict[str, Any]:
    one = state.living(asked.id, "securitylist")
    one.update(asked.told)
    return one


def _deleting(kind: str) -> Callable[[State, Asked], None]:
    def handle(state: State, asked: Asked) -> None:
        one = state.there(asked.id, kind)
        if one["lifecycleState"] == "TERMINATING":
            raise Refusal(409, "IncorrectState", f"The {kind} is being removed.")
        if _used(state, one):
            raise in_use(kind)
        state.move(one, "TERMINATING", "TERMINATED")

    return handle


def _used(state: State, one: dict[str, Any]) -> bool:
    """Tell whether OCI would refuse to remove something, since something else is in it."""
    machines = [
        (m["_asked"].get("createVnicDetails") or {}) for m in state.machines() if m["_asked"]
    ]
    match one["_kind"]:
        case "subnet":
            return any(vnic.get("subnetId") == one["id"] for vnic in machines)
        case "networksecuritygroup":
            return any(one["id"] in (vnic.get("nsgIds") or []) for vnic in machines)
        case "routetable":
            return any(other["routeTableId"] == one["id"] for other in state.of("subnet"))
        case "internetgateway":
            routes = [rule for table in state.of("routetable") for rule in table["routeRules"]]
            return any(rule["networkEntityId"] == one["id"] for rule in routes)
        case "vcn":
            kinds = ("subnet", "routetable", "internetgateway", "networksecuritygroup")
            return any(other["vcnId"] == one["id"] for kind in kinds for other in state.of(kind))
        case "volume":
            return any(
                other["volumeId"] == one["id"] and other["lifecycleState"] != "DETACHED"
                for other in state.listed("volumeattachment")
            )
    return False


def _create_volume(state: State, asked: Asked) -> dict[str, Any]:
    told = asked.told
    if not 50 <= (told.get("sizeInGBs") or 0) <= 32768:
        raise Refusal(400, "InvalidParameter", "A volume has from 50 to 32768 GB.")
    if told.get("availabilityDomain") not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "there is no such availability domain")
    size = told["sizeInGBs"]
    return _plain(
        state,
        asked,
        "volume",
        availabilityDomain=told["availabilityDomain"],
        sizeInGBs=size,
        sizeInMBs=size * 1024,
    )


def _attach(state: State, asked: Asked) -> dict[str, Any]:
    told = asked.told
    machine = state.living(told["instanceId"], "instance")
    volume = state.living(told["volumeId"], "volume")
    if told["type"] != "paravirtualized":
        raise Refusal(400, "InvalidParameter", "the testbed knows paravirtualized ones alone")
    if machine["lifecycleState"] != "RUNNING":
        raise Refusal(409, "IncorrectState", "The machine does not run.")
    if machine["availabilityDomain"] != volume["availabilityDomain"]:
        raise Refusal(400, "InvalidParameter", "They are in different availability domains.")
    if _used(state, volume):
        raise Refusal(409, "Conflict", "The volume is attached already.")
    return state.add(
        "volumeattachment",
        asked.region,
        "ATTACHING",
        "ATTACHED",
        attachmentType="paravirtualized",
        availabilityDomain=volume["availabilityDomain"],
        compartmentId=volume["compartmentId"],
        device=told.get("device"),
        instanceId=machine["id"],
        volumeId=volume["id"],
    )


def _list_devices(state: State, asked: Asked) -> list[dict[str, Any]]:
    state.there(asked.id, "instance")
    taken = {
        one["device"] for one in state.listed("volumeattachment") if one["instanceId"] == asked.id
    }
    names = [f"/dev/oracleoci/oraclevd{letter}" for letter in "bcdef"]
    return [{"name": name, "isAvailable": True} for name in names if name not in taken]


def _capture(state: State, asked: Asked) -> dict[str, Any]:
    machine = state.living(asked.told["instanceId"], "instance")
    return state.add(
        "consolehistory",
        asked.region,
        "REQUESTED",
        "SUCCEEDED",
        availabilityDomain=machine["availabilityDomain"],
        compartmentId=machine["compartmentId"],
        freeformTags=asked.told.get("freeformTags") or {},
        instanceId=machine["id"],
    )


def _content(state: State, asked: Asked) -> str:
    one = state.there(asked.id, "consolehistory")
    if one["lifecycleState"] != "SUCCEEDED":
        raise Refusal(409, "IncorrectState", "The history is not there yet.")
    return state.console[: int(asked.query.get("length", 10240))]


def _delete_history(state: State, asked: Asked) -> None:
    del state.things[state.there(asked.id, "consolehistory")["id"]]


def _list_limits(state: State, asked: Asked) -> list[dict[str, Any]]:
    if asked.compartment != TENANCY or asked.query.get("serviceName") != "compute":
        raise Refusal(400, "InvalidParameter", "limits are of the tenancy's compute")
    return [
        {"name": name, "scopeType": "AD", "availabilityDomain": domain, "value": value}
        for name, value in state.limits.items()
        for domain in DOMAINS
    ]


def _limit_left(state: State, asked: Asked) -> dict[str, Any]:
    if asked.query.get("availabilityDomain") not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "the limit is of an availability domain")
    left = _available(state, asked.id)
    return {"used": state.limits[asked.id] - left, "available": left}


_ID = r"([\w.-]+)"
#: Method, path, the model of the body, that of the answer, and what is done.
ROUTES: list[tuple[str, str, str, str, Callable[[State, Asked], Any]]] = [
    ("GET", "availabilityDomains/?", "", "AvailabilityDomain", _list_domains),
    ("GET", "shapes", "", "Shape", _list_shapes),
    ("GET", "images", "", "Image", _list_images),
    ("GET", f"images/{_ID}", "", "Image", _get_image),
    ("GET", f"images/{_ID}/shapes", "", "ImageShapeCompatibilitySummary", _image_shapes),
    ("GET", "instances", "", "Instance", _listing("instance")),
    ("POST", "instances", "LaunchInstanceDetails", "Instance", _launch),
    ("PUT", f"instances/{_ID}", "UpdateInstanceDetails", "Instance", _update_instance),
    ("DELETE", f"instances/{_ID}", "", "", _terminate),
    ("GET", f"instances/{_ID}/devices", "", "Device", _list_devices),
    ("GET", "vnicAttachments", "", "VnicAttachment", _listing("vnicattachment")),
    ("GET", f"vnics/{_ID}", "", "Vnic", _getting("vnic")),
    ("GET", "vcns", "", "Vcn", _listing("vcn")),
    ("POST", "vcns", "CreateVcnDetails", "Vcn", _create_vcn),
    ("DELETE", f"vcns/{_ID}", "", "", _deleting("vcn")),
    ("GET", f"securityLists/{_ID}", "", "SecurityList", _getting("securitylist")),
    ("PUT", f"securityLists/{_ID}", "UpdateSecurityListDetails", "SecurityList", _update_list),
    ("GET", "internetGateways", "", "InternetGateway", _listing("internetgateway")),
    (
        "POST",
        "internetGateways",
        "CreateInternetGatewayDetails",
        "InternetGateway",
        _create_gateway,
    ),
    ("DELETE", f"internetGateways/{_ID}", "", "", _deleting("internetgateway")),
    ("GET", "routeTables", "", "RouteTable", _listing("routetable")),
    ("POST", "routeTables", "CreateRouteTableDetails", "RouteTable", _create_table),
    ("DELETE", f"routeTables/{_ID}", "", "", _deleting("routetable")),
    ("GET", "subnets", "", "Subnet", _listing("subnet")),
    ("GET", f"subnets/{_ID}", "", "Subnet", _getting("subnet")),
    ("POST", "subnets", "CreateSubnetDetails", "Subnet", _create_subnet),
    ("DELETE", f"subnets/{_ID}", "", "", _deleting("subnet")),
    ("GET", "networkSecurityGroups", "", "NetworkSecurityGroup", _listing("networksecuritygroup")),
    (
        "GET",
        f"networkSecurityGroups/{_ID}",
        "",
        "NetworkSecurityGroup",
        _getting("networksecuritygroup"),
    ),
    (
        "POST",
        "networkSecurityGroups",
        "CreateNetworkSecurityGroupDetails",
        "NetworkSecurityGroup",
        _create_group,
    ),
    ("GET", f"networkSecurityGroups/{_ID}/securityRules", "", "SecurityRule", _list_rules),
    (
        "POST",
        f"networkSecurityGroups/{_ID}/actions/addSecurityRules",
        "AddNetworkSecurityGroupSecurityRulesDetails",
        "AddedNetworkSecurityGroupSecurityRules",
        _add_rules,
    ),
    ("DELETE", f"networkSecurityGroups/{_ID}", "", "", _deleting("networksecuritygroup")),
    ("GET", "volumes", "", "Volume", _listing("volume")),
    ("GET", f"volumes/{_ID}", "", "Volume", _getting("volume")),
    ("POST", "volumes", "CreateVolumeDetails", "Volume", _create_volume),
    ("DELETE", f"volumes/{_ID}", "", "", _deleting("volume")),
    ("GET", "volumeAttachments", "", "VolumeAttachment", _listing("volumeattachment")),
    ("POST", "volumeAttachments", "AttachVolumeDetails", "VolumeAttachment", _attach),
    ("GET", "instanceConsoleHistories", "", "ConsoleHistory", _listing("consolehistory")),
    (
        "POST",
        "instanceConsoleHistories",
        "CaptureConsoleHistoryDetails",
        "ConsoleHistory",
        _capture,
    ),
    ("GET", f"instanceConsoleHistories/{_ID}", "", "ConsoleHistory", _getting("consolehistory")),
    ("GET", f"instanceConsoleHistories/{_ID}/data", "", "", _content),
    ("DELETE", f"instanceConsoleHistories/{_ID}", "", "", _delete_history),
    ("GET", "limitValues", "", "LimitValueSummary", _list_limits),
    (
        "GET",
        f"services/compute/limits/{_ID}/resourceAvailability",
        "",
        "ResourceAvailability",
        _limit_left,
    ),
]
