"""The page for people at ``/``: files as they are shipped, read once, and headers that let it load nothing else.

The page itself holds no data; it asks the HTTP API, with the token that its user types in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI, Request, Response

_PREFIX = "/assets/"
_INDEX = "index.html"
_MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""By suffix; files with another one (licences) are not served."""
HEADERS = {
    # Trusted types: what turns a string into markup or code fails, so that no key or model name can become either.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Page:
    """The files of the page, by the path that they are served at."""

    files: dict[str, tuple[bytes, str]]
    """Path -> content and media type."""

    @classmethod
    def load(cls) -> Page:
        """Read the files that this package was shipped with."""
        found = {}
        for path, file in _walk(files(__package__) / "assets", _PREFIX):
            media_type = _MEDIA_TYPES.get(path.rpartition(".")[2])
            if media_type is not None:
                found[path] = file.read_bytes(), media_type
        found["/"] = found.pop(_PREFIX + _INDEX)
        return cls(found)

    @property
    def paths(self) -> frozenset[str]:
        """All that is served, by exact path."""
        return frozenset(self.files)

    def add_to(self, app: FastAPI) -> None:
        """Serve each file, and nothing beside them."""

        async def serve(request: Request) -> Response:
            content, media_type = self.files[request.scope["route"].path]
            return Response(content, headers=HEADERS | {"content-type": media_type})

        for path in self.files:
            app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


def _walk(directory: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for each in directory.iterdir():
        if each.is_dir():
            yield from _walk(each, f"{path}{each.name}/")
        else:
            yield path + each.name, each
