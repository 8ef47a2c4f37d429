"""The call shapes of EC2 on loopback: moto, in a process of its own.

    with moto_server.running() as ec2:
        ec2.url, ec2.environment       # where it is, and credentials that it takes
        ec2.tagged()                   # what is truly there with a gridcloud tag, asked by boto3
        ec2.reset()                    # nothing was ever made

It starts no machines; theirs are records that say running. What it is told here beyond moto: types
and images that do not exist are refused, as at EC2, and client tokens are kept: the same token
gives the machine that it gave before, also one that has ended, and the same token with other
parameters is refused. (``tokens=False`` is moto as it is, a cloud that knows none.) The images are
those of `IMAGES`. Signatures are verified, for which it knows one key. `Server.refuse` has calls
refused with an error of EC2's, as for quotas. Unlike EC2 it shows everything at once, and its
machines end at once.

The process ends when its standard input does, so with the test however that ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "not-a-secret"
#: The key by which tests look past what is tested; its signatures are not looked at.
TRUTH = "truth"
REGION, OTHER_REGION = "eu-central-1", "eu-north-1"
_DEBIAN = "136693071363"
_NAMES = {
    "ami-0000000000000001a": ("debian-12-amd64-20250101-1", "x86_64", _DEBIAN, "2025-01-01"),
    "ami-0000000000000002a": ("debian-12-amd64-20250601-2", "x86_64", _DEBIAN, "2025-06-01"),
    "ami-0000000000000003a": ("debian-12-arm64-20250601-2", "arm64", _DEBIAN, "2025-06-01"),
    "ami-0000000000000004a": ("debian-13-amd64-20250901-1", "x86_64", _DEBIAN, "2025-09-01"),
    "ami-0000000000000005a": ("ours-3", "x86_64", "555555555555", "2025-09-02"),
}
IMAGES = [
    {
        "ami_id": ami,
        "name": name,
        "architecture": architecture,
        "owner_id": owner,
        "creation_date": f"{day}T00:00:00.000Z",
        "state": "available",
        "public": True,
        "image_location": f"{owner}/{name}",
        "root_device_type": "ebs",
        "root_device_name": "/dev/xvda",
        "description": name,
        "image_type": "machine",
        "virtualization_type": "hvm",
        "hypervisor": "xen",
    }
    for ami, (name, architecture, owner, day) in _NAMES.items()
]
_PATIENCE = 60.0
_LISTS = {
    "describe_vpcs": ("Vpcs", "VpcId"),
    "describe_subnets": ("Subnets", "SubnetId"),
    "describe_internet_gateways": ("InternetGateways", "InternetGatewayId"),
    "describe_security_groups": ("SecurityGroups", "GroupId"),
    "describe_volumes": ("Volumes", "VolumeId"),
}


@dataclass(frozen=True)
class Server:
    """A running one."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What the environment says of an account of its own."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
        }

    def client(self, region: str = REGION) -> Any:
        """Return a client of boto3, to look past what is tested."""
        import boto3

        return boto3.client(
            "ec2",
            region_name=region,
            endpoint_url=self.url,
            aws_access_key_id=TRUTH,
            aws_secret_access_key=TRUTH,
        )

    def reset(self) -> None:
        """Begin anew."""
        self._post("/moto-api/reset", b"")
        self._post("/testbed/refuse", b"[]")

    def refuse(self, action: str, code: str, *, status: int = 400, times: int = 1) -> None:
        """Have the next calls of an action refused, and not carried out."""
        told = [[action, code, status]] * times
        self._post("/testbed/refuse", json.dumps(told).encode())

    def _post(self, path: str, body: bytes) -> None:
        request = urllib.request.Request(f"{self.url}{path}", data=body, method="POST")
        urllib.request.urlopen(request, timeout=_PATIENCE).close()

    def machines(self, region: str = REGION) -> list[dict[str, Any]]:
        """Return all machines, the ended ones too."""
        answer = self.client(region).describe_instances()
        return [one for part in answer["Reservations"] for one in part["Instances"]]

    def tagged(self, site: str = "", region: str = REGION) -> list[str]:
        """Return the ids of all that is there with a gridcloud tag, of all sites or of one."""
        client, found = self.client(region), []
        for call, (what, identity) in _LISTS.items():
            found += [one[identity] for one in getattr(client, call)()[what] if _ours(one, site)]
        for one in self.machines(region):
            if one["State"]["Name"] != "terminated" and _ours(one, site):
                found.append(one["InstanceId"])
        return sorted(found)


def problem() -> str:
    """Return why there can be none; empty when there can."""
    try:
        import moto.ec2  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def running(*, tokens: bool = True) -> Iterator[Server]:
    """Give a server of one's own."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.json"
        images.write_text(json.dumps(IMAGES))
        environment = os.environ | {
            "MOTO_AMIS_PATH": str(images),
            "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "true",
            "MOTO_ENABLE_AMI_VALIDATION": "true",
            "PYTHONWARNINGS": "ignore",
        }
        log = (Path(folder) / "log").open("w+")
        process = subprocess.Popen(
            [sys.executable, __file__, "tokens" if tokens else "plain"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            assert process.stdout
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"moto did not start: {Path(log.name).read_text()[-2000:]}")
            yield Server(f"http://127.0.0.1:{port}")
        finally:
            assert process.stdin
            process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()
            log.close()


def _ours(thing: dict[str, Any], site: str) -> bool:
    tags = {tag["Key"]: tag["Value"] for tag in thing.get("Tags", [])}
    return "gridcloud-site" in tags and site in {"", tags["gridcloud-site"]}


def _keep_tokens() -> None:
    """Have machines made but once for a client token."""
    from moto.core.responses import ActionResult
    from moto.ec2.responses.instances import InstanceResponse

    plain, lock = InstanceResponse.run_instances, threading.Lock()
    told: dict[tuple[str, str], tuple[Any, str]] = {}

    def run_instances(self: Any) -> Any:
        token = self._get_param("ClientToken")
        asked = json.dumps(
            {k: v for k, v in sorted(self.querystring.items()) if "Signature" not in k},
            default=str,
        )
        with lock:
            there = self.ec2_backend.reservations
            kept, before = told.get((self.region, token), (None, ""))
            if kept is not None and kept.id in there:
                if asked != before:
                    from moto.core.exceptions import ServiceException

                    error = ServiceException("The token was used with other parameters.")
                    error.code = "IdempotentParameterMismatch"
                    raise error
                return ActionResult(kept)
            result = plain(self)
            told[self.region, token] = result.result, asked
            return result

    InstanceResponse.run_instances = run_instances  # type: ignore[method-assign]


class _Door:
    """Stands before moto: verifies signatures, and refuses what it was told to."""

    def __init__(self, moto: Callable[..., Any]) -> None:
        self._moto = moto
        self._refusals: deque[tuple[str, str, int]] = deque()
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if environ["PATH_INFO"] == "/testbed/refuse":
            self._refusals = deque(tuple(one) for one in json.loads(body))
            start("200 OK", [("Content-Length", "0")])
            return [b""]
        if "HTTP_AUTHORIZATION" in environ and (code := _badly_signed(environ, body)):
            return _refused(start, 401 if code == "AuthFailure" else 403, code)
        told = urllib.parse.parse_qs(f"{environ['QUERY_STRING']}&{body.decode('latin-1')}")
        with self._lock:
            first = self._refusals[0] if self._refusals else ("", "", 0)
            if first[0] and told.get("Action") == [first[0]]:
                self._refusals.popleft()
                return _refused(start, first[2], first[1])
        return self._moto(environ, start)


def _refused(start: Callable[..., Any], status: int, code: str) -> list[bytes]:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error>'
        f"<Code>{code}</Code><Message>The testbed refuses this. Encoded authorization failure "
        "message: 0123456789abcdef</Message></Error></Errors><RequestID>x</RequestID></Response>"
    ).encode()
    start(f"{status} Refused", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _badly_signed(environ: dict[str, Any], body: bytes) -> str:
    """Return the code of what is wrong with the signature of a request, as AWS's version 4 has it;
    written from its specification, so that it is not what is tested."""
    words = environ["HTTP_AUTHORIZATION"].removeprefix("AWS4-HMAC-SHA256 ").split(", ")
    told = dict(word.strip().split("=", 1) for word in words)
    key, day, region, service, end = told["Credential"].split("/")
    if key != KEY:
        return "" if key == TRUTH else "AuthFailure"
    names = told["SignedHeaders"].split(";")
    environ = environ | {"HTTP_CONTENT_TYPE": environ.get("CONTENT_TYPE", "")}
    headers = {n: environ.get(f"HTTP_{n.upper().replace('-', '_')}", "").strip() for n in names}
    query = urllib.parse.parse_qsl(environ["QUERY_STRING"], keep_blank_values=True)
    quote = urllib.parse.quote
    pairs = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in query)
    canonical = "\n".join(
        [
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            "&".join(f"{k}={v}" for k, v in pairs),
            *(f"{name}:{headers[name]}" for name in names),
            "",
            ";".join(names),
            hashlib.sha256(body).hexdigest(),
        ]
    )
    scope = "/".join([day, region, service, end])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", environ["HTTP_X_AMZ_DATE"], scope, digest])
    signing = f"AWS4{SECRET}".encode()
    for part in (day, region, service, end, text):
        signing = hmac.digest(signing, part.encode(), "sha256")
    return "" if signing.hex() == told["Signature"] else "SignatureDoesNotMatch"


def _serve() -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    if sys.argv[1:] == ["tokens"]:
        _keep_tokens()
    app = _Door(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
