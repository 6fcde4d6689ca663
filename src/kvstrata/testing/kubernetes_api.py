"""A small stand-in for Kubernetes' API server: objects in memory, on loopback, as far as the operator uses it.

It knows get, list, watch, merge patch and server-side apply (a list is one value), ``uid``, ``resourceVersion``,
``generation``, the status subresource, and deletion with what is owned. It validates nothing and makes no pods.
"""

from __future__ import annotations

import copy
import json
import queue
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
_PATH = re.compile(
    r"/apis?(?:/(?P<group>[^/]+(?=/[^/]+/namespaces)))?/(?P<version>[^/]+)/namespaces/(?P<namespace>[^/]+)"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?P<status>/status)?"
)
_KINDS = {
    "models": "Model", "deployments": "Deployment", "services": "Service", "pods": "Pod", "events": "Event",
}  # fmt: skip


class KubernetesApi:
    """A context manager; its methods may be called from any thread."""

    def __init__(self, group: str = "kvstrata.dev") -> None:
        self.group = group
        self.objects: dict[tuple[str, str], Object] = {}
        """By plural and name; one namespace is enough."""
        self.requests: list[str] = []
        """Methods and paths of those that change something."""
        self.failures: list[int] = []
        """Statuses with which the next such requests are refused."""
        self._applied: dict[tuple[str, str], Object] = {}
        self._version = 0
        self._watchers: list[tuple[str, queue.Queue[Object | None]]] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Requests", (_Requests,), {"api": self}))
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_watches()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def end_watches(self) -> None:
        """As a server does once in a while."""
        with self._lock:
            for _, waiting in self._watchers:
                waiting.put(None)
            self._watchers.clear()

    def get(self, plural: str, name: str) -> Object | None:
        """A copy of an object."""
        with self._lock:
            return copy.deepcopy(self.objects.get((plural, name)))

    def put(self, plural: str, obj: Object) -> Object:
        """Create an object, or replace it, as a user would."""
        with self._lock:
            key = plural, obj["metadata"]["name"]
            old = self.objects.get(key)
            new = copy.deepcopy(obj)
            new.setdefault("kind", _KINDS[plural])
            if old is not None:
                new["metadata"] = old["metadata"] | new["metadata"]
                new.setdefault("status", old.get("status", {}))
            return self._store(key, new, old)

    def delete(self, plural: str, name: str) -> None:
        """Delete an object and, as the garbage collector does, what it owns."""
        with self._lock:
            gone = self.objects.pop((plural, name))
            self._applied.pop((plural, name), None)
            self._tell("DELETED", plural, gone)
            for (kind, other), each in list(self.objects.items()):
                owners = each["metadata"].get("ownerReferences", [])
                if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    self.delete(kind, other)

    def apply(self, plural: str, name: str, manifest: Object) -> Object:
        """Server-side apply."""
        with self._lock:
            key = plural, name
            old = self.objects.get(key)
            live = copy.deepcopy(old) if old is not None else {}
            _remove(live, self._applied.get(key, {}), manifest)
            _merge(live, manifest)
            self._applied[key] = copy.deepcopy(manifest)
            return self._store(key, live, old)

    def patch(self, plural: str, name: str, patch: Object, *, status: bool) -> Object | None:
        """Merge patch of the status, or of everything else."""
        with self._lock:
            old = self.objects.get((plural, name))
            if old is None:
                return None
            new = copy.deepcopy(old)
            _merge(new, {key: value for key, value in patch.items() if (key == "status") == status})
            return self._store((plural, name), new, old)

    def watch(self, plural: str) -> queue.Queue[Object | None]:
        """Events from now on; None is the end."""
        waiting: queue.Queue[Object | None] = queue.Queue()
        with self._lock:
            self._watchers.append((plural, waiting))
        return waiting

    def _store(self, key: tuple[str, str], new: Object, old: Object | None) -> Object:
        metadata = new["metadata"]
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("generation", 1)
        if old is not None:
            if new == old:
                return copy.deepcopy(old)
            metadata["generation"] = old["metadata"]["generation"] + (new.get("spec") != old.get("spec"))
        self._version += 1
        metadata["resourceVersion"] = str(self._version)
        self.objects[key] = new
        self._tell("ADDED" if old is None else "MODIFIED", key[0], new)
        return copy.deepcopy(new)

    def _tell(self, what: str, plural: str, obj: Object) -> None:
        for watched, waiting in self._watchers:
            if watched == plural:
                waiting.put({"type": what, "object": copy.deepcopy(obj)})

    def resource_lists(self) -> dict[str, Object]:
        """What a client asks to find out which kinds there are."""
        groups = {
            "v1": ["services", "pods", "events"],
            "apps/v1": ["deployments"],
            f"{self.group}/v1alpha1": ["models"],
        }
        lists: dict[str, Object] = {"/api": {"versions": ["v1"]}}
        listed = []
        for version, plurals in groups.items():
            verbs = ["get", "list", "watch", "create", "patch", "delete"]
            names = [(plural, _KINDS[plural]) for plural in plurals] + [("models/status", "Model")] * (
                "models" in plurals
            )
            resources = [
                {"name": plural, "singularName": "", "kind": kind, "namespaced": True, "verbs": verbs}
                for plural, kind in names
            ]
            path = f"/apis/{version}" if "/" in version else f"/api/{version}"
            lists[path] = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
            if "/" in version:
                one = {"groupVersion": version, "version": version.split("/")[1]}
                listed.append({"name": version.split("/")[0], "versions": [one], "preferredVersion": one})
        lists["/apis"] = {"kind": "APIGroupList", "groups": listed}
        return lists


def _merge(into: Object, what: Object) -> None:
    for key, value in what.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _remove(live: Object, before: Object, now: Object) -> None:
    """Take out what was applied before and is not applied now."""
    for key, value in before.items():
        if key not in now:
            live.pop(key, None)
        elif isinstance(value, dict) and isinstance(now[key], dict) and isinstance(live.get(key), dict):
            _remove(live[key], value, now[key])


class _Requests(BaseHTTPRequestHandler):
    api: KubernetesApi

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        lists = self.api.resource_lists()
        match = _PATH.fullmatch(url.path)
        if url.path in lists:
            self._answer(200, lists[url.path])
        elif match is None:
            self._answer(404, {"message": f"no {url.path}"})
        elif match["name"]:
            found = self.api.get(match["plural"], match["name"])
            self._answer(404 if found is None else 200, found or {"message": "not found"})
        elif query.get("watch") == "true":
            self._stream(
                match["plural"], query.get("labelSelector", ""), int(query.get("resourceVersion") or 0)
            )
        else:
            with self.api._lock:  # noqa: SLF001
                items = list(self._matching(match["plural"], query.get("labelSelector", "")))
                version = str(self.api._version)  # noqa: SLF001
            self._answer(200, {"kind": "List", "metadata": {"resourceVersion": version}, "items": items})

    def do_PATCH(self) -> None:
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.api.requests.append(f"PATCH {url.path}")
        match = _PATH.fullmatch(url.path)
        if self.api.failures:
            self._answer(self.api.failures.pop(0), {"message": "refused by the test"})
        elif match is None or not match["name"]:
            self._answer(404, {"message": f"no {url.path}"})
        elif "apply-patch" in self.headers["Content-Type"]:
            self._answer(200, self.api.apply(match["plural"], match["name"], body))
        else:
            done = self.api.patch(match["plural"], match["name"], body, status=bool(match["status"]))
            self._answer(404 if done is None else 200, done or {"message": "not found"})

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _matching(self, plural: str, selector: str) -> Iterator[Object]:
        wanted = [each.split("=") for each in selector.split(",") if each]
        for (kind, _), each in sorted(self.api.objects.items()):
            labels = each["metadata"].get("labels", {})
            if kind == plural and all(labels.get(name) == value for name, value in wanted):
                yield each

    def _stream(self, plural: str, selector: str, since: int) -> None:
        with self.api._lock:  # noqa: SLF001
            waiting = self.api.watch(plural)
            for each in self._matching(plural, selector):
                if int(each["metadata"]["resourceVersion"]) > since:
                    waiting.put({"type": "MODIFIED", "object": copy.deepcopy(each)})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        try:
            while (event := waiting.get()) is not None:
                self.wfile.write(json.dumps(event).encode() + b"\n")
        except OSError:
            return  # the client is gone

    def _answer(self, status: int, body: Object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
