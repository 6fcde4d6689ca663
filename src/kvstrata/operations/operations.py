"""All operations of a server, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import Entry
from kvstrata.cache.recent import MAX_RECENT
from kvstrata.config import SETTINGS, Settings, mask, tier_configs
from kvstrata.errors import NotFoundError, OperationError
from kvstrata.metrics import L1
from kvstrata.operations.entries import Entries
from kvstrata.operations.jobs import Job, JobReport, Jobs
from kvstrata.operations.pins import PinReport, Pins
from kvstrata.operations.prefixes import PrefixReport, report_prefixes
from kvstrata.operations.prompts import Coverage, Prompts, hash_tokens
from kvstrata.operations.quotas import QuotaSettings
from kvstrata.operations.requests import RequestReport, report_request
from kvstrata.operations.runtime import Runtime
from kvstrata.operations.scope import Scope
from kvstrata.operations.tiers import TierReport, report_tiers
from kvstrata.operations.verify import Verification
from kvstrata.operations.warm import Warming


class Operations:
    """What an operator can see and do, over one core.

    Threading: any thread that may wait for a tier; never the server's own. ``expire`` is for that one.
    """

    def __init__(self, cache: Cache, settings: Settings) -> None:
        self._cache = cache
        self._settings = settings
        self.entries = Entries(cache)
        self.jobs = Jobs()
        self.pins = Pins(cache)
        self.prompts = Prompts(cache)
        self.quotas = QuotaSettings(cache)
        self.runtime = Runtime(cache, self.entries)
        self._verification = Verification(cache, self.entries)
        self._warming = Warming(cache, self.entries, self.prompts)

    # See

    def tiers(self) -> list[TierReport]:
        """L1 first, then the others in the order they are asked."""
        return report_tiers(self._cache)

    def config(self) -> dict[str, Any]:
        """The effective configuration: every setting, and the tiers that follow from them. Secrets are masked."""
        settings = {key: mask(getattr(self._settings, key), key) for key in SETTINGS}
        tiers = [mask(msgspec.to_builtins(config)) for config in tier_configs(self._settings)]
        return {"settings": settings, "tiers": tiers}

    def coverage(
        self, tokens: Sequence[int], salt: str, model_name: str | None, fingerprint: str | None
    ) -> list[Coverage]:
        """How much of a prompt is held, in each namespace that is meant."""
        namespaces = self.prompts.chosen(model_name, fingerprint)
        return [self.prompts.coverage(namespace, tokens, salt) for namespace in namespaces]

    def prefixes(self, limit: int) -> list[PrefixReport]:
        """The stored prefixes that are hit most, those that brought the most tokens first."""
        return report_prefixes(self._cache, limit)

    def recent(self, limit: int) -> list[RequestReport]:
        """The look-ups that were answered last, the latest first."""
        return [report_request(explanation) for explanation in self._cache.recent(limit)]

    def explain(self, request_id: str) -> RequestReport:
        """Why a request hit what it hit.

        Raises:
            NotFoundError: it is not among the last that were answered.
        """
        explanation = self._cache.explain(request_id)
        if explanation is None:
            raise NotFoundError(
                f"no look-up of request {request_id!r} is among the last {MAX_RECENT} that were answered"
            )
        return report_request(explanation)

    # Do

    def delete(self, scope: Scope, tiers: Sequence[str] | None) -> JobReport:
        """Delete what is in ``scope``, as a job.

        Raises:
            OperationError: ``scope`` is everything, which is what ``clear`` is for; or a tier does not exist.
        """
        if scope == Scope():
            raise OperationError("nothing says what to delete: give keys, a prefix, a model or a salt")
        names = self._names(tiers)
        return self.jobs.start("delete", lambda job: self.entries.delete_scope(job, scope, names))

    def clear(self, tiers: Sequence[str] | None) -> JobReport:
        """Drop everything from ``tiers`` (None: all), as a job."""
        names = self._names(tiers)

        def work(job: Job) -> None:
            if tiers is None:
                self.entries.clear(job)
            else:
                self.entries.delete_scope(job, Scope(), names)

        return self.jobs.start("clear", work)

    def verify(
        self, tiers: Sequence[str] | None, scope: Scope, sample: int | None, *, delete_bad: bool
    ) -> JobReport:
        """Check what is stored, as a job."""
        names = self._names(tiers)
        if scope.salt is not None and names != [L1]:
            raise OperationError("keys do not tell their salt: only tier l1 can be filtered by it")
        return self.jobs.start(
            "verify", lambda job: self._verification.verify(job, names, scope, sample, delete_bad=delete_bad)
        )

    def warm(
        self,
        *,
        keys: Sequence[str] = (),
        prompts: Sequence[Sequence[int]] = (),
        salt: str = "",
        model_name: str | None = None,
        fingerprint: str | None = None,
    ) -> JobReport:
        """Bring keys or prompts from the lower tiers to L1, as a job.

        Raises:
            OperationError, NotFoundError: neither or both are given; no engine has registered that model.
        """
        if bool(keys) == bool(prompts):
            raise OperationError("give either keys or token lists")
        namespaces = self.prompts.chosen(model_name, fingerprint)
        if keys:
            return self.jobs.start("warm", lambda job: self._warming.warm_keys(job, namespaces, keys))
        return self.jobs.start("warm", lambda job: self._warming.warm_prompts(job, namespaces, prompts, salt))

    def pin_keys(self, owner: str, seconds: float, keys: Iterable[str]) -> PinReport:
        """Keep entries of L1 by their keys."""
        found = [self.entries.find(key) for key in keys]
        held = [entry for entry in found if entry is not None]
        return self.pins.pin(owner, held, seconds, len(found) - len(held))

    def pin_scope(self, owner: str, seconds: float, scope: Scope) -> PinReport:
        """Keep what L1 holds of ``scope``."""
        return self.pins.pin(owner, self.entries.matching(scope), seconds)

    def pin_prompt(
        self, owner: str, seconds: float, tokens: Sequence[int], salt: str, model_name: str | None
    ) -> PinReport:
        """Keep the leading part of a token list that L1 holds, in all namespaces of a model."""
        entries: list[Entry] = []
        for namespace in self.prompts.chosen(model_name, None):
            held = self.prompts.locate(namespace, hash_tokens(namespace, tokens, salt))
            entries += [entry for shards in held.l1_entries for entry in shards]
        return self.pins.pin(owner, entries, seconds)

    def _names(self, tiers: Sequence[str] | None) -> list[str]:
        """The tiers that are meant, each once.

        Raises:
            NotFoundError: there is no such tier.
        """
        known = [L1, *(tier.name for tier in self._cache.tiers)]
        for name in tiers or ():
            if name != L1:
                self.entries.tier(name)
        return known if tiers is None else [name for name in known if name in tiers]

    def expire(self) -> None:
        """End pins whose time is over. Cheap."""
        self.pins.expire()

    def close(self) -> None:
        """Stop jobs."""
        self.jobs.close()
