"""Every configuration and command of the list, as it is, with the drop-in and a real vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from configurations import CONFIGURATIONS, PYTHON_PROGRAM, REPRESENTATIVE, Configuration
from drop_in_package import DropIn

from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.redis_sentinel import RedisSentinel
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.text import natural_text
from kvstrata.testing.vllm_server import VLLMServer
from kvstrata.testing.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ARGS = ("--max-model-len", "1024", "--block-size", "32")
PROMPT = natural_text(1500)


@contextlib.contextmanager
def backend(name: str, drop_in: DropIn, directory: Path) -> Iterator[str]:
    """The URL of the real thing."""
    with contextlib.ExitStack() as stack:
        match name:
            case "redis":
                yield stack.enter_context(RedisServer()).url.removesuffix("/0")
            case "redis_password":
                yield stack.enter_context(RedisServer(password="s3cret")).url.removesuffix("/0")
            case "redis_sentinel":
                # LMCache names no service, and asks for one that a variable names.
                yield stack.enter_context(RedisSentinel()).url.removesuffix("/mymaster")
            case "rediss":
                from kvstrata.testing.tls import Certificates, TLSServer  # noqa: PLC0415 - needs cryptography

                yield stack.enter_context(
                    TLSServer(Certificates(directory), "server", client_certificates=False)
                ).url()
            case "lm" | "lm_experimental":
                command = "lmcache_server" if name == "lm" else "lmcache_experimental_server"
                port, log = free_port(), directory / f"{command}.log"
                stack.enter_context(
                    ServerProcess(
                        command,
                        [
                            drop_in.command(command),
                            "127.0.0.1",
                            str(port),
                            *(["cpu"] if name == "lm" else []),
                        ],
                        log_path=log,
                        env=drop_in.environment,
                        ready=lambda: "serving on lm://" in log.read_text(),
                        start_timeout_seconds=60,
                    )
                )
                yield f"lm://127.0.0.1:{port}"
            case "infinistore":
                from kvstrata.testing.infinistore_server import InfiniStoreServer  # noqa: PLC0415

                yield stack.enter_context(InfiniStoreServer()).url
            case "mooncakestore":
                from kvstrata.testing.mooncake_server import MooncakeMaster  # noqa: PLC0415

                yield stack.enter_context(MooncakeMaster()).url
            case _:
                yield ""


@contextlib.contextmanager
def running(
    configuration: Configuration, drop_in: DropIn, model: Path, directory: Path
) -> Iterator[tuple[VLLMServer, str]]:
    """A vLLM in this configuration and all that it needs; and the URL of its backend."""
    for module in configuration.extras:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) is not None:
                continue
        pytest.skip(f"extra: {module} is not installed")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(backend(configuration.backend, drop_in, directory))
        env: dict[str, str | None] = {**drop_in.environment, "KVSTRATA_RUNTIME_DIR": str(directory / "run")}
        values = {configuration.backend: url, "directory": str(directory / "disk")}
        env |= {name: _filled(value, values) for name, value in configuration.env.items()}
        if configuration.file:
            (directory / "x.yaml").write_text(_filled(configuration.file, values))
            env["LMCACHE_CONFIG_FILE"] = str(directory / "x.yaml")
        port = stack.enter_context(_server(configuration.server, drop_in, directory))
        connector = json.loads(configuration.connector.replace("PORT", str(port)))
        vllm = VLLMServer(
            model,
            log_path=directory / "vllm.log",
            connector=connector,
            env=env,
            args=ARGS,
            start_timeout_seconds=600,
        )
        yield stack.enter_context(vllm), url


def _filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], text)


@contextlib.contextmanager
def _server(command: str, drop_in: DropIn, directory: Path) -> Iterator[int]:
    """The command that runs beside vLLM; yields its port."""
    if not command:
        yield 0
        return
    name, *arguments = shlex.split(command)
    port, http_port, log = free_port(), free_port(), directory / "server.log"
    with ServerProcess(
        command,
        [drop_in.command(name), *arguments, "--port", str(port), "--http-port", str(http_port)],
        log_path=log,
        env={**drop_in.environment, "KVSTRATA_RUNTIME_DIR": str(directory / "run")},
        ready=lambda: "serves on" in log.read_text(),
        start_timeout_seconds=60,
    ):
        yield port
        asked = drop_in.run(
            "lmcache", "ping", "kvcache", "--url", f"http://localhost:{http_port}", timeout_seconds=150
        )
        assert asked.returncode == 0, asked.stderr


def curl(vllm: VLLMServer, prompt: str) -> dict[str, Any]:
    """What the guides send with curl; by curl where it is installed."""
    body = {"model": vllm.model_name, "prompt": prompt, "max_tokens": 8, "temperature": 0.7}
    url, header = f"{vllm.url}/v1/completions", "Content-Type: application/json"
    if shutil.which("curl") is None:
        answer: dict[str, Any] = json.loads(vllm.request("POST", "/v1/completions", body)[1])
    else:
        command = ["curl", "-sS", url, "-H", header, "-d", json.dumps(body)]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        answer = json.loads(done.stdout)
    return answer


def check_log(vllm: VLLMServer, configuration: Configuration) -> None:
    """What people look for, and what must not be there: settings that are not understood."""
    log = vllm.log_path.read_text(errors="replace")
    assert re.search(r"Stored \d+ tokens", log)
    assert re.search(r"Retrieved \d+ tokens", log)
    for text in configuration.log:
        assert text in log
    assert "without effect" not in log
    assert "unknown environment variables" not in log


def check_two_requests(configuration: Configuration, vllm: VLLMServer, drop_in: DropIn) -> None:
    """Two requests with a shared prefix; the second is not the first again."""
    first = curl(vllm, PROMPT)
    assert not first["usage"]["prompt_tokens_details"]["cached_tokens"]

    def hits() -> bool:
        second = curl(vllm, f"{PROMPT} And so on.")
        return (second["usage"]["prompt_tokens_details"]["cached_tokens"] or 0) >= 256

    wait_until(hits, "a hit", 60)
    check_log(vllm, configuration)
    question = ("--prompt", "Hello", "--max-tokens", "4", "--timeout", "120", "-q")
    asked = drop_in.run("lmcache", "query", "engine", "--url", vllm.url, *question, timeout_seconds=150)
    assert asked.returncode == 0, asked.stderr


def test_a_server_and_vllm(drop_in: DropIn, model: Path, tmp_path: Path) -> None:
    with running(REPRESENTATIVE, drop_in, model, tmp_path) as (vllm, _):
        check_two_requests(REPRESENTATIVE, vllm, drop_in)


@pytest.mark.slow
@pytest.mark.leaks_allowed("Mooncake's library opens connections when it likes")
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.name)
def test_configurations(configuration: Configuration, drop_in: DropIn, model: Path, tmp_path: Path) -> None:
    with running(configuration, drop_in, model, tmp_path) as (vllm, url):
        check_two_requests(configuration, vllm, drop_in)
        if configuration.name == "variables":
            check_fifty_tokens(vllm)
            check_redis_by_hand(url, vllm.model_name)
        if configuration.name == "three-tiers":
            assert any((tmp_path / "disk").rglob("*"))


def check_fifty_tokens(vllm: VLLMServer) -> None:
    """A prompt that is much shorter than a chunk hits all but its last token, and the log says so."""
    prompt = list(range(1000, 1050))
    vllm.complete(prompt, max_tokens=4)
    wait_until(lambda: vllm.complete(prompt, max_tokens=4).cached_tokens == 49, "49 tokens hit", 60)
    log = vllm.log_path.read_text(errors="replace")
    assert re.search(r"Reqid: \S+, Total tokens 50, \S+ hit tokens: 0, need to load: 0", log)
    assert re.search(r"Storing KV cache for 50 out of 50 tokens for request \S+", log)
    assert re.search(r"Reqid: \S+, Total tokens 50, \S+ hit tokens: 49, need to load: 49", log)


def check_redis_by_hand(url: str, model_name: str) -> None:
    """What guides do with redis-cli and redis-py."""
    port = url.rpartition(":")[2]
    redis_cli = shutil.which("redis-cli")
    assert redis_cli is not None, "system: wants redis-tools"

    def redis(*arguments: str) -> list[str]:
        command = [redis_cli, "-h", "localhost", "-p", port, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split(
            "\n"
        )

    keys = {key for key in redis("KEYS", "*") if key}
    assert keys == {key for key in redis("KEYS", f"*{model_name}*") if key}
    pairs = {key.removesuffix("kv_bytes") for key in keys if key.endswith("kv_bytes")}
    assert pairs == {key.removesuffix("metadata") for key in keys if key.endswith("metadata")}
    key = sorted(pairs)[0]
    assert re.fullmatch(rf"vllm@\S*{re.escape(model_name)}@1@0@[0-9a-f]+", key), key
    assert redis("EXISTS", f"{key}kv_bytes")[0] == "1"
    assert int(redis("MEMORY", "USAGE", f"{key}kv_bytes")[0]) > int(
        redis("MEMORY", "USAGE", f"{key}metadata")[0]
    )
    fields = redis("HGETALL", f"{key}metadata")
    assert {"model_name", "format", "world_size", "worker_id"} <= set(fields[::2])
    program = (
        "import redis, sys\nr = redis.Redis(host='localhost', port=int(sys.argv[1]))\n"
        "for key in r.scan_iter('*kv_bytes'):\n    r.expire(key, 86400)\n"
    )
    subprocess.run([sys.executable, "-c", program, port], timeout=30, check=True)
    assert 86000 < int(redis("TTL", f"{key}kv_bytes")[0]) <= 86400
    assert redis("DEL", f"{key}kv_bytes")[0] == "1"
    listed = [found for found in redis("--scan", "--pattern", f"vllm@*{model_name}*") if found]
    assert len(listed) == len(keys) - 1
    assert redis("DEL", *listed)[0] == str(len(listed))


@pytest.mark.slow
def test_a_python_program(drop_in: DropIn, model: Path, tmp_path: Path) -> None:
    """vLLM as a library, with variables that the program sets."""
    with RedisServer() as redis:
        program = tmp_path / "program.py"
        program.write_text(
            PYTHON_PROGRAM.replace("{redis}", redis.url.removesuffix("/0")).replace("{model}", str(model))
        )
        env = {**os.environ, **drop_in.environment, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(
            [sys.executable, str(program)], capture_output=True, text=True, timeout=600, check=False, env=env
        )
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        assert "answer:" in done.stdout
        assert re.search(r"Stored \d+ tokens", log)
        assert re.search(r"Retrieved \d+ tokens", log)
        assert redis.ask("DBSIZE")
