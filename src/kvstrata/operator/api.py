"""The requests to Kubernetes' API that the operator makes. Blocking; any number of threads."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from msgspec import Struct

from kvstrata.errors import KVStrataError

TIMEOUT_SECONDS = 10.0
FIELD_MANAGER = "kvstrata-operator"
_PLURALS = {"Deployment": "deployments", "Service": "services"}


class ApiError(KVStrataError):
    """Kubernetes refused a request or did not answer. ``status`` is 0 when there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Access(Struct, frozen=True):
    """How to reach the API. ``repr`` does not show the credentials."""

    server: str
    headers: Mapping[str, str] = {}
    context: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"Access({self.server})"


class Api:
    """One namespace of a cluster."""

    def __init__(self, access: Access, namespace: str) -> None:
        self._access = access
        self._namespace = namespace

    def get(self, api_version: str, plural: str, name: str) -> dict[str, Any] | None:
        """An object, or None.

        Raises:
            ApiError: no answer, or a refusal.
        """
        try:
            return self._ask("GET", self._path(api_version, plural, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def list(self, api_version: str, plural: str, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Objects with these labels. Raises as ``get``."""
        selector = urlencode({"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())})
        listed = self._ask("GET", f"{self._path(api_version, plural)}?{selector}")
        items: list[dict[str, Any]] = listed.get("items", [])
        return items

    def get_same(self, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """What the cluster has under a manifest's kind and name, or None. Raises as ``get``."""
        return self.get(manifest["apiVersion"], _PLURALS[manifest["kind"]], manifest["metadata"]["name"])

    def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Server-side apply: fields applied before and left out now are removed. Raises as ``get``."""
        path = self._path(manifest["apiVersion"], _PLURALS[manifest["kind"]], manifest["metadata"]["name"])
        query = urlencode({"fieldManager": FIELD_MANAGER, "force": "true"})
        return self._ask("PATCH", f"{path}?{query}", manifest, "application/apply-patch+yaml")

    def set_status(self, api_version: str, plural: str, name: str, status: dict[str, Any]) -> None:
        """Put fields into an object's status. Raises as ``get``."""
        path = f"{self._path(api_version, plural, name)}/status"
        self._ask("PATCH", path, {"status": status}, "application/merge-patch+json")

    def _path(self, api_version: str, plural: str, name: str = "") -> str:
        root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        path = f"{root}/namespaces/{quote(self._namespace)}/{plural}"
        return f"{path}/{quote(name)}" if name else path

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the server's address is from the service account
            self._access.server.rstrip("/") + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={**self._access.headers, "Content-Type": content_type, "Accept": "application/json"},
        )
        what = f"{method} {path.partition('?')[0]}"
        try:
            with urllib.request.urlopen(  # noqa: S310
                request, timeout=TIMEOUT_SECONDS, context=self._access.context
            ) as reply:
                answer: dict[str, Any] = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(f"{what}: {error.code} {_reason(error)}", error.code) from None
        except (OSError, ValueError) as error:
            raise ApiError(f"{what}: {error}") from None
        return answer


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        message = json.loads(error.read())["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
    return str(message)[:500]
