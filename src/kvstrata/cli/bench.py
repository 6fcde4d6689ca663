"""``kvstrata bench``: what the cache costs and brings on this machine. The measuring is in ``kvstrata.bench``.

A benchmark is imported when it is called for: their dependencies take a while, and no other command needs them.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer

from kvstrata.bench.report import Report, cell, summary
from kvstrata.cli.output import FAULT, print_json, print_table

app = typer.Typer(
    help="Measure on this machine what the cache costs and brings. Ratios of one run can be compared, absolute "
    "figures only on an idle machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: kvstrata bench copy --json copy.json",
)

T = TypeVar("T")


def _writable(file: str | None) -> str | None:
    """Found out before minutes of measuring."""
    if file not in (None, "-") and not Path(file).parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(Path(file).parent)!r} to write {file!r} to")
    return file


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        callback=_writable,
        help="Write all figures as JSON to a file, or print them.",
    ),
]
Codecs = Annotated[
    list[str] | None,
    typer.Option(
        "--codec", metavar="CODEC", help="As in remote_serde; may be given again. Default: all there are."
    ),
]
Model = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the model. Default: SmolLM2-135M.")]
LogDir = Annotated[str | None, typer.Option(metavar="DIR", help="For the model and logs.")]
PromptTokens = Annotated[int | None, typer.Option(min=256, help="Tokens of a prompt.")]
Runs = Annotated[int | None, typer.Option("--runs", min=1, help="Runs after the warm-up.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 when a target is missed.")]


@app.callback()
def _end_cleanly(context: typer.Context) -> None:
    # What a benchmark started and wrote is taken back when it is told to end, as on Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


@app.command("lookup", epilog="Example: kvstrata bench lookup --chunks 100000 --transport tcp")
def lookup(
    *,
    chunks: Annotated[int, typer.Option(min=1, help="Size of the index in the end.")] = 1_000_000,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of a looked-up prompt.")] = 32_000,
    transport: Annotated[
        list[str] | None, typer.Option(metavar="ipc|tcp", help="May be given twice. Default: both.")
    ] = None,
    runs: Runs = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Time look-ups through the socket, and weigh the index.

    At several sizes of the index.

    Starts a server of its own, whose pool takes 4 KiB of memory per chunk.
    """
    from kvstrata.bench.lookup import LookupConfig, run  # noqa: PLC0415

    config = _config(
        LookupConfig, chunks=chunks, prompt_tokens=prompt_tokens, transports=transport, runs=runs
    )
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("copy", epilog="Example: kvstrata bench copy --runs 30 --json -")
def copy(runs: Runs = None, as_json: Json = None, strict: Strict = False) -> int:
    """Time copies between pages and slots against a memcpy.

    Needs torch.
    """
    from kvstrata.bench.copy import CopyConfig, run  # noqa: PLC0415

    config = _config(CopyConfig, runs=runs)
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("codec", epilog="Example: kvstrata bench codec --codec floats --codec zstd:3")
def codec(
    *,
    codecs: Codecs = None,
    chunks: Annotated[int | None, typer.Option(min=2, help="Passages of 256 tokens.")] = None,
    cache_dir: Annotated[str | None, typer.Option(metavar="DIR", help="For the model.")] = None,
    runs: Runs = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Weigh and time codecs on the KV of a real model.

    Says up to which speed of a link each pays.

    Needs torch and the demo extra: the small model makes the KV.
    """
    from kvstrata.bench.codec import CodecBenchConfig, run  # noqa: PLC0415

    config = _config(CodecBenchConfig, codecs=codecs, chunks=chunks, cache_dir=cache_dir, runs=runs)
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("quality", epilog="Example: kvstrata bench quality --codec cachegen:high --passages 10")
def quality(
    *,
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="CODEC",
            help="As in remote_serde; may be given again. Default: all but encryption.",
        ),
    ] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="Passages of 1,000 to 3,000 tokens.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 passages: a first impression.")] = False,
    rest_tokens: Annotated[int | None, typer.Option(min=2, max=900, help="Tokens to predict.")] = None,
    model: Model = None,
    cache_dir: Annotated[str | None, typer.Option(metavar="DIR", help="For the model.")] = None,
    svg: Annotated[
        str | None, typer.Option(metavar="FILE", callback=_writable, help="Draw size against loss.")
    ] = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Measure what codecs do to a real model's predictions.

    Needs torch and the demo extra. Each passage takes seconds, and again some for each codec.
    """
    from kvstrata.bench.quality import QualityConfig, drawing, run  # noqa: PLC0415

    config = _config(
        QualityConfig,
        codecs=codecs,
        passages=passages or (4 if quick else None),
        rest_tokens=rest_tokens,
        model=model,
        cache_dir=cache_dir,
    )
    report = run(config, _progress)
    if svg is not None:
        Path(svg).write_text(drawing(report))
    return _show(report, as_json, strict=strict)


@app.command("tier", epilog="Example: kvstrata bench tier redis://127.0.0.1:6379")
def tier(
    url: Annotated[str, typer.Argument(metavar="URL", help="redis://HOST:PORT, disk:///DIR ...")],
    *,
    frame_bytes: Annotated[int | None, typer.Option(min=4096, help="Bytes of one frame.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of one round.")] = None,
    runs: Runs = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Time a tier's operations against a raw loop.

    Read, write and contains; the raw loop is of the same transport.

    Writes some entries there and deletes them again.
    """
    from kvstrata.bench.tier import TierBenchConfig, run  # noqa: PLC0415

    config = _config(TierBenchConfig, url=url, frame_bytes=frame_bytes, num_frames=num_frames, runs=runs)
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("faults", epilog="Example: kvstrata bench faults --round-trip-ms 5 --chunks 128")
def faults(
    *,
    round_trip_ms: Annotated[float | None, typer.Option(min=0, help="Latency of the link to L2.")] = None,
    chunks: Annotated[int | None, typer.Option(min=1, max=1000, help="Chunks of a looked-up prompt.")] = None,
    runs: Runs = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Time look-ups with an L2 that is far away, or silent.

    Starts a Redis or Valkey of its own, behind a proxy.
    """
    from kvstrata.bench.faults import FaultsConfig, run  # noqa: PLC0415

    config = _config(FaultsConfig, round_trip_ms=round_trip_ms, chunks=chunks, runs=runs)
    return _show(run(config, _progress), as_json, strict=strict)


@app.command(
    "ttft", epilog="Example: kvstrata bench ttft --redis-url redis://127.0.0.1:6379 --json ttft.json"
)
def ttft(
    *,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A running vLLM with our connector, VLLM_SERVER_DEV_MODE=1 set."),
    ] = None,
    plain_url: Annotated[
        str | None, typer.Option(metavar="URL", help="With --url: a running vLLM without connector.")
    ] = None,
    cache_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With --url: its cache server, tcp://HOST:PORT or ipc://PATH."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Redis to use. Default: a server of our own.")
    ] = None,
    model: Model = None,
    cache_dir: LogDir = None,
    prompt_tokens: PromptTokens = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Different prompts after the warm-up.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Warm requests per prompt and tier.")] = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Time a real vLLM's first token, cold and warm.

    Warm from L1, Redis and disk; against vLLM without us.

    Starts two vLLMs on the CPU, one without connector. With --url, measures what the given servers allow.
    """
    from kvstrata.bench.ttft import TTFTConfig, run  # noqa: PLC0415

    config = _config(
        TTFTConfig,
        url=url,
        plain_url=plain_url,
        cache_endpoint=cache_endpoint,
        redis_url=redis_url,
        model=model,
        cache_dir=cache_dir,
        prompt_tokens=prompt_tokens,
        prompts=prompts,
        repeats=repeats,
    )
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("gate", epilog="Example: kvstrata bench gate --pairs 10 --json gate.json")
def gate(
    *,
    model: Model = None,
    cache_dir: LogDir = None,
    prompt_tokens: PromptTokens = None,
    speeds: Annotated[
        list[float] | None,
        typer.Option(
            "--speed",
            min=0.01,
            help="Of the link, over that of break-even; may be given again, fastest first.",
        ),
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Of auto and recompute, at each speed.")] = None,
    as_json: Json = None,
    strict: Strict = False,
) -> int:
    """Time a real vLLM's first token with each mode of the gate.

    With Redis behind links of several speeds.

    Starts a vLLM on the CPU and a Redis of its own, behind a proxy.
    """
    from kvstrata.bench.gate import GateConfig, run  # noqa: PLC0415

    config = _config(
        GateConfig, model=model, cache_dir=cache_dir, prompt_tokens=prompt_tokens, speeds=speeds, pairs=pairs
    )
    return _show(run(config, _progress), as_json, strict=strict)


@app.command("link", epilog="Example: kvstrata bench link --codec floats --codec cachegen --speed 100")
def link(
    *,
    codecs: Codecs = None,
    speeds: Annotated[
        list[float] | None,
        typer.Option(
            "--speed", min=0.1, help="Of the link, MB/s; may be given again. Default: 50, 200, 1000."
        ),
    ] = None,
    model: Model = None,
    cache_dir: LogDir = None,
    prompt_tokens: PromptTokens = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Requests for each codec and speed.")] = None,
    svg: Annotated[
        str | None, typer.Option(metavar="FILE", callback=_writable, help="Draw times against speeds.")
    ] = None,
    as_json: Json = None,
) -> int:
    """Time a real vLLM's first token with each codec.

    With Redis behind links of several speeds.

    Starts a vLLM on the CPU and a Redis of its own, behind a proxy. Needs the demo extra.
    """
    from kvstrata.bench.link import LinkConfig, drawing, run  # noqa: PLC0415

    config = _config(
        LinkConfig,
        codecs=codecs,
        speeds=speeds,
        model=model,
        cache_dir=cache_dir,
        prompt_tokens=prompt_tokens,
        repeats=repeats,
    )
    report = run(config, _progress)
    if svg is not None:
        Path(svg).write_text(drawing(report))
    return _show(report, as_json, strict=False)


def _config(kind: type[T], **options: object) -> T:
    """A configuration of what was given; the rest at its defaults."""
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise typer.BadParameter(str(error)) from None


def _progress(text: str) -> None:
    print(f"kvstrata bench: {text}", file=sys.stderr)


def _show(report: Report, as_json: str | None, *, strict: bool) -> int:
    """Print the report, and write it as JSON where that was asked for. Returns the exit status."""
    if as_json == "-":
        print_json(report)
    else:
        _print(report)
        if as_json is not None:
            Path(as_json).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return FAULT if strict and report.missed else 0


def _print(report: Report) -> None:
    machine = report.environment
    print(
        f"{report.benchmark}: {machine.cpu_model}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"load {machine.load_average:g}, kvstrata {machine.kvstrata} {machine.commit or ''}".rstrip()
    )
    print(report.method, end="\n\n")
    print_table(report.columns, [[cell(value) for value in row] for row in report.rows])
    if report.ratios:
        print()
        print_table(("ratio", "value", "target", ""), summary(report))
    for note in report.notes:
        print(f"note: {note}")
