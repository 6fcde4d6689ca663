"""What a request must fulfil before the application sees it: token, address, origin, media type, size."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvstrata.http.access import READING, Access
from kvstrata.http.problems import problem

MAX_BODY_BYTES = 8 << 20
"""A million token ids, in JSON."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            status, detail = refusal
            headers = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
            # What the client is still sending is not read: the connection ends with the answer.
            await problem(status, detail, headers={**(headers or {}), "connection": "close"})(
                scope, receive, send
            )
            return
        # Whoever may GET may ask with HEAD (RFC 9110, 9.3.2), as load balancers do; the server sends no body then.
        served = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        await self._app(served, _limited(receive), send)

    def _refusal(self, scope: Scope) -> tuple[HTTPStatus, str] | None:
        """Why a request is not let through, from its head alone."""
        headers = dict(scope["headers"])
        host = _host_name(headers.get(b"host", b""))
        if self._access.hosts is not None and host not in self._access.hosts:
            return HTTPStatus.FORBIDDEN, "this server goes by another name; use localhost or 127.0.0.1"
        authorization = headers.get(b"authorization", b"")
        if not self._access.allows(scope["method"], scope["path"], authorization):
            which = "another token" if authorization else "the token"
            return HTTPStatus.UNAUTHORIZED, f"this wants {which}: Authorization: Bearer TOKEN"
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            return HTTPStatus.BAD_REQUEST, "Content-Length is no number"
        if length > MAX_BODY_BYTES:
            return _TOO_LARGE_STATUS, _TOO_LARGE
        return None if scope["method"] in READING else _refuse_write(scope["method"], headers, length)


_TOO_LARGE_STATUS = HTTPStatus(413)
_TOO_LARGE = f"a request body may have {MAX_BODY_BYTES:,} bytes; send less at a time"


def _refuse_write(method: str, headers: dict[bytes, bytes], length: int) -> tuple[HTTPStatus, str] | None:
    """No page of another site may make a browser write: browsers say where a request comes from, and send JSON to
    another site only after having asked, which is never granted here."""
    origin = headers.get(b"origin")
    if origin is not None and _authority(origin) != headers.get(b"host", b"").decode("latin-1").lower():
        return HTTPStatus.FORBIDDEN, "requests of other sites are refused (Origin)"
    if headers.get(b"sec-fetch-site", b"none") not in {b"none", b"same-origin"}:
        return HTTPStatus.FORBIDDEN, "requests of other sites are refused (Sec-Fetch-Site)"
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    has_body = length > 0 or b"transfer-encoding" in headers
    if media_type != b"application/json" and (has_body or method == "POST"):
        return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, with Content-Type: application/json"
    return None


def _host_name(host: bytes) -> str:
    """The name or address in a ``Host`` header, without port."""
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _authority(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return ""


def _limited(receive: Receive) -> Receive:
    """``receive`` for a body whose length was not announced, or was not true."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(_TOO_LARGE_STATUS, _TOO_LARGE)
        return message

    return limited
