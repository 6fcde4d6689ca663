"""``link``: the time to the first token from a Redis behind links of several speeds, with each codec.

One real vLLM whose cache server has a tier for each codec, all in one Redis behind the TCP proxy of the test kit.
The prompts are stored in all of them once. From then on all tiers but one are bypassed, one after the other, so
that every codec is compared with ``naive`` in neighbouring requests to the same engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from kvstrata.bench.codecs import LEVELS, chosen, key_file
from kvstrata.bench.linked import LinkedConfig, LinkedEngine, Sample, started
from kvstrata.bench.plot import Line, lines
from kvstrata.bench.report import Environment, Report, environment, median
from kvstrata.codecs.naive import NaiveCodec

_RAW = NaiveCodec.name
_MIN_HIT_SHARE = 0.9


class LinkConfig(LinkedConfig, frozen=True, kw_only=True):
    """What to measure."""

    prompt_tokens: int = 2000
    codecs: tuple[str, ...] = ()
    """Spellings; by default all that are installed, and the levels of those that have some. ``naive`` is there
    in any case."""
    speeds: tuple[float, ...] = (50.0, 200.0, 1000.0)
    """Of the link, MB/s."""
    repeats: int = 6
    """Requests for each codec and speed."""


@dataclass
class Measured:
    """What was measured. All is in the order of the repeats, and neighbours have the same place."""

    raw_bytes: float
    """Of a prompt's KV."""
    from_l1: list[Sample] = field(default_factory=list)
    recomputed: list[Sample] = field(default_factory=list)
    loaded: dict[tuple[str, float], list[Sample]] = field(default_factory=dict)
    """By codec and speed."""

    def seconds(self, codec: str, speed: float) -> float:
        """To the first token, the median."""
        return _seconds(self.loaded[codec, speed])

    def passed_on(self, speed: float) -> float:
        """MB/s that the link really passed on, by what it took without codec: the machine limits a fast one."""
        return min(
            speed, self.raw_bytes / 1e6 / max(1e-9, self.seconds(_RAW, speed) - _seconds(self.from_l1))
        )

    def over_naive(self, codec: str, speed: float) -> float:
        """The median of the ratios of neighbours."""
        pairs = zip(self.loaded[codec, speed], self.loaded[_RAW, speed], strict=True)
        return median([one.ttft_seconds / raw.ttft_seconds for one, raw in pairs])


def run(config: LinkConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure. Takes a minute, and then some seconds for each codec, speed and repeat.

    Raises:
        ConfigError: a codec cannot be had.
        ServerUnavailable, OSError: a server cannot be started, or failed.
    """
    machine = environment()
    notes: list[str] = []
    with key_file() as path:
        codecs = chosen(config.codecs, LEVELS, {"key_file": str(path)}, notes)
        names = list(dict.fromkeys([_RAW, *codecs]))
        tiers = [{"name": tier_name(name), "codec": name} for name in names]
        keys = {"encryption_key_file": str(path)} if any(c.encrypts for c in codecs.values()) else {}
        with started(config, tiers, progress, **keys) as engine:
            measured = measure(config, engine, names, progress)
    return report(config, machine, measured, notes)


def tier_name(codec: str) -> str:
    """The name of the tier with this codec: its spelling, in the characters that names have."""
    return "".join(character if character.isalnum() else "-" for character in codec)


def measure(
    config: LinkConfig, engine: LinkedEngine, codecs: Sequence[str], progress: Callable[[str], None]
) -> Measured:
    """Store the prompts over an open link, then go through speeds, repeats and codecs."""
    progress("storing the prompts with every codec")
    measured = Measured(engine.store())
    prompts = engine.prompts[1:]
    for prompt in engine.prompts:
        measured.recomputed.append(engine.ask("never", prompt))

    def ask(codec: str, prompt: list[int]) -> Sample:
        engine.change(bypass={tier_name(other): other != codec for other in codecs})
        return engine.ask("always", prompt)

    for codec in codecs:  # as a warm-up, and to have something in L1
        ask(codec, engine.prompts[0])
    measured.from_l1 = [engine.ask_again(engine.prompts[0]) for _ in range(config.repeats)]
    for speed in config.speeds:
        engine.limit(speed * 1e6)
        for repeat in range(config.repeats):
            progress(f"a link of {speed:g} MB/s, {repeat + 1} of {config.repeats}")
            for codec in codecs[:: -1 if repeat % 2 else 1]:
                sample = ask(codec, prompts[repeat % len(prompts)])
                measured.loaded.setdefault((codec, speed), []).append(sample)
    engine.limit(None)
    return measured


def break_even(ratios: dict[float, float]) -> str:
    """Speed of a link above which loading takes longer than without the codec, from the ratios at some speeds.

    Between two of them it is read off a straight line, over the logarithm of the speed.
    """
    speeds = sorted(ratios)
    if ratios[speeds[0]] >= 1:
        return f"< {speeds[0]:g}"
    for slow, fast in itertools.pairwise(speeds):
        if ratios[fast] >= 1:
            share = (1 - ratios[slow]) / (ratios[fast] - ratios[slow])
            return f"{math.exp(math.log(slow) + share * math.log(fast / slow)):.0f}"
    return f"> {speeds[-1]:g}"


def report(config: LinkConfig, machine: Environment, measured: Measured, notes: Sequence[str] = ()) -> Report:
    """The table: for each codec and speed the seconds, and the break-even with ``naive``."""
    codecs = list(dict.fromkeys(codec for codec, _ in measured.loaded))
    over = {codec: {speed: measured.over_naive(codec, speed) for speed in config.speeds} for codec in codecs}
    passed_on = [measured.passed_on(speed) for speed in config.speeds]
    samples = {f"{codec} {speed:g}": found for (codec, speed), found in measured.loaded.items()}
    samples |= {"l1": measured.from_l1, "recomputed": measured.recomputed}
    return Report(
        benchmark="link",
        environment=machine,
        config=msgspec.to_builtins(config) | {"raw_bytes": measured.raw_bytes, "passed_on": passed_on},
        method=(
            f"{config.prompts} prompts of {config.prompt_tokens} tokens of natural text, "
            f"{measured.raw_bytes / 1e6:.0f} MB of KV each, stored in Redis with every codec before. Seconds are "
            f"times to the first token with L1 empty, medians of {config.repeats}; gate: always. The break-even is "
            "the speed of the link above which loading takes longer with the codec than without, read off between "
            "the speeds that were measured, as far as the machine reached them."
        ),
        columns=("codec", *(f"{speed:g} MB/s, s" for speed in config.speeds), "break-even MB/s"),
        rows=tuple(
            (
                codec,
                *(measured.seconds(codec, speed) for speed in config.speeds),
                "-" if codec == _RAW else break_even(dict(zip(passed_on, over[codec].values(), strict=True))),
            )
            for codec in codecs
        ),
        ratios={
            f"{codec}_over_naive_{speed:g}": ratio
            for codec in codecs
            if codec != _RAW
            for speed, ratio in over[codec].items()
        },
        targets={},
        notes=(*notes, *_remarks(config, measured)),
        samples={name: [each.ttft_seconds for each in found] for name, found in samples.items()},
    )


def _remarks(config: LinkConfig, measured: Measured) -> list[str]:
    """What a reader must know besides: what it takes without a link, and how fast the link was in truth."""
    l1, computed = _seconds(measured.from_l1), _seconds(measured.recomputed)
    speeds = ", ".join(f"{measured.passed_on(speed):.0f} of {speed:g} MB/s" for speed in config.speeds)
    found = [
        f"from L1 the first token takes {l1:.2f} s, computed {computed:.2f} s; the link passed on {speeds}"
    ]
    wanted = _MIN_HIT_SHARE * config.prompt_tokens
    for (codec, speed), samples in measured.loaded.items():
        missed = sum(sample.hit_tokens < wanted for sample in samples)
        if missed:
            found.append(f"{codec} at {speed:g} MB/s: {missed} of {len(samples)} were not loaded")
    return found


def _seconds(samples: Sequence[Sample]) -> float:
    return median([sample.ttft_seconds for sample in samples])


def drawing(of: Report) -> str:
    """Times over those without codec, by what the link passed on, as SVG, from the report of a run."""
    speeds = dict(zip(of.config["speeds"], of.config["passed_on"], strict=True))
    codecs = [str(row[0]) for row in of.rows if row[0] != _RAW]
    series = [
        Line(codec, {at: of.ratios[f"{codec}_over_naive_{speed:g}"] for speed, at in speeds.items()})
        for codec in codecs
    ]
    title = f"Loading {of.config['raw_bytes'] / 1e6:.0f} MB of KV: time to first token / that without codec"
    return lines(title, series, "what the link passed on, MB/s", "below 1 the codec pays", line_at=1)
