"""What is said of a request: why it hit what it hit, token range by token range."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.cache.explain import Explanation
from kvstrata.cache.gate import Decision
from kvstrata.operations.report import Report


@dataclass(frozen=True)
class RangeReport(Report):
    """Tokens of a prompt that fared alike."""

    first_token: int
    num_tokens: int
    state: str
    """``hit``, ``miss``, or ``engine``: the inference engine said that it has them itself, and nobody looked."""
    tier: str | None
    """Where a hit came from."""
    reason: str | None
    """Why it is a miss."""
    held_by: list[str]
    """Tiers that said to hold what is missing."""


@dataclass(frozen=True)
class DecisionReport(Report):
    """What the gate said to loading from one tier."""

    tier: str
    verdict: str
    """``load``, ``trial`` (to measure the tier) or ``recompute``."""
    num_tokens: int
    num_bytes: int
    load_seconds: float | None
    """Estimate; null: the tier was not measured."""
    prefill_seconds: float | None
    """Estimate of computing the same tokens; null: the engine was not measured."""
    actual_load_seconds: float | None
    """What the load took; null: there was none, or it has not ended."""


@dataclass(frozen=True)
class OtherReport(Report):
    """An entry of L1 with the same tokens as the first that were missing."""

    key: str
    first_token: int
    differs_in: list[str]
    """``salt``, ``prefix`` (what is before these tokens), or fields of the namespace."""


@dataclass(frozen=True)
class RequestReport(Report):
    """One answered look-up."""

    request_id: str
    answered_at: float
    """Unix seconds."""
    seconds: float
    """From the first question to the answer, loading included."""
    model_name: str
    num_tokens: int
    num_hit_tokens: int
    """The nearest stored prefix ends here."""
    reason: str | None
    """Why it ends there; null after a full hit."""
    detail: str
    """The same in a sentence."""
    ranges: list[RangeReport]
    """The prompt from its first token to its last."""
    decisions: list[DecisionReport]
    same_tokens: list[OtherReport]
    """Where else L1 holds the first tokens that were missing. Known once the request has stored them; only when one
    request is asked for."""


def report_request(explanation: Explanation) -> RequestReport:
    """For the HTTP API."""
    return RequestReport(
        request_id=explanation.request_id,
        answered_at=explanation.answered_at,
        seconds=explanation.seconds,
        model_name=explanation.model_name,
        num_tokens=explanation.num_tokens,
        num_hit_tokens=explanation.num_hit_tokens,
        reason=explanation.reason,
        detail=explanation.detail,
        ranges=[
            RangeReport(r.first_token, r.num_tokens, r.state, r.tier, r.reason, list(r.held_by))
            for r in explanation.ranges
        ],
        decisions=[_decision(d, explanation.load_seconds.get(d.tier)) for d in explanation.decisions],
        same_tokens=[
            OtherReport(other.key, other.first_token, list(other.differs_in))
            for other in explanation.same_tokens
        ],
    )


def _decision(decision: Decision, actual_seconds: float | None) -> DecisionReport:
    return DecisionReport(
        tier=decision.tier,
        verdict=decision.verdict,
        num_tokens=decision.num_tokens,
        num_bytes=decision.num_bytes,
        load_seconds=decision.load_seconds,
        prefill_seconds=decision.prefill_seconds,
        actual_load_seconds=actual_seconds,
    )
