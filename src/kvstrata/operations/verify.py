"""Verifying: are stored entries what they say they are?"""

from __future__ import annotations

import random
from functools import partial

from kvstrata.cache.cache import Cache
from kvstrata.cache.frames import header_in_slot, transfer_of
from kvstrata.cache.index import Entry, State
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.errors import FrameError
from kvstrata.frame import FrameHeader, payload_checksum
from kvstrata.metrics import L1
from kvstrata.operations.entries import READ_SECONDS, Entries, readable_key, scan
from kvstrata.operations.jobs import Job
from kvstrata.operations.scope import Scope
from kvstrata.tiers.inspect import inspect_frame
from kvstrata.types import Miss, parse_key

MAX_BAD_LISTED = 100


class Verification:
    """Reads entries and checks magic, version, sizes, checksums and whose key they are under. Work of jobs.

    Figures per tier: ``checked``, ``bad``, ``gone`` (evicted meanwhile) and, for L1, ``unsealed``: entries
    without a checksum of what is in L1, as no tier was given them as they are, or one delivered them encoded.
    ``bad_keys`` lists the first hundred.
    """

    def __init__(self, cache: Cache, entries: Entries) -> None:
        self._cache = cache
        self._entries = entries

    def verify(
        self, job: Job, tiers: list[str], scope: Scope, sample: int | None, *, delete_bad: bool
    ) -> None:
        """Check all entries of ``tiers`` in ``scope``, or a random ``sample`` of so many per tier.

        Raises:
            NotFoundError: there is no such tier.
            TierUnavailable: a tier does not answer.
        """
        for name in tiers:
            figures = {"checked": 0, "bad": 0, "gone": 0, "bad_keys": []}
            job.result[name] = figures
            if name == L1:
                self._verify_l1(job, scope, sample, delete_bad=delete_bad)
            else:
                self._verify_tier(job, name, scope, sample, delete_bad=delete_bad)

    def _verify_l1(self, job: Job, scope: Scope, sample: int | None, *, delete_bad: bool) -> None:
        figures = job.result[L1]
        figures["unsealed"] = 0
        chosen = self._entries.matching(scope)
        if sample is not None and sample < len(chosen):
            chosen = random.sample(chosen, sample)
        job.num_total = (job.num_total or 0) + len(chosen)
        for entry in chosen:
            fault = self._fault_in_slot(entry)
            if fault is None:
                figures["gone"] += 1
            elif fault == "unsealed":
                figures["unsealed"] += 1
            else:
                self._count(job, L1, readable_key(entry), fault, delete_bad=delete_bad)
            job.advance()

    def _fault_in_slot(self, entry: Entry) -> str | None:
        """What is wrong with an entry of L1, "" for nothing; None when it is gone."""
        with self._cache.guarded() as index:
            if index.entries.get(entry.key) is not entry or entry.state is not State.READY:
                return None
            entry.leases += 1
        transfer = transfer_of(self._cache.pool, entry, b"", 0)
        try:
            header = header_in_slot(transfer)
            if header.codec != NaiveCodec.name or not any(header.payload_checksum):
                return "unsealed"
            if header.chunk_hash != entry.chunk_hash or header.num_tokens != entry.num_tokens:
                return "another entry's header"
            return "" if payload_checksum(transfer.payload) == header.payload_checksum else "checksum"
        except FrameError as error:
            return str(error)
        finally:
            with self._cache.guarded() as index:
                index.unlease(entry)

    def _verify_tier(
        self, job: Job, name: str, scope: Scope, sample: int | None, *, delete_bad: bool
    ) -> None:
        tier = self._entries.tier(name)
        if sample is None:
            matches = scope.key_filter()
            for keys in scan(tier, scope.prefix):
                self._verify_keys(job, name, [key for key in keys if matches(key)], delete_bad=delete_bad)
            return
        chosen = self._sampled(job, name, scope, sample)
        job.num_total = (job.num_total or 0) + len(chosen)
        self._verify_keys(job, name, chosen, delete_bad=delete_bad)

    def _sampled(self, job: Job, name: str, scope: Scope, sample: int) -> list[str]:
        """A uniform sample of a tier's keys (reservoir sampling: their number is not known)."""
        matches = scope.key_filter()
        chosen: list[str] = []
        num_seen = 0
        for keys in scan(self._entries.tier(name), scope.prefix):
            job.check()
            for key in filter(matches, keys):
                num_seen += 1
                if len(chosen) < sample:
                    chosen.append(key)
                elif (place := random.randrange(num_seen)) < sample:  # noqa: S311  no secret
                    chosen[place] = key
        return chosen

    def _verify_keys(self, job: Job, name: str, keys: list[str], *, delete_bad: bool) -> None:
        tier = self._entries.tier(name)
        for key in keys:
            frame = tier.run(partial(inspect_frame, key=key), READ_SECONDS)
            if isinstance(frame, Miss):
                absent = frame.reason in {"absent", "evicted", "expired"}
                fault = None if absent else f"{frame.reason}: {frame.detail}"
            else:
                fault = frame.fault or _identity_fault(key, frame.header)
            if fault is None:
                job.result[name]["gone"] += 1
            else:
                self._count(job, name, key, fault, delete_bad=delete_bad)
            job.advance()

    def _count(self, job: Job, tier: str, key: str, fault: str, *, delete_bad: bool) -> None:
        figures = job.result[tier]
        figures["checked"] += 1
        if not fault:
            return
        figures["bad"] += 1
        if len(figures["bad_keys"]) < MAX_BAD_LISTED:
            figures["bad_keys"].append({"key": key, "fault": fault})
        if delete_bad:
            self._entries.delete([key], [tier])


def _identity_fault(key: str, header: FrameHeader | None) -> str:
    """Whether an intact frame lies under another's key."""
    if header is None:
        return "no header"
    parsed = parse_key(key)
    if (header.chunk_hash, header.shard) != (parsed.chunk_hash, parsed.worker_id):
        return "the frame is another key's"
    return ""
