"""The things that are at the emulated Oracle Cloud of `oci_server`, and how they live."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from typing import Any

_STATE_SECONDS = 0.1
_FORGOTTEN_SECONDS = 30.0


class Refusal(Exception):
    """An error that OCI answers with."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def missing() -> Refusal:
    return Refusal(
        404, "NotAuthorizedOrNotFound", "Authorization failed or requested resource not found."
    )


def in_use(what: str) -> Refusal:
    return Refusal(409, "Conflict", f"The {what} references other resources, or is used by some.")


class State:
    """All that is there. Its methods tell the truth, past all requests."""

    #: How many things a page of a list has.
    page_size: int
    #: Limits of the tenancy in each availability domain.
    limits: dict[str, int]
    #: What every machine wrote to its console.
    console: str

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        with self.lock:
            self.things: dict[str, dict[str, Any]] = {}
            self.tokens: dict[tuple[str, str, str], tuple[str, str]] = {}
            self.refusals: deque[tuple[str, Refusal]] = deque()
            self.page_size = 5
            self.limits = {"standard-e4-core-count": 64, "standard-e4-memory-count": 1024}
            self.console = "cloud-init finished\n"

    def machines(self) -> list[dict[str, Any]]:
        """Return all machines that have not ended, with what was asked for in ``_asked``."""
        with self.lock:
            return [o for o in self.listed("instance") if o["lifecycleState"] != "TERMINATED"]

    def preempt(self, machine: str) -> None:
        """Take a machine back, as OCI does with spot capacity."""
        with self.lock:
            self.move(self.things[machine], "TERMINATING", "TERMINATED")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return all things of a kind that are there."""
        with self.lock:
            return [one for one in self.listed(kind) if one["lifecycleState"] != "TERMINATED"]

    def tagged(self, site: str = "") -> list[str]:
        """Return the ids of all that is there with a gridcloud tag, of all sites or of one."""
        with self.lock:
            self.age()
            return sorted(
                one["id"]
                for one in self.things.values()
                if one["lifecycleState"] not in {"TERMINATED", "DELETED"}
                and "gridcloud-site" in (tags := one.get("freeformTags") or {})
                and site in {"", tags["gridcloud-site"]}
            )

    def age(self) -> None:
        now = time.monotonic()
        for identity, one in list(self.things.items()):
            at, state = one["_next"]
            if state and now >= at:
                one["lifecycleState"], one["_next"] = state, (now, "")
                if state == "RUNNING":
                    self._attach_vnic(one)
            gone = one["lifecycleState"] == "TERMINATED"
            if gone and now - one["_next"][0] > one["_forgotten"]:
                del self.things[identity]

    def move(self, one: dict[str, Any], state: str, following: str) -> None:
        one["lifecycleState"] = state
        one["_next"] = time.monotonic() + _STATE_SECONDS, following

    def add(
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
        self.things[one["id"]] = one
        self.move(one, first, following)
        return one

    def listed(self, kind: str, region: str = "", compartment: str = "") -> list[dict[str, Any]]:
        self.age()
        return [
            one
            for one in self.things.values()
            if one["_kind"] == kind
            and region in {"", one["_region"]}
            and compartment in {"", one.get("compartmentId")}
        ]

    def there(self, identity: object, kind: str) -> dict[str, Any]:
        one = self.things.get(str(identity))
        if one is None or one["_kind"] != kind:
            raise missing()
        return one

    def living(self, identity: object, kind: str) -> dict[str, Any]:
        one = self.there(identity, kind)
        if one["lifecycleState"] in {"TERMINATING", "TERMINATED"}:
            raise missing()
        return one

    def _attach_vnic(self, machine: dict[str, Any]) -> None:
        asked = machine["_asked"]["createVnicDetails"]
        number = len(self.tokens) % 250 + 2
        public = f"127.0.0.{number}" if asked.get("assignPublicIp") else None
        vnic = self.add(
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
        self.add(
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


class Asked:
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
