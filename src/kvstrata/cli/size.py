"""``kvstrata size``: what the KV of a model takes, and what fits into each tier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstrata.cli.output import AsJson, print_json, print_table
from kvstrata.config import GIB
from kvstrata.sizing import Deployment, Sizes, Tier, measure, read_model
from kvstrata.tiers.redis.resp import MAX_BULK_BYTES

EXAMPLE = "Example: kvstrata size --model Llama-3.1-8B/config.json --tokens 8000 --l1-gb 20 --redis-gb 80"

_NAMES = {Tier.L1: "L1", Tier.DISK: "disk", Tier.REDIS: "Redis"}

_MAX_GIB = 1 << 30
_SizeGB = Annotated[
    float | None, typer.Option(min=0, max=_MAX_GIB, metavar="GIB", help="Size of the tier in GiB.")
]


def size(
    model: Annotated[
        Path,
        typer.Option("--model", metavar="PATH", help="config.json, its folder, or one of the hub's cache."),
    ],
    tokens: Annotated[int, typer.Option(min=1, max=1 << 40, help="Length of a prompt.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Element type of the KV, vLLM's --kv-cache-dtype.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, max=1024)] = 1,
    block_size: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="Tokens per page of vLLM: 16 on GPUs, 128 on CPUs.")
    ] = 16,
    chunk_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Tokens per chunk.")] = 256,
    l1_gb: _SizeGB = None,
    disk_gb: _SizeGB = None,
    redis_gb: Annotated[
        float | None,
        typer.Option(min=0, max=_MAX_GIB, metavar="GIB", help="maxmemory; 80gb in redis.conf is 80 here."),
    ] = None,
    max_value_bytes: Annotated[
        int,
        typer.Option(min=1024, max=MAX_BULK_BYTES, help="Option of the Redis tier: larger frames are split."),
    ] = MAX_BULK_BYTES,
    codec: Annotated[str, typer.Option(help="Codec of disk and Redis.")] = "naive",
    codec_ratio: Annotated[
        float, typer.Option(help="How much smaller it makes KV: see kvstrata bench codec. 1: the worst case.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Print what the KV of a model takes, and what fits into each tier.

    Reads config.json only: no weights, no torch, no network.
    """
    given = {Tier.L1: l1_gb, Tier.DISK: disk_gb, Tier.REDIS: redis_gb}
    tiers = {tier: int(size_gb * GIB) for tier, size_gb in given.items() if size_gb is not None}
    deployment = Deployment(
        tensor_parallel_size=tensor_parallel_size,
        block_size=block_size,
        chunk_size=chunk_size,
        dtype=dtype.lower(),
        max_value_bytes=max_value_bytes,
        codec=codec,
        codec_ratio=codec_ratio,
    )
    sizes = measure(read_model(model), deployment, tokens, tiers)
    if as_json:
        print_json(sizes)
    else:
        _print(sizes)


def _print(sizes: Sizes) -> None:
    model, deployment = sizes.model, sizes.deployment
    kind = (
        f"latent vectors of {model.head_size} (MLA)"
        if model.mla
        else f"{model.num_kv_heads} KV heads of {model.head_size}"
    )
    print(f"{model.model_type}: {model.num_layers} layers, {kind}, {deployment.dtype}")
    shards = "1 part" if sizes.num_shards == 1 else f"{sizes.num_shards} parts, one per rank"
    print(f"a chunk is {deployment.chunk_size} tokens ({deployment.chunk_size // deployment.block_size} blocks)"
          f", stored in {shards}")  # fmt: skip
    print()
    rows = [
        ("a token of KV", sizes.token_bytes_per_rank, sizes.token_bytes),
        ("a chunk of KV", sizes.chunk_payload_bytes, sizes.chunk_payload_bytes * sizes.num_shards),
        ("a chunk in L1", sizes.chunk_slot_bytes, sizes.chunk_slot_bytes * sizes.num_shards),
        ("a chunk on disk", sizes.chunk_frame_bytes, sizes.chunk_frame_bytes * sizes.num_shards),
        ("a chunk in Redis", sizes.chunk_redis_bytes, sizes.chunk_redis_bytes * sizes.num_shards),
    ]
    print_table(
        ("bytes", "per part", "in all"), [(name, f"{one:,}", f"{every:,}") for name, one, every in rows]
    )
    if not sizes.rooms:
        return
    print()
    print_table(
        ("tier", "size", "tokens", f"prompts of {sizes.prompt_tokens:,}", "bytes of such a prompt"),
        [
            (
                _NAMES[room.tier],
                f"{room.size_bytes / GIB:g} GiB",
                f"{room.tokens:,}",
                f"{room.prompts:,}",
                f"{room.prompt_bytes:,}",
            )
            for room in sizes.rooms
        ],
    )
