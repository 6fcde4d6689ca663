"""The HTTP API: health, metrics, figures, and the operations of a server that has them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kvstrata.__about__ import __version__
from kvstrata.http.access import OPEN_PATHS, READING, Access
from kvstrata.http.dashboard import Page
from kvstrata.http.guard import Guard
from kvstrata.http.manage import manage_router
from kvstrata.http.problems import Problem, handle_errors, responses
from kvstrata.metrics import CONTENT_TYPE
from kvstrata.operations import Operations

HEALTHY = frozenset({"ok", "degraded"})
"""Values of ``status`` answered with 200. A tier that is down is no reason to restart the server."""


class StatusSource(Protocol):
    """What the API shows. Methods are called from several threads at once, and must not block for long; ``health``
    must not block at all."""

    def metrics(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        ...

    def health(self) -> dict[str, Any]:
        """``status`` ("ok" or "degraded" when it serves) and ``tiers``: the state of each by name."""
        ...

    def stats(self) -> dict[str, Any]:
        """Figures for people and tools; values that JSON can hold."""
        ...


class Health(BaseModel):
    """Whether it serves."""

    status: str
    version: str | None = None
    tiers: dict[str, str]


class Version(BaseModel):
    """The version of the package."""

    version: str


def create_app(
    source: StatusSource,
    operations: Operations | None = None,
    access: Access | None = None,
    *,
    with_page: bool = False,
) -> FastAPI:
    """The application; without ``operations`` it reads only. It knows no more than these tell.

    ``with_page`` puts the page for people at ``/``: it holds no data, and is open to all who may ask at all.
    """
    # Without the interactive documentation: its scripts come from elsewhere.
    app = FastAPI(
        title="kvstrata",
        summary="See and control a KV cache server.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
    )
    access = access or Access()
    if with_page:
        page = Page.load()
        access = dataclasses.replace(access, open_paths=access.open_paths | page.paths)
        page.add_to(app)
    app.add_middleware(Guard, access=access)
    handle_errors(app)
    _add_status(app, source)
    if operations is not None:
        app.include_router(manage_router(operations))
    _describe(app, access)
    return app


def _add_status(app: FastAPI, source: StatusSource) -> None:
    plain: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "It does not serve"}}

    def state() -> JSONResponse:
        found = source.health()
        return JSONResponse(found, status_code=200 if found["status"] in HEALTHY else 503)

    # These two do not wait for one of the threads, all of which operations on a tier that hangs may have.
    @app.get("/health", tags=["status"], response_model=Health, responses=unhealthy)
    async def health() -> JSONResponse:
        """200 while it serves, 503 when it should be restarted; with the state of every tier."""
        return state()

    # LMCache's name for it: probes of manifests that were written for its server.
    app.add_api_route("/healthcheck", health, include_in_schema=False)

    @app.get("/ready", tags=["status"], response_model=Health, responses=unhealthy)
    async def ready() -> JSONResponse:
        """200 when inference engines can use it. A tier that is down is shown, and gone on without."""
        return state()

    @app.get(
        "/metrics",
        tags=["status"],
        response_class=Response,
        responses=plain | responses(401, 403, 500),
    )
    def metrics() -> Response:
        """All metrics in the text format of Prometheus."""
        return Response(source.metrics(), headers={"content-type": CONTENT_TYPE})

    @app.get("/stats", tags=["status"], response_model=dict[str, Any], responses=responses(401, 403, 500))
    def stats() -> JSONResponse:
        """Figures: what is held, hit, missed and dropped since the start."""
        return JSONResponse(source.stats())

    @app.get("/version", tags=["status"], responses=responses(401, 403, 500))
    def version() -> Version:
        """The version of the package."""
        return Version(version=__version__)


def _describe(app: FastAPI, access: Access) -> None:
    """Complete the OpenAPI document with what no route can say: problem documents, and where the token goes.

    Replacing the method is FastAPI's documented way to do that.
    """
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = make()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs", {}) | {"Problem": problem}
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if access.token is not None:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    reads = method.upper() in READING
                    if not (reads and (access.open_reads or path in OPEN_PATHS)):
                        operation["security"] = [{"token": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
