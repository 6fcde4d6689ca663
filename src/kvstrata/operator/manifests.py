"""The objects of a Model. Pure: the same Model gives the same objects."""

from __future__ import annotations

from typing import Any

from kvstrata.operator.options import PASSWORD, REDIS_TLS_DIRECTORY, Options
from kvstrata.operator.spec import TRANSFER_CONFIG, ModelSpec

PORT = 8000
CONNECTOR = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
MANAGED_BY = "kvstrata-operator"

Manifest = dict[str, Any]


def labels(name: str) -> dict[str, str]:
    """Labels of a Model's objects, and their selector."""
    return {
        "app.kubernetes.io/name": "vllm",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": MANAGED_BY,
    }


def manifests(name: str, uid: str, model: ModelSpec, options: Options) -> list[Manifest]:
    """Deployment and Service of the Model ``name``, which owns them."""
    metadata = {
        "name": name,
        "namespace": options.namespace,
        "labels": labels(name),
        "ownerReferences": [owner(name, uid, options)],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": model.replicas,
            "selector": {"matchLabels": labels(name)},
            "template": {"metadata": {"labels": labels(name)}, "spec": _pod(model, options)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "selector": labels(name),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }
    return [deployment, service]


def owner(name: str, uid: str, options: Options) -> Manifest:
    """The reference by which Kubernetes deletes the objects with their Model."""
    return {
        "apiVersion": options.api_version,
        "kind": "Model",
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def remote_url(model: ModelSpec, options: Options) -> str:
    """Where the Model's shared tier is."""
    return model.kv_cache.remote_url or options.default_remote_url


def cache_env(model: ModelSpec, options: Options) -> list[Manifest]:
    """The variables that turn the cache on; LMCache's names, which both connectors read."""
    cache = model.kv_cache
    env: list[Manifest] = []
    if PASSWORD in remote_url(model, options):
        reference = {"name": options.redis_secret, "key": options.redis_secret_key}
        env.append({"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": reference}})
    values = {
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "LMCACHE_CHUNK_SIZE": str(cache.chunk_size),
        "LMCACHE_LOCAL_CPU": str(cache.local_cpu_gb > 0),
        "LMCACHE_REMOTE_URL": remote_url(model, options),
        "LMCACHE_REMOTE_SERDE": cache.serde,
    }
    if cache.local_cpu_gb > 0:
        values["LMCACHE_MAX_LOCAL_CPU_SIZE"] = f"{cache.local_cpu_gb:g}"
    if cache.ttl_seconds is not None:
        values["KVSTRATA_TTL_SECONDS"] = str(cache.ttl_seconds)
    return env + [{"name": key, "value": value} for key, value in values.items()]


def _pod(model: ModelSpec, options: Options) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "home", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
    ]
    mounts = [{"name": "home", "mountPath": "/home/kvstrata"}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    if model.kv_cache.enabled and REDIS_TLS_DIRECTORY in remote_url(model, options):
        items = [{"key": "ca.crt", "path": "ca.crt"}]
        volumes.append(
            {"name": "redis-tls", "secret": {"secretName": options.redis_tls_secret, "items": items}}
        )
        mounts.append({"name": "redis-tls", "mountPath": REDIS_TLS_DIRECTORY})
    user = options.run_as_user
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(model, options, mounts)],
        "volumes": volumes,
    }
    if model.node_selector:
        pod["nodeSelector"] = model.node_selector
    if model.tolerations:
        pod["tolerations"] = model.tolerations
    return pod


def _container(model: ModelSpec, options: Options, mounts: list[Manifest]) -> Manifest:
    arguments = [
        f"--model={model.model_name}",
        f"--tensor-parallel-size={model.tensor_parallel_size}",
        f"--port={PORT}",
        *model.args,
    ]
    env = [{"name": "HOME", "value": "/home/kvstrata"}, *model.env]
    if model.kv_cache.enabled:
        arguments.append(f"{TRANSFER_CONFIG}={CONNECTOR}")
        env += cache_env(model, options)
    health = {"path": "/health", "port": "http"}
    return {
        "name": "vllm",
        "image": model.image or options.image,
        "command": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "args": arguments,
        "env": env,
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        # A large model takes long to load: half an hour.
        "startupProbe": {"httpGet": health, "periodSeconds": 10, "failureThreshold": 180},
        "livenessProbe": {"httpGet": health, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
        "readinessProbe": {"httpGet": health, "periodSeconds": 5, "timeoutSeconds": 5},
        "resources": model.resources or {"limits": {"nvidia.com/gpu": str(model.tensor_parallel_size)}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
