"""What the calculator reads from a config.json, what it refuses, and that core and tiers use what it says."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from configs import CACHED, NOT_CACHED

from kvstrata.cli import main
from kvstrata.errors import ConfigError
from kvstrata.hashing import PrefixHasher, full_chunks, tail_pieces
from kvstrata.sizing import Deployment, Tier, measure, read_model
from kvstrata.testing.core import open_core, settle, store
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import make_keys
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.disk.tier import DiskOptions
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.types import KVLayout, Namespace

GIB = 1 << 30
SMALL = CACHED["Llama-3.1-8B"] | {"num_hidden_layers": 2}


def written(folder: Path, config: Any) -> Path:
    file = folder / "config.json"
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return file


class TestModels:
    @pytest.mark.parametrize(
        ("name", "token_bytes"),
        [("Llama-3.1-8B", 131_072), ("Qwen2.5-7B", 57_344), ("gemma-2b", 18_432), ("DeepSeek-V3", 70_272)],
    )
    def test_well_known_figures(self, name: str, token_bytes: int, tmp_path: Path) -> None:
        model = read_model(written(tmp_path, CACHED[name]))
        assert measure(model, Deployment(), 1).token_bytes == token_bytes

    @pytest.mark.parametrize("name", NOT_CACHED)
    def test_what_is_served_without_cache_is_refused(self, name: str, tmp_path: Path) -> None:
        config, reason = NOT_CACHED[name]
        with pytest.raises(ConfigError) as raised:
            read_model(written(tmp_path, config))
        assert reason in str(raised.value)
        assert str(raised.value).endswith("vLLM serves such a model without this cache")

    def test_a_folder_and_the_cache_of_the_hub(self, tmp_path: Path) -> None:
        expected = read_model(written(tmp_path, SMALL))
        assert read_model(tmp_path) == expected
        hub = tmp_path / "models--org--name"
        for revision, config in (("aaa", SMALL), ("bbb", CACHED["gemma-2b"])):
            (hub / "snapshots" / revision).mkdir(parents=True)
            written(hub / "snapshots" / revision, config)
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text("aaa\n")
        assert read_model(hub) == expected

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ("{", "is not JSON"),
            ("[1]", "it holds a list"),
            ({}, "does not say num_attention_heads"),
            (SMALL | {"num_hidden_layers": 0}, "num_hidden_layers = 0 is no positive whole number"),
            (SMALL | {"num_key_value_heads": "8"}, "num_key_value_heads = '8'"),
            (SMALL | {"torch_dtype": "int3"}, "dtype 'int3' is not one of"),
            (SMALL | {"head_dim": 10**9}, "head_dim = 1000000000"),
        ],
    )
    def test_wrong_files_are_named(self, config: Any, said: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            read_model(written(tmp_path, config))

    def test_folders_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no config\.json"):
            read_model(tmp_path)
        with pytest.raises(ConfigError, match="No such file"):
            read_model(tmp_path / "nothing.json")


class TestDeployments:
    @pytest.mark.parametrize(
        ("deployment", "said"),
        [
            (Deployment(tensor_parallel_size=3), "32 attention heads do not divide among 3 ranks"),
            (Deployment(dtype="int4"), "dtype 'int4' is not allowed"),
            (Deployment(codec="nothing"), "no codec 'nothing'"),
            (Deployment(codec="floats", codec_ratio=0.5), "a codec ratio of 0.5"),
            (Deployment(codec_ratio=2), "naive makes nothing smaller"),
        ],
    )
    def test_impossible_ones_are_refused(self, deployment: Deployment, said: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=said):
            measure(read_model(written(tmp_path, SMALL)), deployment, 100)

    def test_chunks_are_whole_blocks(self, tmp_path: Path) -> None:
        model = read_model(written(tmp_path, SMALL))
        sizes = measure(model, Deployment(chunk_size=100, block_size=32), 100)
        assert sizes.deployment.chunk_size == 128

    def test_ranks_share_heads_or_repeat_them(self, tmp_path: Path) -> None:
        model = read_model(written(tmp_path, CACHED["Llama-3.1-8B"]))
        one, four, sixteen = (measure(model, Deployment(tensor_parallel_size=n), 1) for n in (1, 4, 16))
        assert four.token_bytes == one.token_bytes == 4 * four.token_bytes_per_rank
        assert sixteen.token_bytes == 2 * one.token_bytes

    def test_a_codec_counts_on_disk_and_in_redis_only(self, tmp_path: Path) -> None:
        model = read_model(written(tmp_path, SMALL))
        plain = measure(model, Deployment(), 1)
        worst = measure(model, Deployment(codec="floats+aesgcm"), 1)
        usual = measure(model, Deployment(codec="floats", codec_ratio=1.4), 1)
        assert plain.chunk_slot_bytes == worst.chunk_slot_bytes == usual.chunk_slot_bytes
        assert 0 <= worst.chunk_frame_bytes - plain.chunk_frame_bytes <= 64
        assert usual.chunk_frame_bytes == pytest.approx(plain.chunk_frame_bytes / 1.4, rel=0.001)


@pytest.mark.parametrize(
    ("num_tokens", "ranks", "max_value_bytes"),
    [(1000, 1, 1 << 29), (1030, 2, 1 << 29), (70, 1, 1 << 29), (1000, 1, (1 << 18) - 64)],
)
def test_a_prompt_takes_what_is_said(
    num_tokens: int, ranks: int, max_value_bytes: int, tmp_path: Path
) -> None:
    """The core stores a prompt in L1, on disk and in a real Redis: bytes are the predicted ones."""
    model = read_model(written(tmp_path, SMALL))
    deployment = Deployment(tensor_parallel_size=ranks, max_value_bytes=max_value_bytes)
    sizes = measure(model, deployment, num_tokens, dict.fromkeys(Tier, GIB))
    expected = {room.tier: room.prompt_bytes for room in sizes.rooms}
    page_bytes = sizes.token_bytes_per_rank * deployment.block_size // model.num_layers
    layout = KVLayout(deployment.block_size, (page_bytes,) * model.num_layers, "bfloat16", "test")
    namespace = Namespace("vllm", "m", "f", "auto", ranks, f"tp{ranks}pp1", deployment.chunk_size, layout)
    tokens = list(range(num_tokens))
    hasher = PrefixHasher(namespace)
    hasher.extend(tokens)
    pieces = full_chunks(hasher, deployment.chunk_size, 0, num_tokens // deployment.chunk_size)
    pieces += tail_pieces(hasher.prefix(tokens), deployment.block_size, deployment.chunk_size)
    disk = DiskTier(DiskOptions(path=str(tmp_path / "disk"), max_bytes=GIB))
    with RedisServer() as server:
        redis = RedisTier(RedisOptions(url=server.url, max_value_bytes=max_value_bytes))
        with open_core([disk, redis], pool_bytes=1 << 26) as core:
            for shard in range(ranks):
                assert store(core, "o", namespace, shard, pieces, lambda _p, _s, size: bytes(size)) == pieces
            settle(core)
            assert core.index.allocator.used_bytes == expected[Tier.L1]
            assert disk.stats().used_bytes == expected[Tier.DISK]
        with redis_client.Redis(port=server.port) as client:
            used_bytes = sum(client.memory_usage(name, samples=0) or 0 for name in client.scan_iter())
            allocator = client.info("memory")["mem_allocator"]
    assert used_bytes <= expected[Tier.REDIS]
    if allocator.startswith("jemalloc"):
        assert used_bytes >= 0.99 * expected[Tier.REDIS]


def test_what_redis_rounds_up_is_counted_but_not_used() -> None:
    """docs/sizing.md: ``maxmemory`` may be larger than the memory that there is for it."""
    frame = memoryview(bytes((2 << 20) + 256))
    with (
        RedisServer(["maxmemory 200mb", "maxmemory-policy allkeys-lru"]) as server,
        contextlib.closing(RedisTier(RedisOptions(url=server.url))) as tier,
        redis_client.Redis(port=server.port) as client,
    ):
        for key in make_keys(150):
            tier.write([key], [frame])
        memory = client.info("memory")
        num_held = client.dbsize() // 2
    assert num_held < 100, "some were evicted"
    if memory["mem_allocator"].startswith("jemalloc"):
        assert memory["used_memory_rss"] < 0.92 * memory["used_memory"]


class TestCommand:
    def test_what_fits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = str(written(tmp_path, CACHED["Llama-3.1-8B"]))
        assert main(["size", "--model", model, "--tokens", "8000", "--l1-gb", "20", "--redis-gb", "80"]) == 0
        text = capsys.readouterr().out
        assert "llama: 32 layers, 8 KV heads of 128, bfloat16" in text
        assert "a chunk of KV     33,554,432  33,554,432" in text
        main(["size", "--model", model, "--tokens", "8000", "--l1-gb", "20", "--redis-gb", "80", "--json"])
        l1, redis = json.loads(capsys.readouterr().out)["rooms"]
        assert (l1["tier"], l1["tokens"], l1["prompts"]) == ("l1", 163_584, 20)
        assert redis["tokens"] == 524_032  # the allocator of Redis rounds 32 MiB and a header up to 40

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model", "missing.json"], "missing.json: No such file"),
            (["--model", "config.json", "--tokens", "0"], "'--tokens'"),
            (["--model", "config.json", "--tokens", "many"], "'--tokens'"),
            (["--model", "config.json", "--l1-gb", "-1"], "'--l1-gb'"),
            (["--model", "config.json", "--l1-gb", "nan"], "'--l1-gb'"),
            (["--model", "config.json", "--disk-gb", "inf"], "'--disk-gb'"),
            (["--model", "config.json", "--max-value-bytes", "1"], "'--max-value-bytes'"),
            (["--model", "config.json", "--redis-gb", "80Gi"], "'--redis-gb'"),
            (["--model", "config.json", "-tp", "5"], "do not divide among 5 ranks"),
            ([], "--model"),
        ],
    )
    def test_wrong_input_is_one_line(
        self,
        arguments: list[str],
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        written(tmp_path, SMALL)
        monkeypatch.chdir(tmp_path)
        assert main(["size", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("kvstrata: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err
