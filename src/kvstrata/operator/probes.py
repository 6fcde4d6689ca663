"""What a Model's cache is really doing: asked of Redis and of the pods. Blocking."""

from __future__ import annotations

import contextlib
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

from kvstrata.config import mask, tier_from_url
from kvstrata.errors import KVStrataError, TierError
from kvstrata.operator.conditions import Condition
from kvstrata.operator.manifests import PORT
from kvstrata.operator.options import PASSWORD
from kvstrata.tiers.base import PROBE_KEY
from kvstrata.tiers.open import open_tier

TIMEOUT_SECONDS = 3.0
_METRIC = "vllm:kvstrata_"
_MAX_METRICS_BYTES = 16 << 20
_MAX_REASONS = 500
_STARTING = frozenset({"ContainerCreating", "PodInitializing"})


def cache_reachable(url: str) -> Condition:
    """Whether the shared tier answers the operator; the engines' way to it may be another."""
    shown = mask(url)
    url = url.replace(PASSWORD, os.environ.get("REDIS_PASSWORD", ""))
    try:
        with contextlib.closing(open_tier(tier_from_url(url))) as tier:
            tier.contains([PROBE_KEY])
    except TierError as error:
        return Condition("CacheReachable", met=False, reason="Unreachable", message=str(error)[:500])
    except KVStrataError as error:
        return Condition("CacheReachable", met=False, reason="WrongUrl", message=f"{shown}: {error}"[:500])
    return Condition("CacheReachable", met=True, reason="Answers", message=shown)


def connector_active(pods: list[dict[str, Any]], port: int = PORT) -> Condition:
    """Whether the ready pods show the connector's metrics."""
    ready = [pod for pod in pods if is_ready(pod) and pod["status"].get("podIP")]
    if not ready:
        return Condition("ConnectorActive", met=None, reason="NoReadyPod")
    silent: list[str] = []
    for pod in ready:
        try:
            found = _METRIC in _metrics(pod["status"]["podIP"], port)
        except OSError as error:
            message = f"{pod['metadata']['name']}: {error}"
            return Condition("ConnectorActive", met=None, reason="NoMetrics", message=message)
        if not found:
            silent.append(pod["metadata"]["name"])
    if silent:
        message = (
            f"no metric {_METRIC}* in {', '.join(silent)}: the image has no kvstrata, or another connector"
        )
        return Condition("ConnectorActive", met=False, reason="NotLoaded", message=message)
    return Condition("ConnectorActive", met=True, reason="Loaded", message=f"in {len(ready)} pods")


def why_waiting(pods: list[dict[str, Any]]) -> str:
    """What keeps pods from running, in Kubernetes' words: a missing Secret, an image, no node; or nothing."""
    reasons = dict.fromkeys(reason for pod in pods for reason in _reasons(pod.get("status", {})))
    return "; ".join(reasons)[:_MAX_REASONS]


def _reasons(status: dict[str, Any]) -> Iterator[str]:
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"{condition.get('reason', '')}: {condition.get('message', '')}"
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in _STARTING:
            ended = container.get("lastState", {}).get("terminated", {}).get("reason")
            said = f"{waiting['reason']}: {waiting.get('message', '')}"
            yield f"{said} (ended: {ended})" if ended else said


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether a pod's condition Ready is met."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _metrics(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{port}/metrics"
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as reply:
        content: bytes = reply.read(_MAX_METRICS_BYTES)
    return content.decode("utf-8", "replace")
