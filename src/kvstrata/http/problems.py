"""Errors of the HTTP API: problem documents as in RFC 9457."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from kvstrata.errors import BusyError, ConflictError, KVStrataError, NotFoundError, OperationError, TierError
from kvstrata.operations.report import DOCSTRINGS_ARE_READ

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class Fault(BaseModel):
    """One wrong value of a request."""

    model_config = ConfigDict(use_attribute_docstrings=DOCSTRINGS_ARE_READ)

    where: str
    """The path to it: "body.tokens.3", "query.limit"."""
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(use_attribute_docstrings=DOCSTRINGS_ARE_READ)

    type: str = "about:blank"
    title: str
    """The phrase of the status code."""
    status: int
    detail: str
    """What is wrong, and what to do."""
    faults: list[Fault] | None = None
    """With status 422: each wrong value."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: these status codes come with a problem document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(
    status: int, detail: str, faults: list[Fault] | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer for a request that was not served."""
    document = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, faults=faults)
    return JSONResponse(
        document.model_dump(exclude_none=True), status_code=status, media_type=MEDIA_TYPE, headers=headers
    )


_STATUS: tuple[tuple[type[KVStrataError], HTTPStatus], ...] = (
    (NotFoundError, HTTPStatus.NOT_FOUND),
    (ConflictError, HTTPStatus.CONFLICT),
    (BusyError, HTTPStatus.TOO_MANY_REQUESTS),
    (OperationError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (TierError, HTTPStatus.SERVICE_UNAVAILABLE),
)


def handle_errors(app: FastAPI) -> None:
    """Let every error of ``app`` leave it as a problem document."""

    @app.exception_handler(KVStrataError)
    def known(_: Request, error: KVStrataError) -> JSONResponse:
        for kind, status in _STATUS:
            if isinstance(error, kind):
                return problem(status, str(error))
        logger.error("an operation failed: %s", error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the values: they may be salts or tokens.
        faults = [
            Fault(where=".".join(map(str, fault["loc"])), message=fault["msg"])
            for fault in error.errors()[:20]
        ]
        first = faults[0]
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{first.where}: {first.message}", faults)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    def unknown(request: Request, error: Exception) -> JSONResponse:
        route = request.scope.get("route")
        logger.error("%s %s failed", request.method, getattr(route, "path", "?"), exc_info=error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the server's log")
