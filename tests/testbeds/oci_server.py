"""An emulation of Oracle Cloud on loopback, as strict as Oracle's SDK lets it be.

    with oci_server.running() as oci:
        oci.url, oci.environment       # where it is, and credentials that it takes
        oci.machines(), oci.tagged()   # what is truly there
        oci.refuse("POST instances", 500, "InternalError", "Out of host capacity.")
        oci.reset()                    # nothing was ever made

It is no Oracle Cloud, and starts no machines. What it does: every request has to be signed as OCI
wants it (the signature is verified, and the key's id looked at), bodies and answers are checked by
the SDK's own models (`oci_models`), lists are paged, retry tokens are kept, things live through
their states, the parts of a network cannot be removed while others use them, and limits hold. Every
compartment whose OCID begins with `COMPARTMENT` is there. It is one module, since it is one thing.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import json
import re
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from testbeds.oci_models import problem as wrong_by_model

REGION, OTHER_REGION = "eu-frankfurt-1", "eu-zurich-1"
TENANCY, USER = "ocid1.tenancy.oc1..aaaatenancy", "ocid1.user.oc1..aaaauser"
FINGERPRINT = "20:3b:97:13:55:1c:5b:0d:d3:37:d8:50:4e:c5:3a:34"
COMPARTMENT = "ocid1.compartment.oc1..aaaatest"
DOMAINS = ("xUgd:EU-FRANKFURT-1-AD-1", "xUgd:EU-FRANKFURT-1-AD-2", "xUgd:EU-FRANKFURT-1-AD-3")
_FULL_DOMAIN_ONLY = {"VM.GPU.A10.1": DOMAINS[1:2]}
_METADATA_BYTES = 32_000
_STATE_SECONDS = 0.1
_FORGOTTEN_SECONDS = 30.0
_CLOCK_SECONDS = 300


def _shape(name: str, ocpus: float, memory: float, processor: str, **more: Any) -> dict[str, Any]:
    family = name.split(".")[1].lower() + "-" + name.split(".")[2].lower()
    gpu = "GPU" in name
    quotas = ["gpu-a10-count"] if gpu else [f"{family}-core-count", f"{family}-memory-count"]
    return {
        "shape": name,
        "ocpus": ocpus,
        "memoryInGBs": memory,
        "processorDescription": processor,
        "gpus": 1 if gpu else 0,
        "isFlexible": False,
        "billingType": "PAID",
        "quotaNames": quotas,
        **more,
    }


def _flexible(ocpus: float, memory: float) -> dict[str, Any]:
    return {
        "isFlexible": True,
        "ocpuOptions": {"min": 1.0, "max": ocpus, "maxPerNumaNode": ocpus},
        "memoryOptions": {
            "minInGBs": 1.0,
            "maxInGBs": memory,
            "defaultPerOcpuInGBs": 16.0,
            "minPerOcpuInGBs": 1.0,
            "maxPerOcpuInGBs": 64.0,
        },
    }


SHAPES = {
    one["shape"]: one
    for one in (
        _shape("VM.Standard.E2.1.Micro", 1, 1, "2.0 GHz AMD EPYC 7551", billingType="ALWAYS_FREE"),
        _shape("VM.Standard2.1", 1, 15, "2.0 GHz Intel Xeon Platinum 8167M"),
        _shape("VM.Standard.E4.Flex", 1, 16, "2.55 GHz AMD EPYC 7J13", **_flexible(64, 1024)),
        _shape("VM.Standard.A1.Flex", 1, 6, "3.0 GHz Ampere Altra", **_flexible(80, 512)),
        _shape("VM.GPU.A10.1", 15, 240, "2.6 GHz Intel Xeon Platinum 8358"),
        _shape("BM.Standard.E4.128", 128, 2048, "2.55 GHz AMD EPYC 7J13"),
    )
}
_X86 = {name for name in SHAPES if ".A1." not in name}


def _image(name: str, day: str, system: str, version: str, owner: str | None) -> dict[str, Any]:
    return {
        "id": f"ocid1.image.oc1.eu-frankfurt-1.{hashlib.sha256(name.encode()).hexdigest()[:20]}",
        "compartmentId": owner,
        "createImageAllowed": True,
        "displayName": name,
        "lifecycleState": "AVAILABLE",
        "operatingSystem": system,
        "operatingSystemVersion": version,
        "sizeInMBs": 47694,
        "timeCreated": f"{day}T00:00:00.000Z",
        "freeformTags": {},
    }


_UBUNTU, _ORACLE = "Canonical Ubuntu", "Oracle Linux"
IMAGES = {
    one["displayName"]: one
    for one in (
        _image("Canonical-Ubuntu-24.04-2025.01.31-1", "2025-02-01", _UBUNTU, "24.04", None),
        _image("Canonical-Ubuntu-24.04-2025.06.30-0", "2025-07-01", _UBUNTU, "24.04", None),
        _image("Canonical-Ubuntu-24.04-aarch64-2025.06.30-0", "2025-07-02", _UBUNTU, "24.04", None),
        _image(
            "Canonical-Ubuntu-24.04-Minimal-2025.08.30-0",
            "2025-09-01",
            _UBUNTU,
            "24.04 Minimal",
            None,
        ),
        _image("Oracle-Linux-9.5-2025.05.19-0", "2025-05-20", _ORACLE, "9", None),
        _image("ours-3", "2025-09-02", _ORACLE, "9", COMPARTMENT),
    )
}


class Refusal(Exception):
    """An error that OCI answers with."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def _missing() -> Refusal:
    return Refusal(
        404, "NotAuthorizedOrNotFound", "Authorization failed or requested resource not found."
    )


def _in_use(what: str) -> Refusal:
    return Refusal(409, "Conflict", f"The {what} references other resources, or is used by some.")


class Server:
    """A running one. Its methods tell the truth, past all requests."""

    def __init__(self, folder: Path) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._public = key.public_key()
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        self.key_file = folder / "key.pem"
        self.key_file.write_bytes(private)
        self.key_file.chmod(0o600)
        self.config = folder / "config"
        lines = {
            "user": USER,
            "tenancy": TENANCY,
            "fingerprint": FINGERPRINT,
            "key_file": str(self.key_file),
            "region": REGION,
        }
        text = "\n".join(f"{name}={value}" for name, value in lines.items())
        self.config.write_text(f"[DEFAULT]\n{text}\n")
        self.config.chmod(0o600)
        self._lock = threading.RLock()
        self.url = ""
        self.reset()

    @property
    def environment(self) -> dict[str, str]:
        """What the environment says to use its account."""
        return {"OCI_CLI_CONFIG_FILE": str(self.config)}

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            self._things: dict[str, dict[str, Any]] = {}
            self._tokens: dict[tuple[str, str, str], tuple[str, str]] = {}
            self._refusals: deque[tuple[str, Refusal]] = deque()
            self.page_size = 5
            self.limits = {"standard-e4-core-count": 64, "standard-e4-memory-count": 1024}
            self.console = "cloud-init finished\n"
            self.asked: list[str] = []

    def refuse(
        self, request: str, status: int, code: str, message: str = "no", *, times: int = 1
    ) -> None:
        """Have the next requests refused whose method and path hold the words of ``request``."""
        with self._lock:
            self._refusals.extend([(request, Refusal(status, code, message))] * times)

    def machines(self) -> list[dict[str, Any]]:
        """Return all machines that have not ended, with what was asked for in ``_asked``."""
        with self._lock:
            return [o for o in self._of("instance") if o["lifecycleState"] != "TERMINATED"]

    def preempt(self, machine: str) -> None:
        """Take a machine back, as OCI does with spot capacity."""
        with self._lock:
            self._move(self._things[machine], "TERMINATING", "TERMINATED")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return all things of a kind that are there."""
        with self._lock:
            return [one for one in self._of(kind) if one["lifecycleState"] != "TERMINATED"]

    def tagged(self, site: str = "") -> list[str]:
        """Return the ids of all that is there with a gridcloud tag, of all sites or of one."""
        with self._lock:
            self._age()
            return sorted(
                one["id"]
                for one in self._things.values()
                if one["lifecycleState"] not in {"TERMINATED", "DELETED"}
                and "gridcloud-site" in (tags := one.get("freeformTags") or {})
                and site in {"", tags["gridcloud-site"]}
            )

    # What follows answers requests.

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON (or text) and headers of the answer to a request."""
        try:
            self._verify(method, target, headers, body)
            parts = urlsplit(target)
            _, region, path = parts.path.split("/", 2)
            if region not in {REGION, OTHER_REGION}:
                raise _missing()
            path = re.sub(r"^/?\d{8}/", "", path)
            with self._lock:
                self.asked.append(f"{method} {path}")
                self._age()
                self._refused(f"{method} {path}")
                query = dict(parse_qsl(parts.query))
                return self._routed(method, path, region, query, headers, body)
        except Refusal as error:
            return error.status, {"code": error.code, "message": error.message}, {}

    def _refused(self, asked: str) -> None:
        for one in self._refusals:
            words, refusal = one
            if all(word in asked for word in words.split()):
                self._refusals.remove(one)
                raise refusal

    def _routed(
        self,
        method: str,
        path: str,
        region: str,
        query: dict[str, str],
        headers: dict[str, str],
        body: bytes,
    ) -> tuple[int, Any, dict[str, str]]:
        for verb, pattern, model, result, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if verb != method or not match:
                continue
            told: dict[str, Any] = {}
            if model:
                told = json.loads(body or b"null")
                if wrong := wrong_by_model(model, told):
                    raise Refusal(400, "InvalidParameter", wrong)
            elif body:
                raise Refusal(400, "InvalidParameter", "there is a body")
            self._permit(told.get("compartmentId") or query.get("compartmentId"))
            asked = _Asked(region, query, told, match.groups())
            token = headers.get("opc-retry-token", "")
            found = self._once(token, verb, pattern, asked, body, handler)
            if isinstance(found, list):
                more: dict[str, str] = {}
                found, more = self._page(found, query)
                self._check(result, found)
                return 200, [_public(one) for one in found], more
            if isinstance(found, dict):
                self._check(result, [found])
                return 200, _public(found), {}
            return (204, None, {}) if found is None else (200, found, {})
        raise Refusal(404, "NotFound", f"There is no {method} {path}.")

    def _once(
        self,
        token: str,
        verb: str,
        pattern: str,
        asked: _Asked,
        body: bytes,
        handler: Callable[..., Any],
    ) -> Any:
        if not token or verb != "POST":
            return handler(self, asked)
        key = (asked.region, pattern, token)
        digest = hashlib.sha256(body).hexdigest()
        if key not in self._tokens:
            made = handler(self, asked)
            self._tokens[key] = digest, made["id"]
            return made
        before, identity = self._tokens[key]
        there = self._things.get(identity)
        if before != digest or there is None or there["lifecycleState"] == "TERMINATED":
            raise Refusal(
                409, "InvalidatedRetryToken", "The token was used, and what it made was changed."
            )
        return there

    def _check(self, model: str, found: list[dict[str, Any]]) -> None:
        for one in found:
            if model and (wrong := wrong_by_model(model, _public(one))):
                # Only the platform's images are in no compartment.
                if wrong == "Image lacks compartmentId":
                    continue
                raise AssertionError(f"the testbed answers what is no {model}: {wrong}")

    def _page(
        self, found: list[dict[str, Any]], query: dict[str, str]
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        after = query.get("page", "")
        ordered = sorted(found, key=_order)
        rest = [one for one in ordered if _order(one) > after]
        page = rest[: min(self.page_size, int(query.get("limit", 1000)))]
        return page, {"opc-next-page": _order(page[-1])} if len(rest) > len(page) else {}

    def _permit(self, compartment: str | None) -> None:
        if compartment and compartment != TENANCY and not compartment.startswith(COMPARTMENT):
            raise _missing()

    def _verify(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        told = dict(re.findall(r'(\w+)="([^"]*)"', headers.get("authorization", "")))
        refusal = Refusal(401, "NotAuthenticated", "The required information is missing or wrong.")
        names = told.get("headers", "").split()
        needed = {"date", "(request-target)", "host"}
        if method in {"POST", "PUT"}:
            needed |= {"content-length", "content-type", "x-content-sha256"}
        right = (
            headers.get("authorization", "").startswith("Signature ")
            and told.get("version") == "1"
            and told.get("algorithm") == "rsa-sha256"
            and told.get("keyId") == f"{TENANCY}/{USER}/{FINGERPRINT}"
            and needed <= set(names)
        )
        if not right:
            raise refusal
        if method in {"POST", "PUT"}:
            digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
            if headers.get("x-content-sha256") != digest:
                raise refusal
        at = email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
        if abs(time.time() - at) > _CLOCK_SECONDS:
            raise refusal
        values = {**headers, "(request-target)": f"{method.lower()} {target}"}
        text = "\n".join(f"{name}: {values.get(name, '')}" for name in names)
        try:
            signature = base64.b64decode(told.get("signature", ""))
            self._public.verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
        except (InvalidSignature, ValueError):
            raise refusal from None

    # State.

    def _age(self) -> None:
        now = time.monotonic()
        for identity, one in list(self._things.items()):
            at, state = one["_next"]
            if state and now >= at:
                one["lifecycleState"], one["_next"] = state, (now, "")
                if state == "RUNNING":
                    self._attach_vnic(one)
            gone = one["lifecycleState"] == "TERMINATED"
            if gone and now - one["_next"][0] > one["_forgotten"]:
                del self._things[identity]

    def _move(self, one: dict[str, Any], state: str, following: str) -> None:
        one["lifecycleState"] = state
        one["_next"] = time.monotonic() + _STATE_SECONDS, following

    def _add(
        self, kind: str, region: str, first: str, following: str, /, **told: Any
    ) -> dict[str, Any]:
        one = {
            "id": f"ocid1.{kind}.oc1.{region}.{uuid.uuid4().hex}",
            "timeCreated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "_kind": kind,
            "_region": region,
            "_forgotten": _FORGOTTEN_SECONDS if kind == "instance" else 0.0,
            **told,
        }
        self._things[one["id"]] = one
        self._move(one, first, following)
        return one

    def _of(self, kind: str, region: str = "", compartment: str = "") -> list[dict[str, Any]]:
        self._age()
        return [
            one
            for one in self._things.values()
            if one["_kind"] == kind
            and region in {"", one["_region"]}
            and compartment in {"", one.get("compartmentId")}
        ]

    def _there(self, identity: object, kind: str) -> dict[str, Any]:
        one = self._things.get(str(identity))
        if one is None or one["_kind"] != kind:
            raise _missing()
        return one

    def _living(self, identity: object, kind: str) -> dict[str, Any]:
        one = self._there(identity, kind)
        if one["lifecycleState"] in {"TERMINATING", "TERMINATED"}:
            raise _missing()
        return one

    def _attach_vnic(self, machine: dict[str, Any]) -> None:
        asked = machine["_asked"]["createVnicDetails"]
        number = len(self._tokens) % 250 + 2
        public = f"127.0.0.{number}" if asked.get("assignPublicIp") else None
        vnic = self._add(
            "vnic",
            machine["_region"],
            "AVAILABLE",
            "",
            availabilityDomain=machine["availabilityDomain"],
            compartmentId=machine["compartmentId"],
            isPrimary=True,
            nsgIds=asked.get("nsgIds") or [],
            privateIp=f"10.83.0.{number}",
            publicIp=public,
            subnetId=asked["subnetId"],
        )
        self._add(
            "vnicattachment",
            machine["_region"],
            "ATTACHED",
            "",
            availabilityDomain=machine["availabilityDomain"],
            compartmentId=machine["compartmentId"],
            instanceId=machine["id"],
            subnetId=asked["subnetId"],
            vnicId=vnic["id"],
        )


class _Asked:
    """One request: where, and what of it."""

    def __init__(
        self, region: str, query: dict[str, str], told: dict[str, Any], ids: tuple[str, ...]
    ) -> None:
        self.region, self.query, self.told = region, query, told
        self.id = ids[0] if ids else ""

    @property
    def compartment(self) -> str:
        """The compartment that a list is of, which is required."""
        if "compartmentId" not in self.query:
            raise Refusal(400, "InvalidParameter", "compartmentId is missing")
        return self.query["compartmentId"]


def _order(one: dict[str, Any]) -> str:
    names = (one.get("timeCreated"), one.get("id"), one.get("shape"), one.get("name"))
    return " ".join(str(name) for name in names if name)


def _public(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if not key.startswith("_")}


def _listing(kind: str) -> Callable[[Server, _Asked], list[dict[str, Any]]]:
    def handle(server: Server, asked: _Asked) -> list[dict[str, Any]]:
        found = server._of(kind, asked.region, asked.compartment)
        for name, value in asked.query.items():
            if name in {"instanceId", "volumeId", "vcnId", "lifecycleState"}:
                found = [one for one in found if one.get(name) == value]
        if kind not in {"instance", "volumeattachment"}:
            found = [one for one in found if one["lifecycleState"] != "TERMINATED"]
        return found

    return handle


def _getting(kind: str) -> Callable[[Server, _Asked], dict[str, Any]]:
    return lambda server, asked: server._there(asked.id, kind)


def _list_shapes(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    domain, name = asked.query.get("availabilityDomain", ""), asked.query.get("shape", "")
    if domain and domain not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "there is no such availability domain")
    assert asked.compartment
    return [
        one
        for one in SHAPES.values()
        if name in {"", one["shape"]}
        and (not domain or domain in _FULL_DOMAIN_ONLY.get(one["shape"], DOMAINS))
    ]


def _list_domains(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    return [
        {"id": f"ocid1.availabilitydomain.oc1..{n}", "name": name, "compartmentId": TENANCY}
        for n, name in enumerate(DOMAINS)
    ]


def _boots(image: dict[str, Any], shape: str) -> bool:
    return ("aarch64" in image["displayName"]) == (shape not in _X86)


def _list_images(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    shape = asked.query.get("shape", "")
    return [
        one
        for one in IMAGES.values()
        if one["compartmentId"] in {None, asked.compartment} and (not shape or _boots(one, shape))
    ]


def _get_image(server: Server, asked: _Asked) -> dict[str, Any]:
    found = [one for one in IMAGES.values() if one["id"] == asked.id]
    if not found:
        raise _missing()
    return found[0]


def _image_shapes(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    image = _get_image(server, asked)
    return [{"imageId": image["id"], "shape": name} for name in SHAPES if _boots(image, name)]


def _launch(server: Server, asked: _Asked) -> dict[str, Any]:
    told = asked.told
    domain, shape = told["availabilityDomain"], SHAPES.get(str(told.get("shape")))
    if shape is None or domain not in _FULL_DOMAIN_ONLY.get(shape["shape"], DOMAINS):
        raise _missing()
    source = told.get("sourceDetails") or {}
    image = _get_image(server, _Asked(asked.region, {}, {}, (str(source.get("imageId")),)))
    if not _boots(image, shape["shape"]):
        raise Refusal(400, "InvalidParameter", "The image does not boot on this shape.")
    metadata = told.get("metadata") or {}
    if sum(len(key) + len(value) for key, value in metadata.items()) > _METADATA_BYTES:
        raise Refusal(400, "InvalidParameter", "The metadata is over 32000 bytes.")
    base64.b64decode(metadata.get("user_data", ""), validate=True)
    vnic = told.get("createVnicDetails") or {}
    subnet = server._living(vnic.get("subnetId"), "subnet")
    for group in vnic.get("nsgIds") or []:
        if server._living(group, "networksecuritygroup")["vcnId"] != subnet["vcnId"]:
            raise Refusal(400, "InvalidParameter", "A group is of another VCN.")
    if vnic.get("assignPublicIp") and subnet.get("prohibitPublicIpOnVnic"):
        raise Refusal(400, "InvalidParameter", "The subnet has no public addresses.")
    if told.get("preemptibleInstanceConfig") and shape["shape"].startswith("BM."):
        raise Refusal(400, "InvalidParameter", "Bare metal is not preemptible.")
    ocpus = _size(shape, told.get("shapeConfig"))
    limit = next((name for name in shape["quotaNames"] if name in server.limits), "")
    if limit.endswith("core-count") and ocpus > _available(server, limit):
        raise Refusal(400, "LimitExceeded", f"The following service limits were exceeded: {limit}.")
    return server._add(
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


def _available(server: Server, limit: str) -> int:
    used = sum(
        one["_ocpus"]
        for one in server._of("instance")
        if one["lifecycleState"] != "TERMINATED" and limit in SHAPES[one["shape"]]["quotaNames"]
    )
    return max(0, int(server.limits[limit] - (used if limit.endswith("core-count") else 0)))


def _terminate(server: Server, asked: _Asked) -> None:
    one = server._there(asked.id, "instance")
    if asked.query.get("preserveBootVolume") != "false":
        raise Refusal(400, "InvalidParameter", "the testbed wants its boot volumes removed")
    if one["lifecycleState"] not in {"TERMINATING", "TERMINATED"}:
        server._move(one, "TERMINATING", "TERMINATED")
        for other in server._of("volumeattachment"):
            if other["instanceId"] == one["id"]:
                server._move(other, "DETACHING", "DETACHED")


def _update_instance(server: Server, asked: _Asked) -> dict[str, Any]:
    one = server._living(asked.id, "instance")
    one["freeformTags"] = asked.told.get("freeformTags", one["freeformTags"])
    return one


def _create_vcn(server: Server, asked: _Asked) -> dict[str, Any]:
    told = asked.told
    blocks = told.get("cidrBlocks") or []
    for block in blocks:
        if not 16 <= IPv4Network(block).prefixlen <= 30:
            raise Refusal(400, "InvalidParameter", "The range is of a wrong size.")
    one = _plain(server, asked, "vcn", cidrBlock=blocks[0], cidrBlocks=blocks)
    rule = {"protocol": "6", "source": "0.0.0.0/0", "sourceType": "CIDR_BLOCK"}
    rules = server._add(
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


def _plain(server: Server, asked: _Asked, kind: str, **more: Any) -> dict[str, Any]:
    told = asked.told
    return server._add(
        kind,
        asked.region,
        "PROVISIONING",
        "AVAILABLE",
        compartmentId=told["compartmentId"],
        displayName=told.get("displayName"),
        freeformTags=told.get("freeformTags") or {},
        **more,
    )


def _create_gateway(server: Server, asked: _Asked) -> dict[str, Any]:
    vcn = server._living(asked.told["vcnId"], "vcn")
    if any(one["vcnId"] == vcn["id"] for one in server.of("internetgateway")):
        raise Refusal(400, "LimitExceeded", "A VCN has one internet gateway.")
    return _plain(server, asked, "internetgateway", vcnId=vcn["id"], isEnabled=True)


def _create_table(server: Server, asked: _Asked) -> dict[str, Any]:
    vcn = server._living(asked.told["vcnId"], "vcn")
    for rule in asked.told["routeRules"]:
        server._living(rule["networkEntityId"], "internetgateway")
        if not rule.get("destination") or rule.get("destinationType") != "CIDR_BLOCK":
            raise Refusal(400, "InvalidParameter", "A route needs a destination and its type.")
    rules = asked.told["routeRules"]
    return _plain(server, asked, "routetable", vcnId=vcn["id"], routeRules=rules)


def _create_subnet(server: Server, asked: _Asked) -> dict[str, Any]:
    told = asked.told
    vcn = server._living(told["vcnId"], "vcn")
    table = server._living(told["routeTableId"], "routetable")
    network = IPv4Network(told["cidrBlock"])
    if not network.subnet_of(IPv4Network(vcn["cidrBlock"])):
        raise Refusal(400, "InvalidParameter", "The range is outside that of the VCN.")
    if any(
        one["vcnId"] == vcn["id"] and IPv4Network(one["cidrBlock"]).overlaps(network)
        for one in server.of("subnet")
    ):
        raise Refusal(400, "InvalidParameter", "The range overlaps that of another subnet.")
    return _plain(
        server,
        asked,
        "subnet",
        vcnId=vcn["id"],
        cidrBlock=told["cidrBlock"],
        routeTableId=table["id"],
        prohibitPublicIpOnVnic=bool(told.get("prohibitPublicIpOnVnic")),
        virtualRouterIp=str(network[1]),
        virtualRouterMac="00:00:17:00:00:01",
    )


def _create_group(server: Server, asked: _Asked) -> dict[str, Any]:
    vcn = server._living(asked.told["vcnId"], "vcn")
    return _plain(server, asked, "networksecuritygroup", vcnId=vcn["id"], _rules=[])


def _add_rules(server: Server, asked: _Asked) -> dict[str, Any]:
    group = server._living(asked.id, "networksecuritygroup")
    for rule in asked.told.get("securityRules") or []:
        side = "source" if rule["direction"] == "INGRESS" else "destination"
        if not rule.get(side) or rule.get(f"{side}Type") != "CIDR_BLOCK":
            raise Refusal(400, "InvalidParameter", f"A rule needs {side} and its type.")
        group["_rules"].append({**rule, "id": uuid.uuid4().hex[:6].upper()})
    return {"securityRules": group["_rules"]}


def _list_rules(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    return list(server._there(asked.id, "networksecuritygroup")["_rules"])


def _update_list(server: Server, asked: _Asked) -> dict[str, Any]:
    one = server._living(asked.id, "securitylist")
    one.update(asked.told)
    return one


def _deleting(kind: str) -> Callable[[Server, _Asked], None]:
    def handle(server: Server, asked: _Asked) -> None:
        one = server._there(asked.id, kind)
        if one["lifecycleState"] == "TERMINATING":
            raise Refusal(409, "IncorrectState", f"The {kind} is being removed.")
        if _used(server, one):
            raise _in_use(kind)
        server._move(one, "TERMINATING", "TERMINATED")

    return handle


def _used(server: Server, one: dict[str, Any]) -> bool:
    """Tell whether OCI would refuse to remove something, since something else is in it."""
    machines = [
        (m["_asked"].get("createVnicDetails") or {}) for m in server.machines() if m["_asked"]
    ]
    match one["_kind"]:
        case "subnet":
            return any(vnic.get("subnetId") == one["id"] for vnic in machines)
        case "networksecuritygroup":
            return any(one["id"] in (vnic.get("nsgIds") or []) for vnic in machines)
        case "routetable":
            return any(other["routeTableId"] == one["id"] for other in server.of("subnet"))
        case "internetgateway":
            routes = [rule for table in server.of("routetable") for rule in table["routeRules"]]
            return any(rule["networkEntityId"] == one["id"] for rule in routes)
        case "vcn":
            kinds = ("subnet", "routetable", "internetgateway", "networksecuritygroup")
            return any(other["vcnId"] == one["id"] for kind in kinds for other in server.of(kind))
        case "volume":
            return any(
                other["volumeId"] == one["id"] and other["lifecycleState"] != "DETACHED"
                for other in server._of("volumeattachment")
            )
    return False


def _create_volume(server: Server, asked: _Asked) -> dict[str, Any]:
    told = asked.told
    if not 50 <= (told.get("sizeInGBs") or 0) <= 32768:
        raise Refusal(400, "InvalidParameter", "A volume has from 50 to 32768 GB.")
    if told.get("availabilityDomain") not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "there is no such availability domain")
    size = told["sizeInGBs"]
    return _plain(
        server,
        asked,
        "volume",
        availabilityDomain=told["availabilityDomain"],
        sizeInGBs=size,
        sizeInMBs=size * 1024,
    )


def _attach(server: Server, asked: _Asked) -> dict[str, Any]:
    told = asked.told
    machine = server._living(told["instanceId"], "instance")
    volume = server._living(told["volumeId"], "volume")
    if told["type"] != "paravirtualized":
        raise Refusal(400, "InvalidParameter", "the testbed knows paravirtualized ones alone")
    if machine["lifecycleState"] != "RUNNING":
        raise Refusal(409, "IncorrectState", "The machine does not run.")
    if machine["availabilityDomain"] != volume["availabilityDomain"]:
        raise Refusal(400, "InvalidParameter", "They are in different availability domains.")
    if _used(server, volume):
        raise Refusal(409, "Conflict", "The volume is attached already.")
    return server._add(
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


def _list_devices(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    server._there(asked.id, "instance")
    taken = {
        one["device"] for one in server._of("volumeattachment") if one["instanceId"] == asked.id
    }
    names = [f"/dev/oracleoci/oraclevd{letter}" for letter in "bcdef"]
    return [{"name": name, "isAvailable": True} for name in names if name not in taken]


def _capture(server: Server, asked: _Asked) -> dict[str, Any]:
    machine = server._living(asked.told["instanceId"], "instance")
    return server._add(
        "consolehistory",
        asked.region,
        "REQUESTED",
        "SUCCEEDED",
        availabilityDomain=machine["availabilityDomain"],
        compartmentId=machine["compartmentId"],
        freeformTags=asked.told.get("freeformTags") or {},
        instanceId=machine["id"],
    )


def _content(server: Server, asked: _Asked) -> str:
    one = server._there(asked.id, "consolehistory")
    if one["lifecycleState"] != "SUCCEEDED":
        raise Refusal(409, "IncorrectState", "The history is not there yet.")
    return server.console[: int(asked.query.get("length", 10240))]


def _delete_history(server: Server, asked: _Asked) -> None:
    del server._things[server._there(asked.id, "consolehistory")["id"]]


def _list_limits(server: Server, asked: _Asked) -> list[dict[str, Any]]:
    if asked.compartment != TENANCY or asked.query.get("serviceName") != "compute":
        raise Refusal(400, "InvalidParameter", "limits are of the tenancy's compute")
    return [
        {"name": name, "scopeType": "AD", "availabilityDomain": domain, "value": value}
        for name, value in server.limits.items()
        for domain in DOMAINS
    ]


def _limit_left(server: Server, asked: _Asked) -> dict[str, Any]:
    if asked.query.get("availabilityDomain") not in DOMAINS:
        raise Refusal(400, "InvalidParameter", "the limit is of an availability domain")
    left = _available(server, asked.id)
    return {"used": server.limits[asked.id] - left, "available": left}


_ID = r"([\w.-]+)"
#: Method, path, the model of the body, that of the answer, and what is done.
ROUTES: list[tuple[str, str, str, str, Callable[[Server, _Asked], Any]]] = [
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


class _Handler(BaseHTTPRequestHandler):
    """Hands requests to the server's state."""

    protocol_version = "HTTP/1.1"
    state: Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            status, told, more = self.state.answer(self.command, self.path, headers, body)
        except Exception as error:  # a fault of the testbed: the client has to see it
            status, told, more = 501, {"code": "Testbed", "message": repr(error)}, {}
        text = told if isinstance(told, str) else json.dumps(told)
        data = b"" if told is None else text.encode()
        self.send_response(status)
        kind = "text/plain" if isinstance(told, str) else "application/json"
        for name, value in {
            "Content-Type": kind,
            "opc-request-id": uuid.uuid4().hex,
            **more,
        }.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - as its base names them

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what faults are about."""


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Give a server of one's own, on loopback; it ends with this process, too."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        handler = type("Handler", (_Handler,), {"state": server})
        listener = _Listener(("127.0.0.1", 0), handler)
        server.url = f"http://127.0.0.1:{listener.server_port}/{{region}}"
        thread = threading.Thread(target=listener.serve_forever, name="oci", daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            listener.server_close()
            thread.join()


def problem() -> str:
    """Return why there can be none; empty when there can."""
    try:
        import oci  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""
