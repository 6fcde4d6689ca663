"""The scheduler's half of the connector: looks prefixes up, plans loads and stores, holds and ends leases."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kvstrata.client.base import Client
from kvstrata.config import Settings
from kvstrata.integrations.vllm.hashes import UnknownExtraKeyError
from kvstrata.integrations.vllm.metadata import LoadOp, StepMetadata, StoreOp, WorkerReport
from kvstrata.integrations.vllm.tracking import Lookup, Tracked, track
from kvstrata.tracing import Tracer
from kvstrata.types import Hit, Namespace, Piece, Prefix

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_PAUSES_PER_ASK = 3.0
"""vLLM asks for every pending look-up in every step. 25 of them took 9 to 70 ms of each step, 200 of them 80 to 140
(2 busy cores), of which running requests pay. So asking again has a quarter of the time only."""
_MAX_PAUSE_SECONDS = 0.1
"""However long an ask took and however many are pending."""


@dataclass
class _Loading:
    """A load that the workers have, or are about to get."""

    num_workers: int
    """Workers that have not reported its end."""
    hashes: frozenset[bytes]
    """Hashes of the hit's pieces."""


class SchedulerSide:
    """Lives in vLLM's scheduler process; called by it from one thread.

    Loads are asynchronous in vLLM's sense: a request is scheduled once every worker has reported the end of its
    load. vLLM can also load in the step that computes the request, a step sooner, but then it has put the
    blocks into its own prefix cache before a failed load is known, and others compute on them.

    Leases: a look-up leases what it found. Until the load has been handed to the workers the lease is ended
    here when it is not needed after all. Afterwards it ends when every worker has reported the load's end:
    a slot that is let go earlier could change under a running copy.

    Args:
        client: this process' client.
        make_namespace: called with a connected client until it returns the namespace; None: not yet.
        num_workers: workers that report each load.
        prefix_caching: whether vLLM keeps a prefix cache of its own. Then a request waits for the load of a
            prefix that another one has begun, and shares its blocks.
        tracer: None while tracing is off.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        make_namespace: Callable[[Client], Namespace | None],
        *,
        reads: bool,
        writes: bool,
        num_workers: int,
        prefix_caching: bool,
        tracer: Tracer | None = None,
    ) -> None:
        self._client = client
        self._tracer = tracer
        self._settings = settings
        self._make_namespace = make_namespace
        self._reads = reads
        self._writes = writes
        self._num_workers = num_workers
        self._prefix_caching = prefix_caching
        self._namespace: Namespace | None = None
        self._requests: dict[str, Tracked] = {}
        self._pending: set[str] = set()
        """Lease ids of look-ups whose answer is pending."""
        self._planned: list[LoadOp] = []
        self._loading: dict[str, _Loading] = {}
        self._num_planned_steps = 0
        self._num_ended_steps = 0
        self._clear_behind = 0
        """The last step that was planned before a clear: until it has ended it may store what is to be gone."""
        self._is_unanswered = False
        """Whether no server has said yet that it has carried the clear out."""
        self._cleared_by = ""
        """The server that has last said so, if one was asked."""

    @property
    def namespace(self) -> Namespace | None:
        """The namespace; None until workers and server have said what it depends on."""
        if self._namespace is None and self._client.connected:
            self._namespace = self._make_namespace(self._client)
        return self._namespace

    def add(self, request: Request) -> None:
        """A request has arrived."""
        self._client.connected  # noqa: B018 (polls for a server that came back, before it is asked)
        tracked = track(request, reads=self._reads, writes=self._writes)
        if self._tracer is not None:
            # vLLM hands these on while its own tracing is on: then both are in the client's trace.
            about = {
                "kvstrata.request.id": request.request_id,
                "kvstrata.tokens.prompt": request.num_prompt_tokens,
            }
            tracked.span = self._tracer.begin("kvstrata.request", about, parent=request.trace_headers)
        self._requests[request.request_id] = tracked

    def match(self, request: Request, num_local_tokens: int) -> tuple[int | None, bool]:
        """vLLM's ``get_num_new_matched_tokens``. May be called any number of times before the load."""
        tracked = self._requests.get(request.request_id)
        namespace = self.namespace
        # At least one token is always computed: its logits are needed.
        max_tokens = request.num_tokens - 1
        if tracked is None or not tracked.read or namespace is None or max_tokens <= num_local_tokens:
            return 0, False
        if self._is_clearing:
            return 0, False
        self._drop_outdated(tracked, num_local_tokens)
        lookup = tracked.begin_lookup(num_local_tokens // namespace.chunk_size * namespace.chunk_size)
        if lookup.hit is None:
            if time.monotonic() < lookup.ask_again_at:
                return None, False
            prefix = _hashed(tracked, lambda: tracked.hashes_in(namespace).prefix(request.num_tokens))
            if prefix is None:
                return 0, False
            hit = self._ask(lookup, namespace, prefix)
            if hit is None:
                return None, False
            if self._is_clearing:  # the answer is that of a server which has just come
                self._end_lookup(tracked)
                return 0, False
            lookup.hit = hit
        num_hit_tokens = min(lookup.hit.num_tokens, max_tokens)
        num_tokens = self._worth_loading(num_hit_tokens - num_local_tokens)
        if num_tokens and self._is_being_loaded(lookup.hit, num_local_tokens):
            return None, False
        lookup.num_local_tokens = num_local_tokens
        if not lookup.logged:
            lookup.logged = True
            logger.info(
                "Reqid: %s, Total tokens %d, KVStrata hit tokens: %d, need to load: %d",
                request.request_id,
                request.num_tokens,
                num_hit_tokens,
                num_tokens,
            )
        return num_tokens, num_tokens > 0

    def _ask(self, lookup: Lookup, namespace: Namespace, prefix: Prefix) -> Hit | None:
        """The answer; None while it is pending."""
        began_at = time.monotonic()
        traceparent = "" if lookup.span is None else lookup.span.traceparent
        hit = self._client.lookup(
            lookup.lease_id, namespace, prefix, lookup.first_token, traceparent=traceparent
        )
        if hit.pending:
            self._pending.add(lookup.lease_id)
            now = time.monotonic()
            pause_seconds = _PAUSES_PER_ASK * len(self._pending) * (now - began_at)
            lookup.ask_again_at = now + min(pause_seconds, _MAX_PAUSE_SECONDS)
            return None
        self._pending.discard(lookup.lease_id)
        if lookup.span is not None:
            lookup.span.end({"kvstrata.tokens.hit": hit.num_tokens})
        return hit

    def _drop_outdated(self, tracked: Tracked, num_local_tokens: int) -> None:
        """End a look-up that left out tokens which vLLM has evicted meanwhile."""
        lookup = tracked.lookup
        if lookup is not None and lookup.first_token > num_local_tokens:
            self._end_lookup(tracked)

    def _end_lookup(self, tracked: Tracked) -> None:
        """Its load is not wanted (any more)."""
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is not None:
            self._pending.discard(lookup.lease_id)
            self._client.release(lookup.lease_id)
            if lookup.span is not None:
                lookup.span.end()

    def _worth_loading(self, num_tokens: int) -> int:
        return num_tokens if num_tokens >= max(1, self._settings.min_retrieve_tokens) else 0

    def _is_being_loaded(self, hit: Hit, first_token: int) -> bool:
        """Whether the next piece is under way into blocks that vLLM will share once they are there."""
        if not self._prefix_caching or not self._loading:
            return False
        piece = next(piece for piece in hit.pieces if piece.first_token + piece.num_tokens > first_token)
        return any(piece.chunk_hash in loading.hashes for loading in self._loading.values())

    def allocated(self, request: Request, block_ids: list[int], num_external_tokens: int) -> None:
        """vLLM's ``update_state_after_alloc``: the request has its blocks. Plan the load or end the lease."""
        tracked = self._requests.get(request.request_id)
        namespace = self._namespace
        if tracked is None or tracked.lookup is None or namespace is None:
            return
        lookup, tracked.lookup = tracked.lookup, None
        self._pending.discard(lookup.lease_id)
        if lookup.hit is not None:
            tracked.known_hashes = {piece.chunk_hash for piece in lookup.hit.pieces}
            if lookup.hit.pieces and lookup.hit.pieces[0].first_token == 0:
                # Otherwise nobody has looked whether what is before is held: it is offered.
                tracked.stored_tokens = lookup.hit.num_tokens // namespace.chunk_size * namespace.chunk_size
            tracked.hit_tokens_by_tier = lookup.hit.tokens_by_tier
        if num_external_tokens == 0 or lookup.hit is None:
            self._client.release(lookup.lease_id)
            return
        self._loading[lookup.lease_id] = _Loading(self._num_workers, frozenset(tracked.known_hashes))
        first_token = lookup.num_local_tokens
        end_token = first_token + num_external_tokens
        first_block = first_token // namespace.layout.block_size
        self._planned.append(
            LoadOp(
                request_id=request.request_id,
                lease_id=lookup.lease_id,
                hit=lookup.hit,
                first_token=first_token,
                end_token=end_token,
                block_ids=tuple(block_ids[first_block : namespace.layout.num_blocks(end_token)]),
                traceparent=tracked.traceparent,
            )
        )

    def hit_tokens_by_tier(self, request: Request) -> Mapping[str, int]:
        """Which tiers the request's last hit came from."""
        tracked = self._requests.get(request.request_id)
        return tracked.hit_tokens_by_tier if tracked else {}

    def plan_step(self, output: SchedulerOutput) -> StepMetadata:
        """vLLM's ``build_connector_meta``: what the workers are to load before and store after this step."""
        self._num_planned_steps += 1
        if self._owes_clear and self._client.connected:
            self._drop_stored()
        loads, self._planned = tuple(self._planned), []
        stores = tuple(
            op
            for request_id, num_tokens in output.num_scheduled_tokens.items()
            if (op := self._plan_store(request_id, num_tokens, output)) is not None
        )
        prefill_tokens = self._prefill_tokens(output)
        return StepMetadata(
            namespace=self._namespace if loads or stores or prefill_tokens else None,
            loads=loads,
            stores=stores,
            prefill_tokens=prefill_tokens,
            number=self._num_planned_steps,
        )

    def _plan_store(self, request_id: str, num_scheduled: int, output: SchedulerOutput) -> StoreOp | None:
        tracked = self._requests.get(request_id)
        namespace = self.namespace
        if tracked is None or not tracked.write or namespace is None:
            return None
        request, chunk_size = tracked.request, namespace.chunk_size
        computed = request.num_computed_tokens
        # Scheduled tokens may be drafts, or not sampled yet: only tokens that are known have their final KV.
        known = min(computed + num_scheduled, request.num_tokens)
        stable = known if self._settings.save_decode_cache else min(known, request.num_prompt_tokens)
        first = tracked.stored_tokens // chunk_size
        end = stable // chunk_size
        ends_prompt = computed < request.num_prompt_tokens <= known
        if (end <= first and not ends_prompt) or self._is_clearing or not self._client.connected:
            return None  # what nobody takes now is offered again in a later step
        with_tail = ends_prompt and self._settings.save_unfull_chunk
        pieces = _hashed(tracked, lambda: _pieces(tracked, namespace, first, end, with_tail=with_tail))
        if pieces is None:
            return None
        tracked.stored_tokens = max(first, end) * chunk_size
        blocks = output.kv_connector_block_state
        block_ids = blocks.get_block_ids(request_id) if blocks is not None and pieces else None
        if not block_ids:
            return None
        layout = namespace.layout
        first_block = pieces[0].first_token // layout.block_size
        end_block = layout.num_blocks(pieces[-1].first_token + pieces[-1].num_tokens)
        logger.info(
            "Storing KV cache for %d out of %d tokens for request %s",
            sum(piece.num_tokens for piece in pieces),
            request.num_prompt_tokens if ends_prompt else request.num_tokens,
            request_id,
        )
        block_ids_of_pieces = tuple(block_ids[0][first_block:end_block])
        return StoreOp(request_id, tuple(pieces), first_block, block_ids_of_pieces, tracked.traceparent)

    def _prefill_tokens(self, output: SchedulerOutput) -> int:
        """Prompt tokens that the step computes; 0 when it does other work too, which spoils a measurement."""
        total = 0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None or tracked.request.num_computed_tokens >= tracked.request.num_prompt_tokens:
                return 0
            total += num_tokens
        return total

    def report(self, report: WorkerReport) -> None:
        """What the workers say of their loads."""
        for lease_id, count in report.ended.items():
            loading = self._loading.get(lease_id)
            if loading is None:
                continue
            loading.num_workers -= count
            if loading.num_workers <= 0:
                del self._loading[lease_id]
                self._client.release(lease_id)
        for lease_id in report.failed:
            tracked = self._requests.get(lease_id.rpartition("#")[0])
            if tracked is not None:
                # The same look-up would promise the same again: compute this request, and store it.
                tracked.read = False
                tracked.forget_stored()
        was_clearing = self._is_clearing
        self._num_ended_steps = max(self._num_ended_steps, report.step)
        if was_clearing and not self._is_clearing:
            self._drop_stored()

    def finish(self, request: Request) -> None:
        """The request has ended, one way or another."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return
        self._end_lookup(tracked)
        if tracked.span is not None:
            tracked.span.end({"kvstrata.tokens.hit": sum(tracked.hit_tokens_by_tier.values())})

    def clear(self) -> None:
        """Drop everything that is cached for this engine's namespace, for example because of new weights.

        Steps that are under way (vLLM schedules ahead) store what they compute after this. So nothing is looked
        up or stored until they have ended, and then everything is dropped once more. Nor before the server has
        carried it out: one that is away is told when it is back, as its tiers still hold everything, and so is
        each that comes later.
        """
        self._clear_behind = self._num_planned_steps
        self._drop_stored()
        for tracked in self._requests.values():
            tracked.forget_stored()
            # What has been found or computed before must not come back after.
            self._end_lookup(tracked)
            if tracked.request.num_computed_tokens > 0:
                tracked.write = False

    @property
    def _is_clearing(self) -> bool:
        return self._owes_clear or self._num_ended_steps < self._clear_behind

    @property
    def _owes_clear(self) -> bool:
        """Whether the server is to be told (again). One that was ended may not have cleared its tiers by then: the
        one that comes after it is told, too."""
        if self._is_unanswered:
            return True
        server = self._client.server_id
        return bool(self._cleared_by and server) and server != self._cleared_by

    def _drop_stored(self) -> None:
        namespace = self.namespace
        self._is_unanswered = namespace is None or self._client.clear(namespace) is None
        if not self._is_unanswered:
            self._cleared_by = self._client.server_id

    def close(self) -> None:
        """Disconnect; the server ends what is left of the leases."""
        if self._tracer is not None:
            self._tracer.close()  # first: whoever ends this process does not wait for long
        if self._owes_clear:
            self._drop_stored()
            if self._owes_clear:
                logger.error(
                    "What was stored before the last reset could not be dropped: clear the cache by hand"
                )
        self._client.close()


def _hashed(tracked: Tracked, compute: Callable[[], _T]) -> _T | None:
    """The result of ``compute``; None, and the request is left alone, when its tokens cannot be hashed.

    Whatever a request is made of, it is served: what cannot be hashed is only not cached.
    """
    try:
        return compute()
    except UnknownExtraKeyError as error:
        logger.warning("Request %s is not cached: %s", tracked.request.request_id, error)
    except Exception:
        logger.exception("Request %s is not cached", tracked.request.request_id)
    tracked.give_up()
    return None


def _pieces(tracked: Tracked, namespace: Namespace, first: int, end: int, *, with_tail: bool) -> list[Piece]:
    """The chunks ``first .. end - 1``, and the end of the prompt, without what the last hit consisted of."""
    hashes = tracked.hashes_in(namespace)
    pieces = hashes.chunks(first, end)
    if with_tail:
        pieces += hashes.tail(tracked.request.num_prompt_tokens)
    return [piece for piece in pieces if piece.chunk_hash not in tracked.known_hashes]
