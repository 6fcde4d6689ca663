"""Token lists of an operator: how much of them is held and where, without touching anything."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import Entry
from kvstrata.cache.walk import Candidates, best_cover, walk
from kvstrata.errors import NotFoundError
from kvstrata.hashing import PrefixHasher
from kvstrata.metrics import L1
from kvstrata.operations.report import Report
from kvstrata.types import Namespace, Piece, Prefix

ASK_SECONDS = 3.0
"""How long the tiers may take to say what they hold."""


@dataclass(frozen=True)
class NamespaceReport(Report):
    """What an inference engine has registered: only within one of these is KV exchangeable."""

    fingerprint: str
    """Identifies it; in hex."""
    engine: str
    model_name: str
    model_fingerprint: str
    kv_dtype: str
    world_size: int
    parallel_shape: str
    chunk_size: int
    block_size: int
    layout_fingerprint: str
    key_prefix: str
    """What its keys begin with; other namespaces of the same model and world size share it."""


@dataclass(frozen=True)
class TierCoverage(Report):
    """How much of a prompt one tier could give."""

    tier: str
    answered: bool
    """False: it is down, bypassed, or took too long."""
    leading_tokens: int
    """Leading tokens that this tier holds by itself."""
    used_tokens: int
    """Tokens of ``num_held_tokens`` that would come from here: L1 first, then the tiers in their order."""


@dataclass(frozen=True)
class Coverage(Report):
    """How much of a prompt is held."""

    namespace: NamespaceReport
    num_tokens: int
    num_held_tokens: int
    """Leading tokens that all tiers hold together."""
    tiers: list[TierCoverage]


@dataclass
class Held:
    """Where the pieces of a prompt are."""

    l1_pieces: list[Piece]
    l1_entries: list[list[Entry]]
    cover: list[Piece]
    """The pieces that continue what L1 holds."""
    keys: dict[str, set[str]]
    """Tier -> keys that it holds; of the tiers that answered."""
    complete: dict[str, set[bytes]] = field(default_factory=dict)
    """Tier -> chunk hashes of which it holds all shards."""

    @property
    def num_tokens(self) -> int:
        """Leading tokens that L1 and the tiers hold together."""
        return sum(piece.num_tokens for piece in (*self.l1_pieces, *self.cover))

    def source(self, chunk_hash: bytes) -> str | None:
        """The first tier that holds all of a piece."""
        return next((tier for tier, hashes in self.complete.items() if chunk_hash in hashes), None)


class Prompts:
    """Looks token lists up. Methods may take as long as a tier; call them on threads that may wait."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def namespaces(self) -> list[NamespaceReport]:
        """What clients have registered since the start."""
        return [report_namespace(namespace) for namespace in self._cache.namespaces()]

    def chosen(self, model_name: str | None, fingerprint: str | None) -> list[Namespace]:
        """The namespaces that are meant.

        Raises:
            NotFoundError: there is none.
        """
        known = self._cache.namespaces()
        found = [
            namespace
            for namespace in known
            if (model_name is None or namespace.model_name == model_name)
            and (fingerprint is None or namespace.fingerprint.hex().startswith(fingerprint))
        ]
        if not found:
            listed = ", ".join(sorted({namespace.model_name for namespace in known})) or "none"
            raise NotFoundError(
                f"no inference engine has registered such a model since the start; there is {listed}"
            )
        return found

    def coverage(self, namespace: Namespace, tokens: Sequence[int], salt: str) -> Coverage:
        """How much is held of ``tokens``. Counts as no look-up, moves nothing, keeps nothing."""
        prefix = hash_tokens(namespace, tokens, salt)
        held = self.locate(namespace, prefix)
        from_l1 = sum(piece.num_tokens for piece in held.l1_pieces)
        used: dict[str | None, int] = {}
        for piece in held.cover:
            source = held.source(piece.chunk_hash)
            used[source] = used.get(source, 0) + piece.num_tokens
        tiers = [TierCoverage(L1, True, from_l1, from_l1)]
        for tier in self._cache.tiers:
            alone = _cover(namespace, prefix, 0, held.complete.get(tier.name, set()))
            leading = sum(piece.num_tokens for piece in alone)
            tiers.append(TierCoverage(tier.name, tier.name in held.keys, leading, used.get(tier.name, 0)))
        num_held = from_l1 + sum(used.values())
        return Coverage(report_namespace(namespace), len(tokens), num_held, tiers)

    def locate(self, namespace: Namespace, prefix: Prefix) -> Held:
        """Where the pieces of a prompt are, each tier asked once."""
        with self._cache.guarded() as index:
            reached = walk(index, namespace, prefix, wait=False)
        candidates = Candidates(namespace, prefix, 0)
        answers = self._ask(candidates)
        keys = candidates.keys(range(len(candidates)))
        shards = namespace.world_size
        complete = {
            tier: {
                chunk_hash
                for at, chunk_hash in enumerate(candidates.hashes())
                if all(held[at * shards : (at + 1) * shards])
            }
            for tier, held in answers.items()
        }
        cover = []
        if not reached.complete:
            cover = _cover(namespace, prefix, reached.next_block, set().union(*complete.values()))
        held_keys = {tier: set(itertools.compress(keys, held)) for tier, held in answers.items()}
        return Held(reached.pieces, reached.entries, cover, held_keys, complete)

    def _ask(self, candidates: Candidates) -> dict[str, bytes]:
        """Which candidates each tier holds, of the tiers that answer in time. All are asked at once."""
        expires_at = time.monotonic() + ASK_SECONDS
        asked = [_Question(tier.name) for tier in self._cache.tiers] if len(candidates) else []
        for tier, question in zip(self._cache.tiers, asked, strict=False):
            tier.contains(candidates, expires_at, question.done)
        for question in asked:
            question.answered.wait(max(0.0, expires_at - time.monotonic()))
        return {q.tier: q.held for q in asked if q.held is not None}


def _cover(namespace: Namespace, prefix: Prefix, first_block: int, held: set[bytes]) -> list[Piece]:
    return best_cover(namespace, prefix, first_block, lambda piece: piece.chunk_hash in held)


class _Question:
    """What a tier was asked, and its answer."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.held: bytes | None = None
        self.answered = threading.Event()

    def done(self, held: bytes | None, _seconds: float = 0.0) -> None:
        self.held = held
        self.answered.set()


def hash_tokens(namespace: Namespace, tokens: Sequence[int], salt: str) -> Prefix:
    """The hashes of a prompt without extra keys (images, adapters)."""
    hasher = PrefixHasher(namespace, salt)
    hasher.extend(tokens)
    return hasher.prefix(tokens)


def report_namespace(namespace: Namespace) -> NamespaceReport:
    return NamespaceReport(
        fingerprint=namespace.fingerprint.hex(),
        engine=namespace.engine,
        model_name=namespace.model_name,
        model_fingerprint=namespace.model_fingerprint,
        kv_dtype=namespace.kv_dtype,
        world_size=namespace.world_size,
        parallel_shape=namespace.parallel_shape,
        chunk_size=namespace.chunk_size,
        block_size=namespace.layout.block_size,
        layout_fingerprint=namespace.layout.fingerprint.hex(),
        key_prefix=namespace.key_prefix,
    )
