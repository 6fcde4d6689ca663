from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.config.memory import parse_memory
from kvstrata.errors import ConfigError
from kvstrata.testing.redis_server import RedisServer

GOOD = {
    "0": 0,
    "100": 100,
    "1b": 1,
    "1k": 1000,
    "1kb": 1024,
    "512m": 512_000_000,
    "512MB": 536_870_912,
    "80g": 80_000_000_000,
    "80gb": 85_899_345_920,
}


@pytest.mark.parametrize("text", GOOD)
def test_units_mean_what_they_mean_to_redis(text: str) -> None:
    assert parse_memory(text) == GOOD[text]


def test_redis_agrees() -> None:
    with RedisServer() as server:
        for text, size in GOOD.items():
            server.ask("CONFIG", "SET", "maxmemory", text)
            assert server.ask("CONFIG", "GET", "maxmemory") == [b"maxmemory", str(size).encode()]
        for text in ("80Gi", "1.5g", "5t"):
            assert "argument must be a memory value" in server.ask("CONFIG", "SET", "maxmemory", text).text
            with pytest.raises(ConfigError, match="no memory value of Redis"):
                parse_memory(text)


def test_units_of_kubernetes_are_refused_with_those_of_redis() -> None:
    for text, right in (("80Gi", "80gb"), ("512Mi", "512mb"), ("4Ki", "4kb")):
        with pytest.raises(ConfigError, match=f"{text} of Kubernetes is {right}"):
            parse_memory(text)


def test_a_server_of_the_kit_with_such_a_unit_is_refused_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="80gb"):
        RedisServer(["appendonly no", "maxmemory 80Gi"])


def test_config_check_reads_a_redis_conf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "redis.conf"
    path.write_text("port 6379\nmaxmemory 80gb\n")
    assert main(["config", "check", str(path)]) == 0
    path.write_text("port 6379\n# maxmemory 1Gi\nmaxmemory 80Gi\n")
    assert main(["config", "check", str(path)]) == 2
    assert "line 3, maxmemory" in capsys.readouterr().err
