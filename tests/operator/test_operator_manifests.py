"""What a Model becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from kvstrata.operator.manifests import manifests
from kvstrata.operator.options import Options
from kvstrata.operator.quantities import parse_quantity
from kvstrata.operator.spec import CACHE_ENV, KVCacheSpec, ModelSpec, SpecError, parse_spec

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = Options(namespace="greenthread-system", image="registry.example.net/vllm:1")
SPEC = {"modelName": "meta-llama/Llama-3.1-8B-Instruct", "tensorParallelSize": 1, "replicas": 1}


def deployment(spec: dict[str, Any], options: Options = OPTIONS) -> dict[str, Any]:
    return manifests("llama", "uid-1", parse_spec(spec, options), options)[0]


def container(spec: dict[str, Any], options: Options = OPTIONS) -> dict[str, Any]:
    (one,) = deployment(spec, options)["spec"]["template"]["spec"]["containers"]
    return one


def test_the_cache_is_five_variables_and_an_argument() -> None:
    plain, cached = container(SPEC), container({**SPEC, "kvCache": {"enabled": True}})
    assert [each for each in cached["env"] if each not in plain["env"]] == [
        {"name": "LMCACHE_USE_EXPERIMENTAL", "value": "True"},
        {"name": "LMCACHE_CHUNK_SIZE", "value": "256"},
        {"name": "LMCACHE_LOCAL_CPU", "value": "False"},
        {
            "name": "LMCACHE_REMOTE_URL",
            "value": "redis://lmcache-redis.greenthread-system.svc.cluster.local:6379",
        },
        {"name": "LMCACHE_REMOTE_SERDE", "value": "naive"},
    ]
    assert [each for each in cached["args"] if each not in plain["args"]] == [
        '--kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
    ]
    assert {**plain, "env": 0, "args": 0} == {**cached, "env": 0, "args": 0}


def test_every_field_of_the_cache_arrives() -> None:
    cache = {
        "enabled": True,
        "chunkSize": 512,
        "localCpuGb": 2.5,
        "remoteUrl": "redis://r:1",
        "serde": "zstd",
    }
    env = {
        each["name"]: each["value"]
        for each in container({**SPEC, "kvCache": {**cache, "ttlSeconds": 60}})["env"]
    }
    assert env["LMCACHE_CHUNK_SIZE"] == "512"
    assert env["LMCACHE_LOCAL_CPU"] == "True"
    assert env["LMCACHE_MAX_LOCAL_CPU_SIZE"] == "2.5"
    assert env["LMCACHE_REMOTE_URL"] == "redis://r:1"
    assert env["LMCACHE_REMOTE_SERDE"] == "zstd"
    assert env["KVSTRATA_TTL_SECONDS"] == "60"


def test_the_password_comes_from_its_secret_first() -> None:
    url = "rediss-sentinel://:$(REDIS_PASSWORD)@a:1,b:2/mymaster?ssl_ca_certs=/etc/kvstrata/redis-tls/ca.crt"
    options = msgspec.structs.replace(OPTIONS, remote_url=url, redis_secret="cache", redis_tls_secret="tls")
    pod = deployment({**SPEC, "kvCache": {"enabled": True}}, options)["spec"]["template"]["spec"]
    names = [each["name"] for each in pod["containers"][0]["env"]]
    assert names.index("REDIS_PASSWORD") < names.index("LMCACHE_REMOTE_URL")
    assert {"name": "redis-tls", "mountPath": "/etc/kvstrata/redis-tls"} in pod["containers"][0][
        "volumeMounts"
    ]
    assert pod["volumes"][-1]["secret"]["secretName"] == "tls"


def test_other_fields_arrive() -> None:
    spec = {**SPEC, "tensorParallelSize": 4, "replicas": 3, "image": "i:2", "args": ["--max-model-len=9"]}
    spec |= {
        "env": [{"name": "A", "value": "b"}],
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "k"}],
    }
    made = deployment(spec)["spec"]
    one = made["template"]["spec"]["containers"][0]
    assert made["replicas"] == 3
    assert one["image"] == "i:2"
    assert "--tensor-parallel-size=4" in one["args"]
    assert "--max-model-len=9" in one["args"]
    assert {"name": "A", "value": "b"} in one["env"]
    assert one["resources"] == {"limits": {"nvidia.com/gpu": "4"}}
    assert made["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert made["template"]["spec"]["tolerations"] == [{"key": "k"}]
    assert container({**spec, "resources": {"limits": {"cpu": "2"}}})["resources"] == {"limits": {"cpu": "2"}}


@pytest.mark.deploy
@pytest.mark.parametrize("cache", [{}, {"enabled": True, "localCpuGb": 1}])
def test_objects_are_valid_and_restricted(cache: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra deploy")
    made = manifests("llama", "uid-1", parse_spec({**SPEC, "kvCache": cache}, OPTIONS), OPTIONS)
    for each in made:
        kubernetes_validate.validate(each, "1.37", strict=True)
        assert each["metadata"]["ownerReferences"][0]["controller"] is True
    pod = made[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


REFUSED = [
    ({}, ["modelName"]),
    ({**SPEC, "tensorParallelSize": 0}, ["spec.tensorParallelSize"]),
    ({**SPEC, "replicas": -1}, ["spec.replicas"]),
    ({**SPEC, "kvcache": {}}, ["kvcache", "did you mean 'kvCache'"]),
    ({**SPEC, "kvCache": {"chunk_size": 1}}, ["spec.kvCache", "did you mean 'chunkSize'"]),
    ({**SPEC, "kvCache": {"serde": "zsdt"}}, ["spec.kvCache.serde", "zstd"]),
    ({**SPEC, "resources": {"limits": {"memory": "80gb"}}}, ["spec.resources.limits.memory", "80Gi"]),
    ({**SPEC, "resources": {"requests": {"cpu": "many"}}}, ["spec.resources.requests.cpu"]),
    (
        {**SPEC, "kvCache": {"enabled": True, "localCpuGb": 10}, "resources": {"limits": {"memory": "10Gi"}}},
        ["spec.kvCache.localCpuGb=10", "spec.resources.limits.memory=10Gi", "raise the limit"],
    ),
    (
        {**SPEC, "tensorParallelSize": 4, "resources": {"limits": {"nvidia.com/gpu": 2}}},
        ["spec.resources.limits.nvidia.com/gpu", "spec.tensorParallelSize=4"],
    ),
    ({**SPEC, "args": ["--port=9"]}, ["spec.args", "--port"]),
    ({**SPEC, "args": ["--tensor_parallel_size", "2"]}, ["spec.args", "spec.tensorParallelSize"]),
    ({**SPEC, "env": [{"value": "x"}]}, ["spec.env[0]", "no name"]),
    ({**SPEC, "env": [{"name": "A"}, {"name": "A"}]}, ["spec.env[1]", "A is set by an item before it"]),
    (
        {**SPEC, "kvCache": {"enabled": True}, "env": [{"name": "LMCACHE_CHUNK_SIZE", "value": "1"}]},
        ["spec.env[0]", "LMCACHE_CHUNK_SIZE is set by kvCache"],
    ),
    ({**SPEC, "kvCache": {"chunkSize": 0}}, ["spec.kvCache.chunkSize"]),
    ({**SPEC, "kvCache": {"enabled": True, "remoteUrl": "nope://:s3cret@x"}}, ["spec.kvCache.remoteUrl"]),
    ({**SPEC, "kvCache": {"enabled": True, "remoteUrl": "redis://:$(REDIS_PASSWORD)@x"}}, ["no Secret"]),
    (
        {**SPEC, "kvCache": {"enabled": True}, "args": ["--kv-transfer-config={}"]},
        ["spec.args", "kvCache.enabled"],
    ),
]


@pytest.mark.parametrize(("spec", "expected"), REFUSED, ids=str)
def test_wrong_fields_are_named(spec: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec, OPTIONS)
    for text in expected:
        assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_what_the_cache_does_not_set_may_be_set() -> None:
    names = ("LMCACHE_LOG_LEVEL", "KVSTRATA_GATE")
    env = [{"name": name, "value": "x"} for name in names]
    made = container({**SPEC, "kvCache": {"enabled": True, "localCpuGb": 1, "ttlSeconds": 1}, "env": env})
    assert all(each in made["env"] for each in env)
    set_by_the_cache = {each["name"] for each in made["env"]} - {"HOME", *names}
    assert set_by_the_cache <= CACHE_ENV


@pytest.mark.parametrize(
    ("text", "value"),
    [("80Gi", 80 * 2**30), ("500m", 0.5), ("2e3", 2000), (4, 4), (".5Ki", 512), ("1M", 1e6)],
)
def test_quantities(text: object, value: float) -> None:
    assert parse_quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["80gb", "80 Gi", "-1", "", "Gi", True, None, "1e999", "1Zi"])
def test_what_is_no_quantity(text: object) -> None:
    with pytest.raises(ValueError, match="no quantity of Kubernetes"):
        parse_quantity(text)


def test_without_any_image_the_remedy_is_named() -> None:
    with pytest.raises(SpecError, match=r"spec\.image.*modelImage"):
        parse_spec(SPEC, Options(namespace="x"))


def test_the_definition_has_the_same_fields_and_defaults() -> None:
    text = (ROOT / "deploy/helm/kvstrata/templates/operator/crd.yaml").read_text()
    plain = "\n".join(line for line in text.splitlines() if "{{" not in line)
    schema = yaml.safe_load(plain)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for struct, properties in (
        (ModelSpec, schema["properties"]),
        (KVCacheSpec, schema["properties"]["kvCache"]["properties"]),
    ):
        fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
        assert set(fields) == set(properties)
        for name, definition in properties.items():
            if "default" in definition:
                assert definition["default"] == fields[name].default
    assert schema["required"] == ["modelName"]
