"""Every check of ``kvstrata doctor`` finds what it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstrata.cli import main
from kvstrata.doctor import Finding, Level, examine
from kvstrata.doctor.machine import check_clock, check_files, check_kernel, check_memory, check_shm
from kvstrata.doctor.units import check_units
from kvstrata.testing.redis_server import RedisServer

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVSTRATA_CONFIG_FILE", "LMCACHE_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


def found(config: Path | None, check: str, *files: Path) -> list[Finding]:
    """What a check finds; each finding that matters says what to do."""
    findings = list(examine(config, files, engine=False))
    for finding in findings:
        assert finding.remedy or finding.level is Level.OK, finding
    return [finding for finding in findings if finding.check == check]


@pytest.mark.parametrize(
    ("config", "l1_gib", "level", "said"),
    [
        ({}, 1, Level.OK, "131,072 bytes of KV per token, L1 holds 7,936 tokens"),
        ({}, 0.01, Level.ERROR, "L1 holds 0 tokens"),
        ({"sliding_window": 4096}, 1, Level.ERROR, "a sliding window (4096 tokens) is not supported"),
        ({"num_hidden_layers": "many"}, 1, Level.ERROR, "num_hidden_layers = 'many'"),
    ],
)
def test_the_model(config: dict[str, Any], l1_gib: float, level: Level, said: str, tmp_path: Path) -> None:
    llama = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
    llama |= {"num_key_value_heads": 8, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(llama | config))
    (tmp_path / "kvstrata.yaml").write_text(f"max_local_cpu_size: {l1_gib}")
    findings = examine(tmp_path / "kvstrata.yaml", engine=False, model=tmp_path)
    (finding,) = [each for each in findings if each.check == "model"]
    assert finding.level is level
    assert said in finding.found
    assert finding.remedy or level is Level.OK


def test_settings_that_no_server_starts_with(tmp_path: Path) -> None:
    (tmp_path / "kvstrata.yaml").write_text("remote_url: redis://127.0.0.1:1\nremote_serde: floats+aesgcm\n")
    (finding,) = found(tmp_path / "kvstrata.yaml", "configuration")
    assert finding.level is Level.ERROR
    assert "encryption_key_file" in finding.found


def test_kernels() -> None:
    levels = {release: check_kernel(release).level for release in ("4.19.0", "5.10.0-8-amd64", "6.1.0", "x")}
    assert levels == {
        "4.19.0": Level.ERROR,
        "5.10.0-8-amd64": Level.NOTE,
        "6.1.0": Level.OK,
        "x": Level.ERROR,
    }


def test_files_and_clock_answer_here() -> None:
    assert check_files().check == "open files"
    assert check_clock().level in {Level.OK, Level.NOTE}


def test_few_open_files_are_a_warning() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024));"
        "from kvstrata.doctor.machine import check_files; f = check_files(); print(f.level, f.remedy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("warning ulimit -n 1024")


@pytest.mark.parametrize(("available", "level"), [(5, Level.ERROR), (11, Level.WARNING), (20, Level.OK)])
def test_memory(available: int, level: Level) -> None:
    finding = check_memory(10 * GIB, available * GIB)
    assert finding.level is level
    assert "L1 takes 10.00 GiB" in finding.found


def test_shared_memory(tmp_path: Path) -> None:
    assert check_shm(str(tmp_path), 1 << 60).level is Level.ERROR
    assert check_shm(str(tmp_path), 1 << 20).level is Level.OK
    assert check_shm(str(tmp_path / "none"), 1).level is Level.ERROR
    assert check_shm(None, 1, default=tmp_path / "none").level is Level.NOTE


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("lmcache:\n  enabled: true\n  maxMemory: 80Gi\n", "write 80gb"),
        ('maxmemory: "512Mi"', "write 512mb"),
        ("maxmemory 1.5Ti\n", "write 1.5tb"),
        ('args: ["--maxmemory", "80Gi", "--appendonly", "no"]', "write 80gb"),
        ("args:\n- --maxmemory\n- 80Gi\n", "write 80gb"),
        ("command: redis-server --maxmemory=80Gi", "write 80gb"),
        ('{"redis": {"max_memory": "80Gi"}}', "write 80gb"),
    ],
)
def test_units_of_kubernetes_are_found(text: str, remedy: str, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("# first line\n" + text)
    (finding,) = check_units(file)
    assert finding.level is Level.ERROR
    assert finding.remedy.startswith(remedy)
    assert "line " in finding.found


@pytest.mark.parametrize(
    "text",
    [
        "maxMemory: 80gb\nresources:\n  limits:\n    memory: 80Gi\n",
        "maxmemory 80g\nmaxmemory-policy allkeys-lru\n",
        "# maxmemory 80Gi does not work\nmaxmemory 85899345920\n",
    ],
)
def test_other_units_are_not(text: str, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(text)
    assert [finding.level for finding in check_units(file)] == [Level.OK]


def test_a_configuration_that_is_wrong_is_a_finding(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("chunk_sise: 256\n")
    (finding,) = found(config, "configuration")
    assert finding.level is Level.ERROR
    assert "chunk_size" in finding.found
    config.write_text("http_host: 0.0.0.0\n")
    (finding,) = found(config, "HTTP API")
    assert finding.level is Level.ERROR
    assert "http_token_file" in finding.found


def test_tiers_that_answer_and_that_do_not(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    with RedisServer(["maxmemory 100mb", "maxmemory-policy noeviction"], password="geheim") as server:
        config.write_text(
            f"local_disk: {tmp_path}/kv\nmax_local_disk_size: 1000000\nremote_url: {server.url}\n"
            "tiers:\n  - {url: 'redis://:geheim@127.0.0.1:1', name: away}\n"
        )
        levels = {
            name: [f.level for f in found(config, f"tier {name}")] for name in ("disk", "redis", "away")
        }
        assert levels == {
            "disk": [Level.WARNING],  # its budget exceeds the disk
            "redis": [Level.OK, Level.WARNING],  # it answers; nothing would ever be evicted
            "away": [Level.ERROR],
        }
        policy = found(config, "tier redis")[1]
        assert "noeviction" in policy.found
        shown = "".join(f.found + f.remedy for f in examine(config, engine=False))
        assert "geheim" not in shown
    assert not (tmp_path / "kv").exists()  # looking makes nothing


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("maxMemory: 80Gi\n")
    assert main(["doctor", str(values), "--skip-engine"]) == 1
    text = capsys.readouterr().out
    assert "-> write 80gb" in text
    assert "1 errors" in text
    assert main(["doctor", str(values), "--skip-engine", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["counts"]["error"] == 1
    values.write_text("maxMemory: 80gb\n")
    assert main(["doctor", str(values), "--skip-engine"]) == 0
    assert main(["doctor", str(tmp_path / "none.yaml"), "--skip-engine"]) == 1
