"""Makes the cluster fit a Model, and says in its status what is. Level-triggered: it may be called at any time."""

from __future__ import annotations

import logging
from typing import Any

from kvstrata.errors import KVStrataError
from kvstrata.operator.api import Api, ApiError
from kvstrata.operator.conditions import Condition, Status, merged
from kvstrata.operator.manifests import labels, manifests, remote_url
from kvstrata.operator.options import PLURAL, Options
from kvstrata.operator.probes import cache_reachable, connector_active, why_waiting
from kvstrata.operator.spec import ModelSpec, SpecError, parse_spec

log = logging.getLogger(__name__)
_REFUSALS = frozenset({400, 403, 422})
"""Statuses of answers that asking again does not change: a wrong object, a quota, an admission policy."""


def reconcile(api: Api, name: str, options: Options) -> None:
    """One Model. Nothing is done when it is gone: Kubernetes deletes what it owns.

    Raises:
        ApiError: to be tried again.
    """
    model = api.get(options.api_version, PLURAL, name)
    if model is None or "deletionTimestamp" in model["metadata"]:
        return
    fields, conditions = _examine(api, model, options)
    before = model.get("status", {})
    status = merged(before, conditions, model["metadata"].get("generation", 0), fields)
    if status != before:
        api.set_status(options.api_version, PLURAL, name, status)


def _examine(api: Api, model: dict[str, Any], options: Options) -> tuple[Status, list[Condition]]:
    name, uid = model["metadata"]["name"], model["metadata"]["uid"]
    try:
        spec = parse_spec(model["spec"], options)
        wanted = manifests(name, uid, spec, options)
        _check_owners(api, wanted, uid)
    except SpecError as error:
        return _not_accepted(name, "Invalid", error)
    try:
        deployment, _service = [api.apply(each) for each in wanted]
    except ApiError as error:
        if error.status not in _REFUSALS:
            raise
        return _not_accepted(name, "Refused", error)
    ready = deployment.get("status", {}).get("readyReplicas", 0)
    pods = api.list("v1", "pods", labels(name)) if spec.kv_cache.enabled or ready < spec.replicas else []
    all_ready = ready >= spec.replicas
    reasons = "" if all_ready else why_waiting(pods)
    conditions = [
        Condition("Accepted", met=True, reason="Valid"),
        Condition(
            "Ready",
            met=all_ready,
            reason="PodsReady" if all_ready else "PodsNotReady",
            message=f"{ready} of {spec.replicas} pods are ready" + (f"; {reasons}" if reasons else ""),
        ),
    ]
    return {"replicas": spec.replicas, "readyReplicas": ready}, conditions + _cache(pods, spec, options)


def _not_accepted(name: str, reason: str, error: KVStrataError) -> tuple[Status, list[Condition]]:
    log.warning("%s: %s", name, error)
    refused = Condition("Accepted", met=False, reason=reason, message=str(error))
    return {}, [refused, Condition("Ready", met=False, reason="NotAccepted")]


def _check_owners(api: Api, wanted: list[dict[str, Any]], uid: str) -> None:
    """Objects of the same names that somebody else has made are left alone.

    Raises:
        SpecError: there are such.
    """
    for each in wanted:
        found = api.get_same(each)
        owners = [] if found is None else found["metadata"].get("ownerReferences", [])
        if found is not None and uid not in {owner["uid"] for owner in owners}:
            kind, name = each["kind"], each["metadata"]["name"]
            raise SpecError(
                f"a {kind} {name} exists that is not of this Model: rename the Model or delete the {kind}"
            )


def _cache(pods: list[dict[str, Any]], spec: ModelSpec, options: Options) -> list[Condition]:
    if not spec.kv_cache.enabled:
        return [
            Condition("CacheReachable", met=None, reason="CacheDisabled"),
            Condition("ConnectorActive", met=False, reason="CacheDisabled"),
        ]
    return [cache_reachable(remote_url(spec, options)), connector_active(pods)]
