"""``quality``: what a codec's loss does to a real model's answers.

The KV of the first part of a passage goes through codec and frames, in chunks and pages as in service. Then the
model reads the rest of the passage, and goes on by itself, once with the KV as it was and once with what came back.
The model computes in float32, so that its own rounding does not hide the codec's; KV is bf16, as engines keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstrata.bench.codecs import LEVELS, chosen, key_file
from kvstrata.bench.kv import CHUNK_TOKENS, page_layout
from kvstrata.bench.passages import Passage, fingerprint, passages
from kvstrata.bench.plot import Point, scatter
from kvstrata.bench.report import Report, Target, environment
from kvstrata.bench.small_model import KV, SmallModel
from kvstrata.cache.frames import Transfer, accept_frame, describe, encode_frame, prepare
from kvstrata.codecs.base import Codec, PayloadDescription, Stage
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.codecs.pages import pack, unpack
from kvstrata.errors import KVStrataError
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES, FrameHeader
from kvstrata.types import KVLayout

_BOOTSTRAPS = 2000
_TARGETS = {
    "naive_nll_change_percent": Target(at_most=0),
    "floats_nll_change_percent": Target(at_most=0),
    "fp8_nll_change_percent": Target(at_most=0.5),
    "int4_nll_change_percent": Target(at_most=2),
    "cachegen_nll_change_percent": Target(at_most=1),
    "cachegen:high_nll_change_percent": Target(at_most=0.3),
}


class QualityConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    codecs: tuple[str, ...] = ()
    """Spellings; by default all that are installed and do not encrypt, and the levels of those that have some."""
    passages: int = 50
    rest_tokens: int = 128
    """Tokens of each passage that are predicted."""
    greedy_tokens: int = 32
    """Tokens that the model goes on by itself."""
    model: str | None = None
    """Folder of a model; by default SmolLM2-135M."""
    cache_dir: str = ".cache"
    """Where that is, or is made once."""
    seed: int = 0
    """Of the bootstrap."""


class Baseline(msgspec.Struct, frozen=True):
    """One passage with its KV as it was: what every codec is compared with."""

    passage: Passage
    kv: KV
    rest: Any
    """Logarithms of the probabilities over the rest: tokens x vocabulary."""
    greedy: Any
    """The same along what the model says by itself."""
    greedy_tokens: tuple[int, ...]
    """The passage's first token behind the prompt, then the model's own."""


class Outcome(msgspec.Struct, frozen=True):
    """One passage with one codec."""

    nll: float
    """Of a token of the rest, nats, the mean over the rest; with the KV as it was."""
    nll_change: float
    """The same with what came back, less ``nll``."""
    kl: float
    """Kullback-Leibler divergence of the next token's distribution from the untouched one, nats, mean."""
    same_top: float
    """Share of the greedy continuation's positions with the same most probable token."""
    greedy_same: int
    """Tokens of the greedy continuation until the first other one."""
    raw_bytes: int
    stored_bytes: int


class Figures(msgspec.Struct, frozen=True, array_like=True):
    """One codec, over all passages."""

    size: float
    """Bytes of the payloads over stored bytes. The last page of a passage is partly empty."""
    nll_change_percent: float
    low: float
    """Of the 95 % confidence interval of the change."""
    high: float
    worst: float
    """The change of the passage that it is worst for."""
    kl: float
    worst_kl: float
    same_top_percent: float
    worst_same_top: float
    greedy_same: float
    """Tokens until the first other one, mean."""
    worst_greedy: float


def run(config: QualityConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure. Takes seconds per passage and codec.

    Raises:
        ConfigError: a codec cannot be had, or there is no model.
    """
    machine = environment()
    notes: list[str] = []
    outcomes: dict[str, list[Outcome]] = {}
    with key_file() as path:
        codecs = chosen(config.codecs, LEVELS, {"key_file": str(path)}, notes)
    if not config.codecs:
        codecs = {name: codec for name, codec in codecs.items() if codec.stage is not Stage.ENCRYPT}
    model = SmallModel(Path(config.cache_dir), "float32", Path(config.model) if config.model else None)
    texts = passages(model.tokenize, config.passages, config.rest_tokens)
    for passage in texts:
        progress(f"passage {passage.number + 1} of {len(texts)}, {len(passage.prompt)} tokens")
        baseline = _baseline(model, passage, config.greedy_tokens)
        for name, codec in codecs.items():
            outcomes.setdefault(name, []).append(_outcome(model, baseline, codec))
    figures = {name: figures_of(of, config.seed) for name, of in outcomes.items()}
    return Report(
        benchmark="quality",
        environment=machine,
        config=msgspec.to_builtins(config) | {"model": model.name, "text": fingerprint(texts)},
        method=(
            f"{model.name} in float32 with KV in bf16; {len(texts)} passages of 1,000 to 3,000 tokens of Python's "
            f"language reference. The KV of all but the last {config.rest_tokens} tokens goes through codec and "
            f"frames in chunks of {CHUNK_TOKENS} tokens; negative log-likelihood (NLL) and KL divergence (nats) of "
            "the rest, against the KV as it was. NLL change: over all passages, with the bootstrap's interval over "
            f"passages; same top-1: along {config.greedy_tokens} tokens that the model says by itself."
        ),
        columns=("codec", *Figures.__struct_fields__),
        rows=tuple((name, *msgspec.structs.astuple(of)) for name, of in figures.items()),
        ratios={
            f"{name}_{field}": getattr(of, field)
            for name, of in figures.items()
            for field in ("size", "nll_change_percent")
        },
        targets=_TARGETS,
        notes=tuple(notes),
        samples={
            f"{name} {field}": [float(getattr(each, field)) for each in of]
            for name, of in outcomes.items()
            for field in Outcome.__struct_fields__
        },
    )


def _baseline(model: SmallModel, passage: Passage, greedy_tokens: int) -> Baseline:
    kv = model.kv(passage.prompt)
    first = passage.rest[0]
    greedy = (first, *model.continue_greedily(kv, first, greedy_tokens - 1))
    return Baseline(
        passage=passage,
        kv=kv,
        rest=model.log_probabilities(kv, passage.rest),
        greedy=model.log_probabilities(kv, greedy),
        greedy_tokens=greedy,
    )


def _outcome(model: SmallModel, baseline: Baseline, codec: Codec) -> Outcome:
    kv, raw_bytes, stored_bytes = through(codec, baseline.kv)
    rest = model.log_probabilities(kv, baseline.passage.rest)
    greedy = model.log_probabilities(kv, baseline.greedy_tokens)
    # Until the first other token a continuation of its own would have read the same: no need to make one.
    same = (greedy.argmax(-1) == baseline.greedy.argmax(-1)).numpy()
    nll = _nll(baseline.rest, baseline.passage.rest)
    return Outcome(
        nll=nll,
        nll_change=_nll(rest, baseline.passage.rest) - nll,
        kl=float((baseline.rest.exp() * (baseline.rest - rest)).sum(-1).mean()),
        same_top=float(same.mean()),
        greedy_same=int(np.logical_and.accumulate(same).sum()),
        raw_bytes=raw_bytes,
        stored_bytes=stored_bytes,
    )


def _nll(log_probabilities: Any, tokens: Sequence[int]) -> float:
    """Of each token after the first, which nothing here predicts; the mean."""
    found = log_probabilities[range(len(tokens) - 1), list(tokens[1:])]
    return -float(found.double().mean())


def through(codec: Codec, kv: KV) -> tuple[KV, int, int]:
    """KV as it comes back from frames of ``codec``; bytes of the payloads and of the frames' payloads.

    Raises:
        KVStrataError: a frame was not read again.
    """
    layout, tokens = page_layout(kv), kv.shape[2]
    decoders = Decoders(known=[codec])
    parts, raw_bytes, stored_bytes = [], 0, 0
    for first in range(0, tokens, CHUNK_TOKENS):
        chunk = kv[:, :, first : first + CHUNK_TOKENS]
        source, what = _slot(layout, first, chunk.shape[2])
        pack(chunk, what, source.payload)
        frame = encode_frame(source, codec)
        target, _ = _slot(layout, first, chunk.shape[2])
        miss = accept_frame(target, memoryview(bytearray(frame)), decoders)
        if miss is not None:
            raise KVStrataError(f"a frame of {codec.name} was not read again: {miss}")
        parts.append(unpack(target.payload, what))
        raw_bytes += what.payload_bytes
        stored_bytes += len(frame) - HEADER_BYTES
    return np.concatenate(parts, axis=2), raw_bytes, stored_bytes


def _slot(layout: KVLayout, first_token: int, num_tokens: int) -> tuple[Transfer, PayloadDescription]:
    """An empty slot for one chunk."""
    payload_bytes = layout.payload_bytes(num_tokens)
    expected = FrameHeader(
        shard=0,
        first_token=first_token,
        num_tokens=num_tokens,
        block_size=layout.block_size,
        payload_bytes=payload_bytes,
        encoded_bytes=payload_bytes,
        layout_fingerprint=layout.fingerprint,
        chunk_hash=bytes(32),
        tokens_hash=bytes(32),
        payload_checksum=b"",
        created_at=0,
        codec=NaiveCodec.name,
        dtype=layout.dtype,
    )
    room = memoryview(bytearray(HEADER_BYTES + payload_bytes + MAX_GROWTH_BYTES))
    transfer = Transfer("quality", room[: HEADER_BYTES + payload_bytes], expected, layout, room)
    prepare(transfer)
    return transfer, describe(expected, layout)


def figures_of(outcomes: Sequence[Outcome], seed: int) -> Figures:
    """One codec's figures; passages count alike, and the interval is the bootstrap's over passages."""

    def column(field: str) -> NDArray[np.float64]:
        return np.array([getattr(each, field) for each in outcomes], np.float64)

    nll, change, kl = column("nll"), column("nll_change"), column("kl")
    drawn = np.random.default_rng(seed).integers(len(nll), size=(_BOOTSTRAPS, len(nll)))
    low, high = np.quantile(change[drawn].sum(1) / nll[drawn].sum(1), (0.025, 0.975))
    return Figures(
        size=float(column("raw_bytes").sum() / column("stored_bytes").sum()),
        nll_change_percent=float(100 * change.sum() / nll.sum()),
        low=float(100 * low),
        high=float(100 * high),
        worst=float(100 * (change / nll).max()),
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        same_top_percent=float(100 * column("same_top").mean()),
        worst_same_top=float(100 * column("same_top").min()),
        greedy_same=float(column("greedy_same").mean()),
        worst_greedy=float(column("greedy_same").min()),
    )


def drawing(report: Report) -> str:
    """Size against loss, as SVG, from the report of a run."""
    figures = {str(row[0]): msgspec.convert(row[1:], Figures, strict=False) for row in report.rows}
    points = [Point(name, of.size, of.nll_change_percent, of.low, of.high) for name, of in figures.items()]
    title = (
        f"Loss against size, {report.config['passages']} passages, {report.config['model']}, 95% intervals"
    )
    return scatter(title, points, "raw bytes / stored bytes", "change of negative log-likelihood, %")
