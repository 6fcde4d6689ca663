"""Makes the cluster fit a Model, and says in its status what is. Level-triggered: it may be called at any time."""

from __future__ import annotations

import logging
from typing import Any

from kvstrata.operator.api import Api
from kvstrata.operator.conditions import Condition, Status, merged
from kvstrata.operator.manifests import labels, manifests, remote_url
from kvstrata.operator.options import PLURAL, Options
from kvstrata.operator.probes import cache_reachable, connector_active
from kvstrata.operator.spec import ModelSpec, SpecError, parse_spec

log = logging.getLogger(__name__)


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
        log.warning("%s: %s", name, error)
        refused = Condition("Accepted", met=False, reason="Invalid", message=str(error))
        return {}, [refused, Condition("Ready", met=False, reason="NotAccepted")]
    deployment, _service = [api.apply(each) for each in wanted]
    ready = deployment.get("status", {}).get("readyReplicas", 0)
    conditions = [
        Condition("Accepted", met=True, reason="Valid"),
        Condition(
            "Ready",
            met=ready >= spec.replicas,
            reason="PodsReady" if ready >= spec.replicas else "PodsNotReady",
            message=f"{ready} of {spec.replicas} pods are ready",
        ),
    ]
    return {"replicas": spec.replicas, "readyReplicas": ready}, conditions + _cache(api, name, spec, options)


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


def _cache(api: Api, name: str, spec: ModelSpec, options: Options) -> list[Condition]:
    if not spec.kv_cache.enabled:
        return [
            Condition("CacheReachable", met=None, reason="CacheDisabled"),
            Condition("ConnectorActive", met=False, reason="CacheDisabled"),
        ]
    pods = api.list("v1", "pods", labels(name))
    return [cache_reachable(remote_url(spec, options)), connector_active(pods)]
