"""kopf: login, watching, and a look at every Model once in a while. No finalizers, no annotations of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from typing import Any

import kopf

from kvstrata.operator.api import Access, Api, ApiError
from kvstrata.operator.manifests import MANAGED_BY
from kvstrata.operator.options import PLURAL, VERSION, Options
from kvstrata.operator.reconcile import reconcile

log = logging.getLogger(__name__)


class Watcher:
    """The handlers that kopf calls. All on kopf's event loop; reconciling happens in its threads."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._api: Api | None = None
        self._locks: dict[str, asyncio.Lock] = {}
        """One per Model: it is reconciled once at a time."""
        self._resync: asyncio.Task[None] | None = None

    def registry(self) -> Any:
        """The handlers, registered."""
        registry = kopf.OperatorRegistry()
        options = self._options
        kopf.on.login(registry=registry)(self.log_in)
        kopf.on.startup(registry=registry)(self.start)
        kopf.on.cleanup(registry=registry)(self.stop)
        kopf.on.event(options.group, VERSION, PLURAL, registry=registry)(self.on_model)
        mine = {"app.kubernetes.io/managed-by": MANAGED_BY}
        kopf.on.event("apps", "v1", "deployments", labels=mine, registry=registry)(self.on_owned)
        kopf.on.event("", "v1", "services", labels=mine, registry=registry)(self.on_owned)
        return registry

    async def log_in(self, **kwargs: Any) -> Any:
        """In a cluster by the service account, elsewhere by the kubeconfig file."""
        found = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
        if found is not None:
            self._api = Api(_access(found), self._options.namespace)
        return found

    async def start(self, settings: Any, **_: Any) -> None:
        """Before anything is watched."""
        # Neither namespaces nor CustomResourceDefinitions are watched: that would want rights on the cluster.
        settings.scanning.disabled = True
        settings.posting.enabled = False
        self._resync = asyncio.get_running_loop().create_task(self._look_again())

    async def stop(self, **_: Any) -> None:
        """After everything else."""
        if self._resync is not None:
            self._resync.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._resync

    async def on_model(self, event: Any, name: str, **_: Any) -> None:
        """A Model was there at the start, came, changed or went."""
        if event["type"] == "DELETED":
            self._locks.pop(name, None)
        else:
            await self._reconcile(name)

    async def on_owned(self, meta: Any, **_: Any) -> None:
        """Something of a Model changed or went; also by others."""
        for owner in meta.get("ownerReferences", []):
            if owner.get("kind") == "Model" and owner.get("apiVersion") == self._options.api_version:
                await self._reconcile(owner["name"])

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(self._options.resync_seconds)
            if self._api is None:
                continue
            try:
                models = await asyncio.to_thread(self._api.list, self._options.api_version, PLURAL, {})
            except ApiError as error:
                log.warning("%s", error)
                continue
            for model in models:
                await self._reconcile(model["metadata"]["name"])

    async def _reconcile(self, name: str) -> None:
        if self._api is None:
            return
        async with self._locks.setdefault(name, asyncio.Lock()):
            try:
                await asyncio.to_thread(reconcile, self._api, name, self._options)
            except ApiError as error:
                log.warning("%s: %s; it is tried again in %g s", name, error, self._options.resync_seconds)


def _access(info: Any) -> Access:
    """kopf's credentials as those of our requests."""
    headers = {"Authorization": f"{info.scheme or 'Bearer'} {info.token}"} if info.token else {}
    context: ssl.SSLContext | None = None
    if info.server.startswith("https:"):
        context = ssl.create_default_context(cafile=info.ca_path)
        if info.certificate_path:
            context.load_cert_chain(info.certificate_path, info.private_key_path)
    return Access(info.server, headers, context)


def run(options: Options, liveness_port: int | None) -> None:
    """Work until SIGTERM or SIGINT."""
    endpoint = None if liveness_port is None else f"http://0.0.0.0:{liveness_port}/healthz"
    watcher = Watcher(options)
    kopf.run(
        registry=watcher.registry(),
        namespaces=[options.namespace],
        standalone=True,
        liveness_endpoint=endpoint,
    )
