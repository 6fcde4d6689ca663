"""The chart, rendered by Helm's engine: every object is valid, and what all must have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvstrata.config.schema import settings_schema

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "kvstrata"
NAMESPACE = "caches"
Rendered = Any
Render = Callable[[dict[str, Any]], Rendered]

IMAGE = {"repository": "registry.example.net/kvstrata"}
CUSTOM = {"ServiceMonitor", "PrometheusRule", "CustomResourceDefinition"}
"""Kinds that Kubernetes' own schemas do not have."""
EVERYTHING: dict[str, Any] = {
    "image": IMAGE,
    "imagePullSecrets": [{"name": "pull"}],
    "lmcache": {"enabled": True, "tls": {"enabled": True, "existingSecret": "redis-tls"}},
    "server": {"enabled": True, "settings": {"log_level": "DEBUG"}},
    "operator": {"enabled": True},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "grafanaDashboard": {"enabled": True},
    },
}
EXTERNAL = {
    "externalRedis": {
        "url": "rediss://:$(REDIS_PASSWORD)@cache.example.net:6380/1",
        "existingSecret": "cache",
    },
    "image": IMAGE,
    "server": {"enabled": True, "sharing": "none"},
    "operator": {"enabled": True, "apiGroup": "greenthread.ai"},
}
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one": {"lmcache": {"enabled": True, "replicas": 1}},
    "two": {"lmcache": {"enabled": True, "replicas": 2, "storage": {"storageClassName": ""}}},
    "three": {"lmcache": {"enabled": True}},
    "five, apart": {"lmcache": {"enabled": True, "replicas": 5, "antiAffinity": "required"}},
    "bare": {
        "lmcache": {
            "enabled": True,
            "replicas": 1,
            "antiAffinity": "none",
            "auth": {"enabled": False},
            "networkPolicy": {"enabled": False},
            "podDisruptionBudget": {"enabled": False},
        }
    },
    "placed": {
        "lmcache": {
            "enabled": True,
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "podAnnotations": {"a/b": "c"},
            "priorityClassName": "high",
            "networkPolicy": {"additionalPeers": [{"namespaceSelector": {}}]},
        }
    },
    "external": EXTERNAL,
    "everything": EVERYTHING,
}


@pytest.fixture(params=MATRIX)
def rendered(request: pytest.FixtureRequest, render: Render) -> Rendered:
    return render(MATRIX[request.param])


def pods(rendered: Rendered) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in rendered.objects:
        if each["kind"] in {"StatefulSet", "DaemonSet", "Deployment"}:
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


class TestEveryRelease:
    def test_objects_are_valid(self, rendered: Rendered) -> None:
        kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra deploy")
        for each in rendered.objects:
            assert each["metadata"].get("namespace", "") == (
                "" if each["kind"] == "CustomResourceDefinition" else NAMESPACE
            )
            if each["kind"] not in CUSTOM:
                kubernetes_validate.validate(each, "1.37", strict=True)

    def test_pods_are_restricted(self, rendered: Rendered) -> None:
        for _, pod in pods(rendered):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }

    def test_containers_have_limits_and_probes(self, rendered: Rendered) -> None:
        for _, pod in pods(rendered):
            for container in pod["containers"]:
                assert container["resources"]["limits"]["memory"]
                assert container["resources"]["requests"]["memory"]
                assert container["livenessProbe"]
                assert ":" in container["image"]
                assert not container["image"].endswith(":latest")

    def test_only_the_operator_may_use_the_api(self, rendered: Rendered) -> None:
        for name, pod in pods(rendered):
            assert ("serviceAccountName" in pod) == (name == "kvstrata-operator")
            assert pod["automountServiceAccountToken"] is (name == "kvstrata-operator")

    def test_mounts_and_selectors_fit(self, rendered: Rendered) -> None:
        for each in rendered.objects:
            if each["kind"] in {"StatefulSet", "DaemonSet", "Deployment"}:
                template = each["spec"]["template"]
                assert (
                    each["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
                )
                claims = each["spec"].get("volumeClaimTemplates", [])
                volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
                volumes |= {claim["metadata"]["name"] for claim in claims}
                mounted = {
                    mount["name"]
                    for container in template["spec"]["containers"]
                    + template["spec"].get("initContainers", [])
                    for mount in container.get("volumeMounts", [])
                }
                assert mounted == volumes

    def test_no_object_appears_twice(self, rendered: Rendered) -> None:
        names = [(each["kind"], each["metadata"]["name"]) for each in rendered.objects]
        assert len(names) == len(set(names))


def test_nothing_is_installed_by_default(render: Render) -> None:
    rendered = render({})
    assert rendered.objects == []
    assert "lmcache.enabled" in rendered.notes


class TestRedis:
    def test_defaults_are_those_that_users_know(self, render: Render) -> None:
        rendered = render({"lmcache": {"enabled": True}})
        spec = rendered.get("StatefulSet", "lmcache-redis")["spec"]
        claim = spec["volumeClaimTemplates"][0]["spec"]
        assert spec["replicas"] == 3
        assert spec["template"]["spec"]["containers"][0]["resources"] == {
            "requests": {"memory": "64Gi"},
            "limits": {"memory": "80Gi"},
        }
        assert claim["storageClassName"] == "fast-ssd"
        assert claim["resources"]["requests"]["storage"] == "100Gi"
        assert rendered.get("Service", "lmcache-redis")["spec"]["clusterIP"] == "None"

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({}, "maxmemory 65536mb"),  # four fifths of the limit
            ({"maxMemory": "10gb"}, "maxmemory 10gb"),
            ({"headroomPercent": 0}, "maxmemory 80gb"),
            ({"resources": {"limits": {"memory": "128Gi"}}}, "maxmemory 80gb"),
            ({"maxMemory": "3gb", "resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}}},
             "maxmemory 1638mb"),
        ],
    )  # fmt: skip
    def test_maxmemory_leaves_headroom(self, render: Render, values: dict[str, Any], expected: str) -> None:
        rendered = render({"lmcache": {"enabled": True, **values}})
        lines = rendered.get("ConfigMap", "lmcache-redis")["data"]["redis.conf"].splitlines()
        assert expected in lines
        assert "maxmemory-policy allkeys-lru" in lines
        assert expected.removeprefix("maxmemory ") in rendered.notes

    def test_without_sentinel_clients_are_led_to_the_master(self, render: Render) -> None:
        for replicas in (1, 2):
            rendered = render({"lmcache": {"enabled": True, "replicas": replicas}})
            service = rendered.get("Service", "lmcache-redis")["spec"]
            assert service["selector"]["statefulset.kubernetes.io/pod-name"] == "lmcache-redis-0"
            assert (
                f"redis://:$(REDIS_PASSWORD)@lmcache-redis.{NAMESPACE}.svc.cluster.local:6379"
                in rendered.notes
            )
            pod = rendered.get("StatefulSet", "lmcache-redis")["spec"]["template"]["spec"]
            assert [container["name"] for container in pod["containers"]] == ["redis"]

    def test_without_password_the_url_is_the_plain_one(self, render: Render) -> None:
        rendered = render({"lmcache": {"enabled": True, "replicas": 1, "auth": {"enabled": False}}})
        assert f"  redis://lmcache-redis.{NAMESPACE}.svc.cluster.local:6379\n" in rendered.notes
        assert rendered.named("Secret") == {}

    def test_a_majority_of_sentinels_decides(self, render: Render) -> None:
        for replicas, quorum in ((3, "2"), (4, "3"), (5, "3")):
            rendered = render({"lmcache": {"enabled": True, "replicas": replicas}})
            sentinel = rendered.get("StatefulSet", "lmcache-redis")["spec"]["template"]["spec"]["containers"][
                1
            ]
            assert {"name": "QUORUM", "value": quorum} in sentinel["env"]

    def test_a_new_password_does_not_restart_pods(self, render: Render) -> None:
        first, second = (
            render({"lmcache": {"enabled": True}}).get("StatefulSet", "lmcache-redis") for _ in range(2)
        )
        assert first == second

    def test_the_secret_outlives_the_release(self, render: Render) -> None:
        secret = render({"lmcache": {"enabled": True}}).get("Secret", "lmcache-redis")
        assert secret["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert len(secret["data"]["redis-password"]) >= 32

    def test_what_the_replica_count_means_is_said(self, render: Render) -> None:
        said = [render({"lmcache": {"enabled": True, "replicas": count}}).notes for count in (1, 2, 3)]
        assert "no copy" in said[0]
        assert "Nothing fails over" in said[1]
        assert "redis-sentinel" in said[2]


class TestServer:
    def test_memory_limit_has_room_for_l1(self, render: Render) -> None:
        values = {"image": IMAGE, "server": {"enabled": True, "l1SizeGb": 100, "memoryOverheadGb": 3}}
        server = render(values).get("DaemonSet", "kvstrata-server")["spec"]["template"]["spec"]["containers"][
            0
        ]
        assert "--l1-size-gb=100" in server["args"]
        assert server["resources"]["limits"]["memory"] == "103Gi"

    def test_the_password_is_not_in_the_manifest(self, render: Render) -> None:
        rendered = render(EXTERNAL)
        server = rendered.get("DaemonSet", "kvstrata-server")["spec"]["template"]["spec"]["containers"][0]
        names = [item["name"] for item in server["env"]]
        assert names.index("REDIS_PASSWORD") < names.index("KVSTRATA_REMOTE_URL")
        assert server["env"][names.index("REDIS_PASSWORD")]["valueFrom"]["secretKeyRef"] == {
            "name": "cache",
            "key": "redis-password",
        }
        assert not any("redis" in argument for argument in server["args"])

    def test_engines_reach_the_server_of_their_node(self, render: Render) -> None:
        service = render(EVERYTHING).get("Service", "kvstrata-server")
        assert service["spec"]["internalTrafficPolicy"] == "Local"

    def test_without_sharing_nothing_of_the_host_is_mounted(self, render: Render) -> None:
        pod = render(EXTERNAL).get("DaemonSet", "kvstrata-server")["spec"]["template"]["spec"]
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert "initContainers" not in pod

    def test_root_does_nothing_but_give_the_directory_away(self, render: Render) -> None:
        pod = render(EVERYTHING).get("DaemonSet", "kvstrata-server")["spec"]["template"]["spec"]
        (container,) = pod["initContainers"]
        assert container["command"] == ["chown", "10001:10001", "/run/kvstrata"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}


class TestMonitoring:
    def test_files_are_those_of_the_repository(self) -> None:
        for name in ("prometheus", "grafana"):
            here = {path.name: path.read_text() for path in (ROOT / "deploy" / name).glob("*.*")}
            copied = {path.name: path.read_text() for path in (CHART / "files" / name).iterdir()}
            assert copied == here, "run: make chart"

    def test_rules_and_dashboard_are_as_they_are(self, render: Render) -> None:
        rendered = render(EVERYTHING)
        files = sorted((ROOT / "deploy" / "prometheus").glob("*.yaml"))
        groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
        assert rendered.get("PrometheusRule", "kvstrata")["spec"]["groups"] == groups
        dashboards = rendered.get("ConfigMap", "kvstrata-grafana")
        for file in (ROOT / "deploy" / "grafana").glob("*.json"):
            assert dashboards["data"][file.name] == file.read_text()
        assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"

    def test_the_monitor_finds_the_service(self, render: Render) -> None:
        rendered = render(EVERYTHING)
        monitor = rendered.get("ServiceMonitor", "kvstrata-server")
        service = rendered.get("Service", "kvstrata-server")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}

    def test_alerts_name_the_job_of_the_monitor(self, render: Render) -> None:
        rendered = render(EVERYTHING)
        (relabeling,) = rendered.get("ServiceMonitor", "kvstrata-server")["spec"]["endpoints"][0][
            "relabelings"
        ]
        assert relabeling["targetLabel"] == "job"
        groups = rendered.get("PrometheusRule", "kvstrata")["spec"]["groups"]
        (down,) = [rule for group in groups for rule in group["rules"] if rule.get("alert") == "KVStrataDown"]
        assert f'job="{relabeling["replacement"]}"' in down["expr"]


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"lmcache": {"maxMemory": "80Gi"}}, ["/lmcache/maxMemory", "80gb"]),
    ({"lmcache": {"maxMemory": "512Mi"}}, ["/lmcache/maxMemory", "with mb"]),
    ({"lmcache": {"maxMemory": "lots"}}, ["/lmcache/maxMemory", "lots"]),
    ({"lmcache": {"maxMemory": 80}}, ["/lmcache/maxMemory", "string"]),
    ({"lmcache": {"replicas": 0}}, ["/lmcache/replicas"]),
    ({"lmcache": {"replicas": "3"}}, ["/lmcache/replicas", "integer"]),
    ({"lmcache": {"maxmemory": "1gb"}}, ["maxmemory"]),
    ({"lmcache": {"storage": {"size": "100gb"}}}, ["/lmcache/storage/size"]),
    ({"lmcache": {"resources": {"limits": {"memory": "80gb"}}}}, ["/lmcache/resources/limits/memory"]),
    ({"lmcache": {"enabled": "yes"}}, ["/lmcache/enabled", "boolean"]),
    ({"lmcache": {"enabled": True, "tls": {"enabled": True}}}, ["lmcache.tls.existingSecret", "ca.crt"]),
    ({"lmcache": {"enabled": True, "resources": {"limits": {"memory": "1Gi"}}}}, ["requests.memory=64Gi", "1Gi"]),
    ({"lmcache": {"enabled": True}, "externalRedis": {"url": "redis://x"}}, ["lmcache.enabled=false"]),
    ({"externalRedis": {"url": "http://x"}}, ["/externalRedis/url"]),
    ({"externalRedis": {"url": "redis://:s3cret@x"}}, ["externalRedis.existingSecret", "$(REDIS_PASSWORD)"]),
    ({"externalRedis": {"url": "redis://:$(REDIS_PASSWORD)@x"}}, ["externalRedis.existingSecret"]),
    ({"lmcache": {"enabled": True, "maxMemory": "0"}}, ["lmcache.maxMemory=0", "at least 64mb"]),
    ({"lmcache": {"enabled": True, "maxMemory": "1kb"}}, ["lmcache.maxMemory=1kb"]),
    ({"lmcache": {"enabled": True, "storage": {"size": "0Gi"}}}, ["lmcache.storage.size=0Gi"]),
    (
        {"lmcache": {"enabled": True, "resources": {"requests": {"memory": "1Mi"}, "limits": {"memory": "9Mi"}}}},
        ["lmcache.resources.limits.memory=9Mi", "headroomPercent"],
    ),
    ({"lmcache": {"headroomPercent": 150}}, ["/lmcache/headroomPercent", "maximum"]),
    ({"server": {"l1SizeGb": "20"}}, ["/server/l1SizeGb", "integer"]),
    ({"server": {"l1SizeGb": 0}}, ["/server/l1SizeGb", "minimum"]),
    ({"server": {"settings": {"chunk_sise": 256}}}, ["/server/settings", "chunk_sise"]),
    ({"server": {"settings": {"chunk_size": "many"}}}, ["/server/settings/chunk_size", "integer"]),
    ({"server": {"settings": {"chunk_size": 0}}}, ["/server/settings/chunk_size", "minimum"]),
    ({"server": {"enabled": True}}, ["image.repository", "Containerfile.server"]),
    ({"server": {"runAsUser": 0}}, ["/server/runAsUser"]),
    ({"server": {"sharing": "shm"}}, ["/server/sharing", "hostPath"]),
    ({"image": IMAGE, "server": {"enabled": True, "settings": {"remote_url": "redis://x"}}}, ["server.settings"]),
    ({"image": IMAGE, "server": {"enabled": True, "settings": {"local_disk": "/kv"}}}, ["settings.local_disk"]),
    ({"monitoring": {"serviceMonitor": {"enabled": True}}}, ["serviceMonitor.enabled", "server.enabled"]),
    ({"nameOverride": "My_Cache"}, ["/nameOverride"]),
    ({"operator": {"apiGroup": "Nope"}}, ["/operator/apiGroup"]),
    ({"oparator": {}}, ["oparator"]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_wrong_values_are_refused_by_name(
    render: Render, values: dict[str, Any], expected: list[str]
) -> None:
    errors = pytest.importorskip("helm_python.errors", reason="needs the extra deploy")
    with pytest.raises(errors.HelmError) as caught:
        render(values)
    for text in expected:
        assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_the_schema_knows_the_settings() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["server"]["properties"]["settings"] == settings_schema(), "run: make chart"


def test_helm_has_nothing_to_complain_about() -> None:
    charts = pytest.importorskip("helm_python.chart", reason="needs the extra deploy")
    assert [each for each in charts.lint(CHART)["messages"] if each["severity"] > 1] == []
