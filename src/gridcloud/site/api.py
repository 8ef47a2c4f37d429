"""The HTTP API of a site: OpenAPI at ``/openapi.json``; every route calls one thing of `Site`."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gridcloud import __version__
from gridcloud.errors import STATUSES, Forbidden, GridcloudError
from gridcloud.model.api import Problem
from gridcloud.site import (
    routes_grid,
    routes_machines,
    routes_networks,
    routes_site,
    routes_volumes,
)
from gridcloud.site.site import Site


def make_app(site: Site, stop: Callable[[], None], token: str | None = None) -> FastAPI:
    """Return the application. With a ``token`` every request must bear it; without, whoever can
    open the socket is the site's user."""
    app = FastAPI(
        title="gridcloud site",
        version=__version__,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(_bearer(token))] if token else [],
        responses={"default": {"model": Problem}},
    )
    app.state.site = site
    app.state.stop = stop
    for routes in (routes_site, routes_machines, routes_volumes, routes_networks, routes_grid):
        app.include_router(routes.router, prefix="/v1")
    app.add_exception_handler(GridcloudError, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


def _bearer(token: str) -> Callable[[Request], Awaitable[None]]:
    expected = f"Bearer {token}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise Forbidden("The API token is missing or wrong.", hint="Send it as a Bearer token.")

    return check


async def _problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, GridcloudError)
    status = STATUSES[error.code][0]
    problem = Problem(
        title=type(error).__name__,
        status=status,
        code=error.code,
        detail=error.message,
        hint=error.hint,
    )
    return JSONResponse(
        problem.model_dump(), status_code=status, media_type="application/problem+json"
    )


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    text = str(first["msg"]).removeprefix("Value error, ")
    status = STATUSES["invalid-spec"][0]
    problem = Problem(
        title="InvalidSpec", status=status, code="invalid-spec", detail=f"{field}: {text}."
    )
    return JSONResponse(
        problem.model_dump(), status_code=status, media_type="application/problem+json"
    )
