"""The HTTP API: health, metrics, figures."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from kvstrata.__about__ import __version__
from kvstrata.metrics import CONTENT_TYPE

HEALTHY = frozenset({"ok", "degraded"})
"""Values of ``status`` answered with 200. A tier that is down is no reason to restart the server."""


class StatusSource(Protocol):
    """What the API shows. Methods are called from several threads at once, and must not block for long."""

    def metrics(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        ...

    def health(self) -> dict[str, Any]:
        """``status`` ("ok" or "degraded" when it serves) and ``tiers``: the state of each by name."""
        ...

    def stats(self) -> dict[str, Any]:
        """Figures for people and tools; values that JSON can hold."""
        ...


def create_app(source: StatusSource) -> FastAPI:
    """The application. It reads only, and knows no more than ``source`` tells."""
    # Without the interactive documentation: its scripts come from elsewhere.
    app = FastAPI(title="kvstrata", version=__version__, docs_url=None, redoc_url=None)

    @app.get("/health")
    def health() -> JSONResponse:
        """200 while it serves, 503 otherwise; with the state of every tier."""
        state = source.health()
        return JSONResponse(state, status_code=200 if state["status"] in HEALTHY else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        """All metrics in the text format of Prometheus."""
        return Response(source.metrics(), headers={"content-type": CONTENT_TYPE})

    @app.get("/stats")
    def stats() -> JSONResponse:
        """Figures: what is held, hit, missed and dropped since the start."""
        return JSONResponse(source.stats())

    @app.get("/version")
    def version() -> dict[str, str]:
        """The version of the package."""
        return {"version": __version__}

    return app
