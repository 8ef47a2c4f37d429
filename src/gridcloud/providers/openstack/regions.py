"""One region of a cloud, asked over HTTP; logged in with what OpenStack's own tools use."""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from keystoneauth1 import adapter
from keystoneauth1 import exceptions as theirs
from keystoneauth1.access import AccessInfoV3
from keystoneauth1.identity import v3
from keystoneauth1.session import Session
from openstack.config import OpenStackConfig
from openstack.config.cloud_region import CloudRegion
from openstack.exceptions import ConfigException

from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.providers.openstack.errors import not_understood, translated
from gridcloud.providers.openstack.section import OpenStackSection

#: OpenStack of 2018 (Rocky) knows it: flavors come with what is special about them.
_MICROVERSIONS = {"compute": "2.61", "volumev3": None, "network": None, "image": None}
_VERSIONED = re.compile(r"/v\d+(\.\d+)?(/[0-9a-zA-Z_-]+)?/?$")
_PATHS = {"network": "/v2.0", "image": "/v2"}
#: A busy cloud's network service may take most of it to make a router.
_REQUEST_SECONDS = 50.0
_TOKEN_SECONDS = 30.0
_TOKEN_LIMIT = 64 * 1024
_PAGE = 1000
_MOST_PAGES = 100
_THREADS = 32

Json = dict[str, Any]
T = TypeVar("T")


class Regions:
    """The regions of one account; logs in when first asked. Blocking work runs in its threads."""

    def __init__(self, section: OpenStackSection) -> None:
        self._section = section
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="openstack")
        self._lock = threading.Lock()
        self._known: dict[str, Region] = {}
        self._closed = False

    async def all(self) -> list[Region]:
        """Return the regions of the settings, or the one that the credentials name."""
        names = self._section.regions or ("",)
        return [await self.named(name) for name in names]

    async def named(self, name: str) -> Region:
        """Return one; raises `InvalidSpec` if the credentials are not there or not complete."""
        return await self.in_thread(lambda: self._opened(name))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what blocking work returns; raises `Unavailable` once all is closed."""
        if self._closed:
            raise Unavailable("The provider is closed.", hint="Its site stops, or starts it anew.")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Give up connections, without waiting for what is under way. Idempotent."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _opened(self, name: str) -> Region:
        with self._lock:
            if name not in self._known:
                region = Region(self, *_logged_in(self._section, name))
                self._known[name] = self._known.setdefault(region.name, region)
            return self._known[name]


class Region:
    """One region. `ask` makes one request, once; its errors are `GridcloudError`."""

    def __init__(self, regions: Regions, found: CloudRegion, session: Session) -> None:
        self._regions = regions
        self.name = found.get_region_name("compute") or ""
        self._services = {
            service: adapter.Adapter(
                session=session,
                service_type=found.get_service_type(service) if service != "volumev3" else service,
                interface=found.get_interface(service),
                region_name=found.get_region_name(service),
                endpoint_override=found.get_endpoint(
                    "block-storage" if service == "volumev3" else service
                ),
                default_microversion=microversion,
            )
            for service, microversion in _MICROVERSIONS.items()
        }

    async def ask(
        self,
        service: str,
        method: str,
        path: str,
        body: Json | None = None,
        query: dict[str, str] | None = None,
    ) -> Json:
        """Return the answer to one request; an empty one where there is none."""
        return await self._regions.in_thread(lambda: self._ask(service, method, path, body, query))

    async def offers(self, service: str) -> bool:
        """Return whether the catalogue has a service here."""

        def look() -> bool:
            try:
                return bool(self._services[service].get_endpoint())
            except theirs.EndpointNotFound:
                return False
            except theirs.ClientException as error:
                raise translated(error, "log in") from error

        return await self._regions.in_thread(look)

    async def get(self, service: str, path: str, **query: str) -> Json:
        """Return what there is at a path."""
        return await self.ask(service, "GET", path, None, query)

    async def delete(self, service: str, path: str) -> None:
        """Delete something. What is not there is as good as deleted."""
        try:
            await self.ask(service, "DELETE", path)
        except NotFound:
            return

    async def listed(self, service: str, path: str, what: str, **query: str) -> list[Json]:
        """Return everything in a list, of all its pages."""
        found: dict[str, Json] = {}
        query = {"limit": str(_PAGE)} | query
        for _ in range(_MOST_PAGES):
            answer = await self.get(service, path, **query)
            page = answer.get(what)
            if not isinstance(page, list) or not all(_has_id(one) for one in page):
                raise not_understood(f"list {what}")
            found |= {one["id"]: one for one in page}
            if not page or not (answer.get("next") or _goes_on(answer.get(f"{what}_links"))):
                break
            query["marker"] = page[-1]["id"]
        return list(found.values())

    def _ask(
        self, service: str, method: str, path: str, body: Json | None, query: dict[str, str] | None
    ) -> Json:
        doing = f"{method} {path.partition('?')[0]}"
        try:
            client = self._services[service]
            answer = client.request(
                self._prefix(service) + path,
                method,
                json=body,
                params=query,
                timeout=_REQUEST_SECONDS,
                raise_exc=True,
                connect_retries=0,
                status_code_retries=0,
            )
            read = answer.json() if answer.content else {}
        except theirs.ClientException as error:
            raise translated(error, doing) from error
        except ValueError as error:
            raise not_understood(doing) from error
        if not isinstance(read, dict):
            raise not_understood(doing)
        return read

    def _prefix(self, service: str) -> str:
        """Return the version that a service's address in the catalogue may lack."""
        if service not in _PATHS:
            return ""
        endpoint = self._services[service].get_endpoint() or ""
        return "" if _VERSIONED.search(endpoint) else _PATHS[service]


def _has_id(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("id"), str)


def _goes_on(links: object) -> bool:
    """Tell whether a list has another page."""
    return isinstance(links, list) and any(
        isinstance(link, dict) and link.get("rel") == "next" for link in links
    )


def _logged_in(section: OpenStackSection, name: str) -> tuple[CloudRegion, Session]:
    """Return a region and a session for it; nothing is asked yet but a token's source."""
    more: dict[str, Any] = {}
    if section.cloud:
        more["cloud"] = section.cloud
    if name:
        more["region_name"] = name
    with_token = bool(section.token_command or section.token_file)
    if with_token:
        # It is asked for when it is needed; the loader wants one already.
        more |= {"auth_type": "v3oidcaccesstoken", "auth": {"access_token": "later"}}
    files = [str(section.clouds_file.expanduser())] if section.clouds_file else None
    try:
        found = OpenStackConfig(config_files=files, app_name="gridcloud").get_one(**more)
        session = found.get_session()
        # Else logging in, and looking for a service's versions, could take for ever.
        session.timeout = session.timeout or _REQUEST_SECONDS
        if with_token:
            arguments = {k: v for k, v in found.get_auth_args().items() if k != "access_token"}
            session.auth = _WithToken(section, **arguments)
    except (ConfigException, theirs.ClientException, TypeError) as error:
        where = f"cloud {section.cloud!r}" if section.cloud else "cloud of the environment (OS_*)"
        raise InvalidSpec(
            f"The {where} cannot be used: {' '.join(str(error).split())[:500].rstrip('.')}.",
            hint="Name one of clouds.yaml with `cloud`; `openstack token issue` must work with it.",
        ) from error
    return found, session


class _WithToken(v3.OidcAccessToken):
    """Logs in with an access token that is fetched anew each time: they live for an hour."""

    def __init__(self, section: OpenStackSection, **arguments: Any) -> None:
        super().__init__(access_token="", **arguments)
        self._section = section

    def get_unscoped_auth_ref(self, session: Session) -> AccessInfoV3:
        self.access_token = _fetched(self._section)
        return super().get_unscoped_auth_ref(session)


def _fetched(section: OpenStackSection) -> str:
    """Return a fresh access token; raises `Forbidden` saying what its source said."""
    try:
        if section.token_file:
            with section.token_file.expanduser().open("rb") as file:
                token = file.read(_TOKEN_LIMIT)
        else:
            done = subprocess.run(
                section.token_command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=_TOKEN_SECONDS,
            )
            token = done.stdout[:_TOKEN_LIMIT]
        text = token.decode("ascii").strip()
        if not text or not text.isprintable() or " " in text:
            raise _no_token("it is no token")
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-200:]
        raise _no_token(said or f"its status is {error.returncode}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise _no_token(type(error).__name__) from error
    return text


def _no_token(why: str) -> GridcloudError:
    return Forbidden(
        f"There is no access token to log in with: {' '.join(why.split()).rstrip('.')}.",
        hint="Try by hand what token_command or token_file names; with oidc-agent, log in again.",
    )
