"""``gate``: what load-or-recompute does to the time to the first token, over links of several speeds.

One real vLLM with our connector, and a real Redis behind the TCP proxy of the test kit, which sets the speed of
the link. The prompts are stored once. Then nothing more is stored, L1 is emptied before each request, and the mode
of the gate is changed while the server runs: ``auto``, ``never`` (recompute) and ``always`` meet the same engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from kvstrata.bench.linked import LinkedConfig, LinkedEngine, Sample, started
from kvstrata.bench.report import Environment, Report, Target, environment, median

_TARGETS = {
    "auto_over_recompute": Target(at_most=1.05),
    "auto_over_always_fast": Target(at_most=1.1),
}


class GateConfig(LinkedConfig, frozen=True, kw_only=True):
    """What to measure."""

    pairs: int = 6
    """At each speed, of a request with ``auto`` and one with ``never``; half as many of ``always`` and ``auto``."""
    speeds: tuple[float, ...] = (10.0, 1.25, 0.8, 0.2)
    """Of the link, as multiples of the one at which loading takes as long as computing. The fastest first: an
    estimate that says "recompute" is only tried again after a minute."""


@dataclass
class Measured:
    """What was measured at one speed. Pairs are neighbours: ``auto[i]`` next to ``never[i]``."""

    speed: float
    bytes_per_second: float
    first: Sample
    """The first request with ``auto`` after the speed has changed: its estimate is of the speed before."""
    auto: list[Sample] = field(default_factory=list)
    never: list[Sample] = field(default_factory=list)
    always: list[Sample] = field(default_factory=list)
    auto_beside_always: list[Sample] = field(default_factory=list)

    @property
    def over_recompute(self) -> list[float]:
        """The ratios of the pairs."""
        return [a.ttft_seconds / b.ttft_seconds for a, b in zip(self.auto, self.never, strict=True)]

    @property
    def over_always(self) -> list[float]:
        """The ratios of the other pairs."""
        pairs = zip(self.auto_beside_always, self.always, strict=True)
        return [a.ttft_seconds / b.ttft_seconds for a, b in pairs]


def run(config: GateConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure.

    Raises:
        ServerUnavailable, OSError: a server cannot be started, or failed.
    """
    machine = environment()
    with started(config, [{}], progress) as engine:
        measured = measure(config, engine, progress)
    return _report(config, machine, measured)


def measure(config: GateConfig, engine: LinkedEngine, progress: Callable[[str], None]) -> list[Measured]:
    """Store the prompts over an open link, then go through the speeds."""
    progress("storing the prompts")
    num_bytes = engine.store()
    prefill_seconds = median([engine.ask("never", prompt).ttft_seconds for prompt in engine.prompts])
    measured = []
    for speed in config.speeds:
        bytes_per_second = speed * num_bytes / prefill_seconds
        progress(f"a link of {bytes_per_second / 1e6:.1f} MB/s: {speed:g} of break-even")
        engine.limit(bytes_per_second)
        measured.append(_measure(config, engine, speed, bytes_per_second))
    engine.limit(None)
    return measured


def _measure(config: GateConfig, engine: LinkedEngine, speed: float, bytes_per_second: float) -> Measured:
    """One speed. ``always`` comes last: its loads would keep the estimates of ``auto`` fresh."""
    prompts = engine.prompts[1:]

    def pair(number: int, into: dict[str, list[Sample]]) -> None:
        """Two neighbours that take turns in who is first."""
        for mode in into if number // len(prompts) % 2 else reversed(into):
            into[mode].append(engine.ask(mode, prompts[number % len(prompts)]))

    measured = Measured(speed, bytes_per_second, engine.ask("auto", prompts[0]))
    for number in range(config.pairs):
        pair(number, {"auto": measured.auto, "never": measured.never})
    for number in range(max(1, config.pairs // 2)):
        pair(number, {"auto": measured.auto_beside_always, "always": measured.always})
    return measured


def _report(config: GateConfig, machine: Environment, measured: list[Measured]) -> Report:
    rows: list[tuple[str | float | int | None, ...]] = []
    ratios: dict[str, float] = {"auto_over_recompute": max(median(each.over_recompute) for each in measured)}
    samples: dict[str, list[float]] = {}
    for each in measured:
        name = f"{each.speed:g}"
        kinds = {
            "auto": each.auto,
            "recompute": each.never,
            "always": each.always,
            "auto_beside_always": each.auto_beside_always,
        }
        seconds = {kind: [sample.ttft_seconds for sample in found] for kind, found in kinds.items()}
        recompute = median(seconds["recompute"])
        verdicts = [sample.verdict for sample in each.auto]
        rows.append(
            (
                name,
                each.bytes_per_second / 1e6,
                recompute,
                median(seconds["auto"]),
                median(seconds["always"]),
                median(each.over_recompute),
                max(each.over_recompute),
                median(each.over_always),
                each.first.ttft_seconds / recompute,
                ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)),
            )
        )
        ratios[f"auto_over_recompute_{name}"] = median(each.over_recompute)
        ratios[f"auto_over_always_{name}"] = median(each.over_always)
        samples |= {f"{kind}_{name}": found for kind, found in seconds.items()}
        samples[f"first_{name}"] = [each.first.ttft_seconds]
    fastest = max(measured, key=lambda each: each.speed)
    ratios["auto_over_always_fast"] = median(fastest.over_always)
    return Report(
        benchmark="gate",
        environment=machine,
        config=msgspec.to_builtins(config),
        method=_METHOD.format(config=config, fewer=max(1, config.pairs // 2)),
        columns=(
            "speed",
            "MB/s",
            "recompute s",
            "auto s",
            "always s",
            "auto/recompute",
            "highest",
            "auto/always",
            "first/recompute",
            "auto said",
        ),
        rows=tuple(rows),
        ratios=ratios,
        targets=_TARGETS,
        samples=samples,
    )


_METHOD = (
    "{config.prompts} prompts of {config.prompt_tokens} tokens of natural text, stored in Redis before. Seconds "
    "are times to the first token with L1 empty, {config.pause_seconds:g} s apart. The link to Redis has 'speed' "
    "times the bandwidth at which loading takes as long as computing took. At each speed: one request with gate: "
    "auto whose estimate is that of the speed before (first), then {config.pairs} pairs of auto and never "
    "(recompute), then {fewer} of auto and always, in turns. Ratios are medians of the ratios of neighbours; "
    "auto_over_recompute is the largest of them."
)
