"""What the demo measured: one row per phase, as JSON and as a table."""

from __future__ import annotations

import msgspec

COLUMNS = (
    "phase",
    "prompt tokens",
    "hit l1",
    "hit redis",
    "hit disk",
    "TTFT [s]",
    "speed-up",
    "answer equal",
)


class HitTokens(msgspec.Struct, frozen=True):
    """Prompt tokens that were loaded, not computed, by the tier that supplied them."""

    l1: int = 0
    redis: int = 0
    disk: int = 0

    def since(self, before: HitTokens) -> HitTokens:
        """What was added after ``before``."""
        return HitTokens(self.l1 - before.l1, self.redis - before.redis, self.disk - before.disk)


class Phase(msgspec.Struct, frozen=True):
    """One request."""

    name: str
    """``cold``, ``l1``, ``redis``, ``disk`` or ``shared_prefix``."""
    prompt_tokens: int
    hit_tokens: HitTokens
    ttft_seconds: float
    speedup: float
    """The cold phase's time to the first token over this one's."""
    answer_equal: bool
    """Whether all tokens of the greedy answer are those of vLLM without connector."""


class DemoReport(msgspec.Struct, frozen=True):
    """The content of ``demo-report.json``."""

    phases: tuple[Phase, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """The table, without its header."""
        return [
            (
                phase.name,
                f"{phase.prompt_tokens}",
                f"{phase.hit_tokens.l1}",
                f"{phase.hit_tokens.redis}",
                f"{phase.hit_tokens.disk}",
                f"{phase.ttft_seconds:.2f}",
                f"{phase.speedup:.1f}x",
                "yes" if phase.answer_equal else "NO",
            )
            for phase in self.phases
        ]

    def shortcomings(self) -> list[str]:
        """What the demo was to show and did not, in words; empty when all is well."""
        found = [
            f"the answer of phase {phase.name} differs" for phase in self.phases if not phase.answer_equal
        ]
        for phase in self.phases:
            if phase.name in {"l1", "redis", "disk"}:
                hit = getattr(phase.hit_tokens, phase.name)
                if hit < phase.prompt_tokens - 1:
                    found.append(f"{phase.name} supplied {hit} of {phase.prompt_tokens} tokens")
        return found
