"""The operator as a process, against a small stand-in for Kubernetes' API."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstrata.operator.api import Access, Api
from kvstrata.operator.conditions import Condition, merged
from kvstrata.operator.manifests import labels
from kvstrata.operator.options import Options
from kvstrata.operator.probes import cache_reachable, connector_active
from kvstrata.operator.reconcile import reconcile
from kvstrata.testing.kubernetes_api import KubernetesApi
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.redis_server import RedisServer

GROUP = "greenthread.ai"
NOBODY = "redis://127.0.0.1:1"
MODEL = {
    "apiVersion": f"{GROUP}/v1alpha1",
    "kind": "Model",
    "metadata": {"name": "llama-3-1-8b", "namespace": "greenthread-system"},
    "spec": {
        "modelName": "meta-llama/Llama-3.1-8B-Instruct",
        "tensorParallelSize": 1,
        "replicas": 1,
        "kvCache": {"enabled": True},
    },
}


def until(reached: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi(GROUP) as api:
        yield api


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(password="s3cret") as server:
        yield server


@pytest.fixture
def operator(api: KubernetesApi, redis_server: RedisServer, tmp_path: Path) -> Iterator[ServerProcess]:
    pytest.importorskip("kopf", reason="needs the extra deploy")
    access = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": {"token": "t0ken"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(access))
    command = [
        sys.executable,
        "-m",
        "kvstrata.operator",
        "--namespace=greenthread-system",
        f"--group={GROUP}",
    ]
    command += ["--image=registry.example.net/vllm:1", "--resync-seconds=0.5", "--redis-secret=cache"]
    command += [f"--remote-url=redis://:$(REDIS_PASSWORD)@127.0.0.1:{redis_server.port}"]
    with ServerProcess(
        "operator",
        command,
        log_path=tmp_path / "log",
        env={"KUBECONFIG": str(tmp_path / "kubeconfig"), "REDIS_PASSWORD": "s3cret"},
    ) as process:
        yield process
        assert process.running, process.log_tail()
        log = (tmp_path / "log").read_text()
        assert "Traceback" not in log, log
        assert "s3cret" not in log


def condition(api: KubernetesApi, kind: str, name: str = "llama-3-1-8b") -> str:
    model = api.get("models", name) or {}
    listed = model.get("status", {}).get("conditions", [])
    return next((f"{each['status']} {each['reason']}" for each in listed if each["type"] == kind), "")


def pod_spec(api: KubernetesApi) -> dict[str, Any]:
    found = api.get("deployments", "llama-3-1-8b")
    assert found is not None
    return found["spec"]["template"]["spec"]["containers"][0]


def has_cache(api: KubernetesApi) -> bool:
    one = pod_spec(api)
    said = [any("LMCACHE" in each["name"] for each in one["env"])]
    said.append(any("kv-transfer-config" in each for each in one["args"]))
    assert len(set(said)) == 1
    return said[0]


@pytest.mark.deploy
class TestOperator:
    def test_create_edit_disable_restart_delete(
        self, api: KubernetesApi, operator: ServerProcess, redis_server: RedisServer
    ) -> None:
        api.put("models", MODEL)
        until(
            lambda: condition(api, "CacheReachable") == "True Answers", "the status says that Redis answers"
        )
        assert condition(api, "Accepted") == "True Valid"
        assert condition(api, "Ready") == "False PodsNotReady"
        assert condition(api, "ConnectorActive") == "Unknown NoReadyPod"
        assert has_cache(api)
        assert api.get("services", "llama-3-1-8b") is not None
        assert "finalizers" not in api.get("models", "llama-3-1-8b")["metadata"]

        # Nothing is written while nothing changes.
        deployment = api.get("deployments", "llama-3-1-8b")
        status = api.get("models", "llama-3-1-8b")["status"]
        written = len([each for each in api.requests if each.endswith("/status")])
        applied = len(api.requests)
        until(lambda: len(api.requests) > applied + 4, "Models are looked at again")
        assert api.get("deployments", "llama-3-1-8b") == deployment
        assert api.get("models", "llama-3-1-8b")["status"] == status
        assert len([each for each in api.requests if each.endswith("/status")]) == written

        # Redis goes away and comes back.
        redis_server.kill()
        until(
            lambda: condition(api, "CacheReachable") == "False Unreachable",
            "the status says that Redis is away",
        )
        redis_server.start()
        until(
            lambda: condition(api, "CacheReachable") == "True Answers", "the status says that Redis is back"
        )

        # Edits arrive, while the API refuses some requests.
        api.failures[:] = [409, 500, 503]
        spec = {**MODEL["spec"], "replicas": 2, "args": ["--max-model-len=9"]}
        api.put("models", {**MODEL, "spec": spec})
        until(lambda: "--max-model-len=9" in pod_spec(api)["args"], "an argument arrives")
        assert api.get("deployments", "llama-3-1-8b")["spec"]["replicas"] == 2

        # Somebody else's changes: kept where the operator says nothing, undone where it does.
        foreign = api.get("deployments", "llama-3-1-8b")
        foreign["metadata"]["annotations"] = {"a": "b"}
        foreign["spec"]["replicas"] = 7
        api.put("deployments", foreign)
        until(
            lambda: api.get("deployments", "llama-3-1-8b")["spec"]["replicas"] == 2, "the number is put right"
        )
        assert api.get("deployments", "llama-3-1-8b")["metadata"]["annotations"] == {"a": "b"}

        # Switched off while the operator is away, and its connections cut.
        operator.stop()
        api.put("models", {**MODEL, "spec": {**spec, "kvCache": {"enabled": False}}})
        api.end_watches()
        operator.start()
        until(lambda: not has_cache(api), "variables and argument are gone")
        until(lambda: condition(api, "ConnectorActive") == "False CacheDisabled", "the status says so")

        api.delete("deployments", "llama-3-1-8b")
        until(lambda: api.get("deployments", "llama-3-1-8b") is not None, "a deleted Deployment comes back")
        api.delete("models", "llama-3-1-8b")
        until(lambda: not api.objects, "nothing is left")
        time.sleep(1.2)  # two looks at all Models: nothing comes back
        assert not api.objects

    def test_wrong_and_foreign_things_are_said_and_left_alone(
        self, api: KubernetesApi, operator: ServerProcess
    ) -> None:
        foreign = {"apiVersion": "v1", "metadata": {"name": "llama-3-1-8b"}, "spec": {"ports": [1]}}
        api.put("services", foreign)
        api.put("models", MODEL)
        until(lambda: condition(api, "Accepted") == "False Invalid", "the name is taken")
        message = api.get("models", "llama-3-1-8b")["status"]["conditions"][0]["message"]
        assert "Service llama-3-1-8b exists" in message
        assert api.get("services", "llama-3-1-8b")["spec"] == {"ports": [1]}
        assert api.get("deployments", "llama-3-1-8b") is None

        other = {**MODEL, "metadata": {"name": "other"}, "spec": {"modelName": "m", "replicas": "many"}}
        api.put("models", other)
        until(lambda: condition(api, "Accepted", "other") == "False Invalid", "the field is wrong")
        message = api.get("models", "other")["status"]["conditions"][0]["message"]
        assert "spec.replicas" in message

        # The remedy helps.
        api.delete("services", "llama-3-1-8b")
        until(lambda: condition(api, "Accepted") == "True Valid", "the name is free")


def examined(api: KubernetesApi) -> dict[str, dict[str, Any]]:
    """The conditions after a look at the Model."""
    options = Options(namespace="greenthread-system", group=GROUP, image="i:1", remote_url=NOBODY)
    reconcile(Api(Access(api.url), "greenthread-system"), "llama-3-1-8b", options)
    return {each["type"]: each for each in api.get("models", "llama-3-1-8b")["status"]["conditions"]}


class TestStatus:
    @pytest.mark.parametrize("status", [400, 403, 422])
    def test_what_kubernetes_refuses_is_a_condition(self, api: KubernetesApi, status: int) -> None:
        api.put("models", MODEL)
        api.failures[:] = [status]
        accepted = examined(api)["Accepted"]
        assert (accepted["status"], accepted["reason"]) == ("False", "Refused")
        assert f"{status} refused by the test" in accepted["message"]
        assert examined(api)["Accepted"]["status"] == "True"

    def test_it_says_why_pods_wait(self, api: KubernetesApi) -> None:
        """A missing Secret, an image that cannot be had, a container that ends, no node."""
        api.put("models", MODEL)
        for number, status in enumerate(
            (
                {
                    "containerStatuses": [
                        waiting("CreateContainerConfigError", 'secret "hf-secret" not found')
                    ]
                },
                {"containerStatuses": [waiting("ImagePullBackOff", "Back-off pulling image")]},
                {"containerStatuses": [waiting("CrashLoopBackOff", "back-off 10s", ended="OOMKilled")]},
                {"containerStatuses": [waiting("ContainerCreating", "")]},
                {
                    "conditions": [
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "reason": "Unschedulable",
                            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                        }
                    ]
                },
            )
        ):
            metadata = {"name": f"p{number}", "labels": labels("llama-3-1-8b")}
            api.put("pods", {"metadata": metadata, "status": status})
        message = examined(api)["Ready"]["message"]
        assert message.startswith("0 of 1 pods are ready; ")
        for said in (
            'CreateContainerConfigError: secret "hf-secret" not found',
            "ImagePullBackOff",
            "CrashLoopBackOff: back-off 10s (ended: OOMKilled)",
            "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        ):
            assert said in message
        assert "ContainerCreating" not in message


def waiting(reason: str, message: str, ended: str = "") -> dict[str, Any]:
    status: dict[str, Any] = {"state": {"waiting": {"reason": reason, "message": message}}}
    return status | ({"lastState": {"terminated": {"reason": ended}}} if ended else {})


class TestProbes:
    def test_an_unreachable_cache_is_named_without_its_password(self) -> None:
        found = cache_reachable(f"redis://:s3cret@127.0.0.1:{free_port()}")
        assert (found.met, found.reason) == (False, "Unreachable")
        assert "s3cret" not in found.message

    def test_the_connector_is_seen_in_the_metrics(self) -> None:
        for text, met in (
            ("vllm:kvstrata_loads_total 1.0\n", True),
            ("vllm:num_requests_running 0\n", False),
        ):
            with metrics_server(text) as port:
                assert connector_active([pod()], port).met is met
        assert connector_active([pod()], free_port()).met is None
        assert connector_active([pod(ready="False")]).met is None

    def test_a_condition_keeps_its_time_until_it_changes(self) -> None:
        old = merged({}, [Condition("Ready", met=True, reason="A")], 1, {})
        old["conditions"][0]["lastTransitionTime"] = "2020-01-01T00:00:00Z"
        same = merged(old, [Condition("Ready", met=True, reason="B")], 2, {})
        other = merged(old, [Condition("Ready", met=None, reason="B")], 2, {})
        assert same["conditions"][0]["lastTransitionTime"] == "2020-01-01T00:00:00Z"
        assert other["conditions"][0]["lastTransitionTime"] > "2021"
        assert other["conditions"][0]["status"] == "Unknown"


def pod(ready: str = "True") -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": ready}]
    return {"metadata": {"name": "p"}, "status": {"podIP": "127.0.0.1", "conditions": conditions}}


class metrics_server:  # noqa: N801 - a context manager
    """One page."""

    def __init__(self, text: str) -> None:
        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Page)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> int:
        self._thread.start()
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
