"""Routes that look into the cache, and change it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from kvstrata.cache.recent import MAX_RECENT
from kvstrata.errors import OperationError
from kvstrata.http.bodies import (
    ClearBody,
    DeleteBody,
    Key,
    LookupBody,
    Name,
    PinBody,
    QuotaBody,
    RuntimeBody,
    Salt,
    VerifyBody,
    WarmBody,
)
from kvstrata.http.problems import responses
from kvstrata.metrics import L1
from kvstrata.operations import Operations
from kvstrata.operations.entries import Deleted, EntryDetails, EntryPage
from kvstrata.operations.jobs import JobReport
from kvstrata.operations.pins import PinReport
from kvstrata.operations.prefixes import PrefixReport
from kvstrata.operations.prompts import Coverage, NamespaceReport
from kvstrata.operations.quotas import QuotaReport
from kvstrata.operations.requests import RequestReport
from kvstrata.operations.runtime import RuntimeReport
from kvstrata.operations.scope import Scope
from kvstrata.operations.tiers import TierReport
from kvstrata.quotas import Quota

MAX_PAGE = 1000
MAX_PREFIXES = 100


class Config(BaseModel):
    """The effective configuration. Secrets are masked."""

    settings: dict[str, Any]
    tiers: list[dict[str, Any]]


def manage_router(operations: Operations) -> APIRouter:
    """All routes over ``operations``."""
    router = APIRouter(responses=responses(401, 403, 422, 500))
    _add_views(router, operations)
    _add_requests(router, operations)
    _add_entries(router, operations)
    _add_pins(router, operations)
    _add_quotas(router, operations)
    _add_jobs(router, operations)
    _add_runtime(router, operations)
    return router


def _add_views(router: APIRouter, operations: Operations) -> None:
    @router.get("/config", tags=["status"])
    def config() -> Config:
        """The effective configuration: every setting, and the tiers that follow. Secrets are masked."""
        return Config(**operations.config())

    @router.get("/tiers", tags=["status"])
    def tiers() -> list[TierReport]:
        """What each tier holds and how it does: L1 first, then the others in the order they are asked."""
        return operations.tiers()

    @router.get("/namespaces", tags=["status"])
    def namespaces() -> list[NamespaceReport]:
        """What inference engines have registered since the start of this server."""
        return operations.prompts.namespaces()

    @router.post("/lookup", tags=["entries"], responses=responses(404, 413, 415))
    def lookup(body: LookupBody) -> list[Coverage]:
        """How many leading tokens of a prompt are held, and by which tier; one answer per namespace that is meant.

        Without side effect: nothing is moved, kept, or counted as a look-up.
        """
        return operations.coverage(body.tokens, body.salt, body.model_name, body.namespace)


def _add_requests(router: APIRouter, operations: Operations) -> None:
    @router.get("/requests", tags=["requests"])
    def list_requests(limit: Annotated[int, Query(ge=1, le=MAX_RECENT)] = 50) -> list[RequestReport]:
        """The look-ups that were answered last, the latest first, each explained."""
        return operations.recent(limit)

    @router.get("/prefixes", tags=["requests"])
    def list_prefixes(limit: Annotated[int, Query(ge=1, le=MAX_PREFIXES)] = 20) -> list[PrefixReport]:
        """The stored prefixes that look-ups hit most, those that brought the most tokens first."""
        return operations.prefixes(limit)

    @router.get("/explain/{request_id:path}", tags=["requests"], responses=responses(404))
    def explain(request_id: Name) -> RequestReport:
        """Why a request hit what it hit. Of the last few hundred; an engine's request id is enough."""
        return operations.explain(request_id)


def _add_entries(router: APIRouter, operations: Operations) -> None:
    entries = operations.entries

    @router.get("/entries", tags=["entries"], responses=responses(404, 503))
    def list_entries(
        tier: Name = L1,
        prefix: Annotated[str, Query(max_length=2000)] = "",
        model_name: Name | None = None,
        salt: Salt | None = None,
        after: Annotated[str, Query(max_length=2000)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> EntryPage:
        """What a tier holds, page by page. ``salt`` is possible for ``l1`` only: keys do not tell it. With
        ``isolation: salt`` only ``l1`` is listed, and without ``salt`` what has none."""
        return entries.page(tier, Scope(prefix, model_name, salt), after, limit)

    @router.get("/entries/{key:path}", tags=["entries"], responses=responses(404))
    def get_entry(key: Key) -> EntryDetails:
        """One entry in every tier. Its frames are read and checked."""
        return entries.get(key)

    @router.delete("/entries/{key:path}", tags=["entries"], responses=responses(404))
    def delete_entry(key: Key) -> Deleted:
        """Delete one entry everywhere: from L1 now, from other tiers after the writes that are queued."""
        return entries.delete([key])

    @router.post(
        "/entries/delete", tags=["entries"], status_code=202, responses=responses(404, 413, 415, 429)
    )
    def delete_entries(body: DeleteBody, response: Response) -> Deleted | JobReport:
        """Delete keys (200, done at once in L1), or all of a prefix, a model or a salt (202, a job)."""
        scope = Scope(body.prefix or "", body.model_name, body.salt)
        if body.keys is None:
            return operations.delete(scope, body.tiers)
        if scope != Scope():
            raise OperationError("give either keys, or a prefix, model or salt")
        response.status_code = 200
        return entries.delete(body.keys, body.tiers)

    @router.post("/clear", tags=["entries"], status_code=202, responses=responses(404, 413, 415, 429))
    def clear(body: ClearBody) -> JobReport:
        """Drop everything from some tiers, or from all. What requests hold is freed when they end."""
        return operations.clear(body.tiers)

    @router.post("/warm", tags=["entries"], status_code=202, responses=responses(404, 413, 415, 429))
    def warm(body: WarmBody) -> JobReport:
        """Bring keys or prompts from the lower tiers to L1."""
        return operations.warm(
            keys=body.keys or (),
            prompts=body.prompts or (),
            salt=body.salt,
            model_name=body.model_name,
            fingerprint=body.namespace,
        )

    @router.post("/verify", tags=["entries"], status_code=202, responses=responses(404, 413, 415, 429))
    def verify(body: VerifyBody) -> JobReport:
        """Check what is stored, all or a sample: header, sizes, checksum, and whether it lies under its own key."""
        scope = Scope(body.prefix or "", body.model_name)
        return operations.verify(body.tiers, scope, body.sample, delete_bad=body.delete_bad)


def _add_pins(router: APIRouter, operations: Operations) -> None:
    pins = operations.pins

    @router.get("/pins", tags=["pins"])
    def list_pins() -> list[PinReport]:
        """What is kept in L1 for an operator."""
        return pins.list()

    @router.post("/pins", tags=["pins"], status_code=201, responses=responses(404, 409, 413, 415))
    def pin(body: PinBody) -> PinReport:
        """Keep entries that L1 holds, at most half of its budget in all, until unpinned or the time is over."""
        scope = Scope(body.prefix or "", body.model_name, body.salt)
        if body.keys is not None and body.tokens is None and scope == Scope():
            return operations.pin_keys(body.owner, body.seconds, body.keys)
        if body.tokens is not None and body.keys is None and body.prefix is None:
            return operations.pin_prompt(
                body.owner, body.seconds, body.tokens, body.salt or "", body.model_name
            )
        if body.keys is None and body.tokens is None and scope != Scope():
            return operations.pin_scope(body.owner, body.seconds, scope)
        raise OperationError("say what to pin: keys alone, tokens, or a prefix, model or salt")

    @router.delete("/pins/{pin_id}", tags=["pins"], responses=responses(404))
    def unpin(pin_id: Name) -> PinReport:
        """End one pin."""
        return pins.unpin(pin_id)

    @router.delete("/pins", tags=["pins"])
    def unpin_owner(owner: Name) -> list[PinReport]:
        """End all pins of an owner."""
        return pins.unpin_owner(owner)


def _add_quotas(router: APIRouter, operations: Operations) -> None:
    quotas = operations.quotas

    @router.get("/quotas", tags=["quotas"])
    def list_quotas() -> list[QuotaReport]:
        """What each salt with a quota may hold of each tier, and holds. Salts are not told, only names."""
        return quotas.list()

    @router.get("/quotas/{name}", tags=["quotas"], responses=responses(404))
    def get_quota(name: Name) -> QuotaReport:
        """One quota."""
        return quotas.get(name)

    @router.put("/quotas/{name}", tags=["quotas"], responses=responses(409, 413, 415))
    def set_quota(name: Name, body: QuotaBody) -> QuotaReport:
        """Set a quota, a new one or in place of what it was. Evicts what it does not allow. A restart brings the
        configured quotas back."""
        tiers = {tier: Quota(each.reserved_bytes, each.limit_bytes) for tier, each in body.tiers.items()}
        return quotas.put(name, body.salt, tiers)

    @router.delete("/quotas/{name}", tags=["quotas"], responses=responses(404))
    def remove_quota(name: Name) -> QuotaReport:
        """End a quota. What its salt holds stays, and competes with all others."""
        return quotas.remove(name)


def _add_jobs(router: APIRouter, operations: Operations) -> None:
    jobs = operations.jobs

    @router.get("/jobs", tags=["jobs"])
    def list_jobs() -> list[JobReport]:
        """Long operations, the latest first."""
        return jobs.list()

    @router.get("/jobs/{job_id}", tags=["jobs"], responses=responses(404))
    def get_job(job_id: Name) -> JobReport:
        """How far a job is."""
        return jobs.get(job_id)

    @router.delete("/jobs/{job_id}", tags=["jobs"], status_code=202, responses=responses(404, 409))
    def cancel_job(job_id: Name) -> JobReport:
        """Let a job stop at its next step; what it did stays done."""
        return jobs.cancel(job_id)


def _add_runtime(router: APIRouter, operations: Operations) -> None:
    runtime = operations.runtime

    @router.get("/runtime", tags=["runtime"])
    def get_runtime() -> RuntimeReport:
        """What can be changed while the server runs, as it is now."""
        return runtime.report()

    @router.patch("/runtime", tags=["runtime"], responses=responses(404, 409, 413, 415))
    def change_runtime(body: RuntimeBody) -> RuntimeReport:
        """Change it, all or nothing. A restart brings the configured values back."""
        return runtime.change(
            l1_budget_bytes=body.l1_budget_bytes,
            log_level=body.log_level,
            gate=body.gate,
            stores_frozen=body.stores_frozen,
            bypass=body.bypass,
            ttl_seconds=body.ttl_seconds,
        )
