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
compartment whose OCID begins with `COMPARTMENT` is there.
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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from testbeds.oci_calls import ROUTES
from testbeds.oci_catalogue import (
    COMPARTMENT,
    DOMAINS,
    FINGERPRINT,
    IMAGES,
    OTHER_REGION,
    REGION,
    TENANCY,
    USER,
)
from testbeds.oci_models import problem as wrong_by_model
from testbeds.oci_state import Asked, Refusal, State, missing

__all__ = ["COMPARTMENT", "DOMAINS", "IMAGES", "OTHER_REGION", "REGION", "TENANCY", "running"]

_CLOCK_SECONDS = 300


class Server(State):
    """A running one."""

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
        self.url = ""
        super().__init__()

    @property
    def environment(self) -> dict[str, str]:
        """What the environment says to use its account."""
        return {"OCI_CLI_CONFIG_FILE": str(self.config)}

    def refuse(
        self, request: str, status: int, code: str, message: str = "no", *, times: int = 1
    ) -> None:
        """Have the next requests refused whose method and path hold the words of ``request``."""
        with self.lock:
            self.refusals.extend([(request, Refusal(status, code, message))] * times)

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
                raise missing()
            path = re.sub(r"^/?\d{8}/", "", path)
            with self.lock:
                self.age()
                self._refused(f"{method} {path}")
                query = dict(parse_qsl(parts.query))
                return self._routed(method, path, region, query, headers, body)
        except Refusal as error:
            return error.status, {"code": error.code, "message": error.message}, {}

    def _refused(self, asked: str) -> None:
        for one in self.refusals:
            words, refusal = one
            if all(word in asked for word in words.split()):
                self.refusals.remove(one)
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
            asked = Asked(region, query, told, match.groups())
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
        asked: Asked,
        body: bytes,
        handler: Callable[..., Any],
    ) -> Any:
        if not token or verb != "POST":
            return handler(self, asked)
        key = (asked.region, pattern, token)
        digest = hashlib.sha256(body).hexdigest()
        if key not in self.tokens:
            made = handler(self, asked)
            self.tokens[key] = digest, made["id"]
            return made
        before, identity = self.tokens[key]
        there = self.things.get(identity)
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
            raise missing()

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


def _order(one: dict[str, Any]) -> str:
    names = (one.get("timeCreated"), one.get("id"), one.get("shape"), one.get("name"))
    return " ".join(str(name) for name in names if name)


def _public(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if not key.startswith("_")}


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
