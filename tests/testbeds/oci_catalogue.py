"""What the emulated Oracle Cloud of `oci_server` has: shapes, images, and where."""

from __future__ import annotations

import hashlib
from typing import Any

REGION, OTHER_REGION = "eu-frankfurt-1", "eu-zurich-1"
TENANCY, USER = "ocid1.tenancy.oc1..aaaatenancy", "ocid1.user.oc1..aaaauser"
FINGERPRINT = "20:3b:97:13:55:1c:5b:0d:d3:37:d8:50:4e:c5:3a:34"
COMPARTMENT = "ocid1.compartment.oc1..aaaatest"
DOMAINS = ("xUgd:EU-FRANKFURT-1-AD-1", "xUgd:EU-FRANKFURT-1-AD-2", "xUgd:EU-FRANKFURT-1-AD-3")
ONLY_IN = {"VM.GPU.A10.1": DOMAINS[1:2]}


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
X86 = {name for name in SHAPES if ".A1." not in name}


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
