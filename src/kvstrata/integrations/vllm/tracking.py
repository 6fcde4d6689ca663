"""What the scheduler's connector knows of one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvstrata.integrations.vllm.hashes import RequestHashes
from kvstrata.tracing import Attributes, Span
from kvstrata.types import Hit, Namespace

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass
class Lookup:
    """One attempt to find the request's prefix; a preempted request makes another one."""

    lease_id: str
    first_token: int
    """Tokens before it were in vLLM's own cache when it began; nothing was loaded for them. A chunk boundary."""
    hit: Hit | None = None
    """None while the answer is pending."""
    ask_again_at: float = 0.0
    """While it is pending: not before then (monotonic)."""
    num_local_tokens: int = 0
    """Tokens in vLLM's own cache when it was last asked."""
    logged: bool = False
    span: Span | None = None


@dataclass
class Tracked:
    """One request, from its arrival to its end."""

    request: Request
    read: bool
    """Whether to look for its prefix."""
    write: bool
    """Whether to store what it computes."""
    hashes: RequestHashes | None = None
    """Made once the namespace is known."""
    lookup: Lookup | None = None
    num_attempts: int = 0
    stored_tokens: int = 0
    """Tokens of full chunks that need not be offered again. A chunk boundary."""
    known_hashes: set[bytes] = field(default_factory=set)
    """Hashes of the pieces that its last hit consisted of: they need no storing."""
    hit_tokens_by_tier: Mapping[str, int] = field(default_factory=dict)
    span: Span | None = None
    """Its trace, from its arrival to its end; None while tracing is off."""

    @property
    def traceparent(self) -> str:
        """What others have to know to add to its trace; empty while tracing is off."""
        return "" if self.span is None else self.span.traceparent

    def begin_lookup(self, first_token: int) -> Lookup:
        """The attempt under way, or a new one under a lease id that was never used before."""
        if self.lookup is None:
            self.num_attempts += 1
            self.lookup = Lookup(f"{self.request.request_id}#{self.num_attempts}", first_token)
            if self.span is not None:
                about: Attributes = {
                    "kvstrata.request.id": self.lookup.lease_id,
                    "kvstrata.tokens.first": first_token,
                }
                self.lookup.span = self.span.begin("kvstrata.lookup", about, kind="client")
        return self.lookup

    def hashes_in(self, namespace: Namespace) -> RequestHashes:
        """The request's hash chain."""
        if self.hashes is None:
            self.hashes = RequestHashes(self.request, namespace)
        return self.hashes

    def forget_stored(self) -> None:
        """Offer everything again; what is held already costs nothing."""
        self.stored_tokens = 0
        self.known_hashes = set()

    def give_up(self) -> None:
        """Neither load nor store for this request any more."""
        self.read = self.write = False


def track(request: Request, *, reads: bool, writes: bool) -> Tracked:
    """Begin to track ``request``; ``reads`` and ``writes`` are what this instance may do at all.

    A request says in its ``kv_transfer_params`` what it does not want: ``kvstrata.skip_read``,
    ``kvstrata.skip_write`` (also ``lmcache.skip_save``).
    """
    params: Mapping[str, Any] = request.kv_transfer_params or {}
    # A streaming session drops tokens that it has shown before: a hash chain cannot follow.
    usable = not request.resumable
    return Tracked(
        request=request,
        # vLLM sets skip_reading_prefix_cache where every prompt token must be computed (prompt logprobs).
        read=usable
        and reads
        and not params.get("kvstrata.skip_read")
        and not request.skip_reading_prefix_cache,
        write=usable
        and writes
        and not (params.get("kvstrata.skip_write") or params.get("lmcache.skip_save")),
    )
