"""Ten minutes of everything at once: a real server, clients in processes of their own that come and go, and all
that an operator can ask for. Memory, file descriptors and threads of the server stay where they are."""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kvstrata.testing.api import Answer, Api
from kvstrata.testing.client import CHUNK_SIZE, prompt
from kvstrata.testing.process import ServerProcess, free_port

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
SALTS = ("acme", "busy", "")
CLIENT = Path(__file__).with_name("soak_client.py")
QUOTAS = [
    {"name": "acme", "tiers": {"l1": {"reserved_bytes": 300_000}, "disk": {"reserved_bytes": 1_000_000}}},
    {"name": "busy", "tiers": {"l1": {"limit_bytes": 600_000}, "disk": {"limit_bytes": 2_000_000}}},
]


class Sample(msgspec.Struct, frozen=True):
    """What a process takes at one moment."""

    memory_kib: int
    """Anonymous memory; the pool is shared memory, of a size that does not change."""
    fds: int
    threads: int


def sample(pid: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(int(status["RssAnon"].split()[0]), fds, int(status["Threads"]))


def operations(api: Api) -> list[Callable[[], Answer]]:
    """Each thing an operator may do."""
    rng = random.Random(1)

    def ask(method: str, path: str, body: object = None) -> Callable[[], Answer]:
        return lambda: api.ask(method, path, body)

    def tokens() -> list[int]:
        return prompt(3 * CHUNK_SIZE, rng.randrange(40)).tokens

    reads = [
        "/health", "/ready", "/metrics", "/stats", "/tiers", "/namespaces", "/config", "/requests", "/prefixes",
        "/entries?limit=200", "/entries?tier=disk&limit=50", "/entries?salt=acme", "/quotas", "/pins", "/jobs",
        "/runtime", "/explain/1-5",
    ]  # fmt: skip
    return [
        *(ask("GET", path) for path in reads),
        lambda: api.ask("POST", "/lookup", {"tokens": tokens(), "salt": "busy"}),
        lambda: api.ask("POST", "/warm", {"prompts": [tokens()], "salt": "acme"}),
        lambda: api.ask("POST", "/pins", {"owner": "soak", "seconds": 2, "tokens": tokens(), "salt": "acme"}),
        ask("DELETE", "/pins?owner=soak"),
        ask("POST", "/verify", {"sample": 20}),
        ask("POST", "/entries/delete", {"salt": "busy"}),
        ask("POST", "/clear", {"tiers": ["l1"]}),
        ask("PATCH", "/runtime", {"l1_budget_bytes": 900_000}),
        ask("PATCH", "/runtime", {"l1_budget_bytes": 1_200_000}),
        ask("PATCH", "/runtime", {"stores_frozen": True}),
        ask("PATCH", "/runtime", {"stores_frozen": False}),
        ask("PATCH", "/runtime", {"bypass": {"disk": True}}),
        ask("PATCH", "/runtime", {"bypass": {"disk": False}}),
        ask("PUT", "/quotas/third", {"tiers": {"l1": {"limit_bytes": 100_000}}}),
        ask("DELETE", "/quotas/third"),
        ask("PUT", "/quotas/default", {"tiers": {"l1": {"limit_bytes": 200_000}, "disk": {}}}),
        ask("DELETE", "/quotas/default"),
    ]


def healthy(port: int) -> bool:
    try:
        return Api("127.0.0.1", port).ask("GET", "/health").status == 200
    except (OSError, http.client.HTTPException):
        return False


def start(directory: Path, port: int, http_port: int) -> ServerProcess:
    command = [sys.executable, "-m", "kvstrata.cli", "server", "--l1-size-gb", "0.0015", "--chunk-size", "64"]
    command += ["--local-disk", str(directory / "kv"), "--set", "max_local_disk_size=0.005"]
    command += ["--set", f"runtime_dir={directory}", "--set", f"quotas={json.dumps(QUOTAS)}"]
    command += ["--port", str(port), "--http-port", str(http_port)]
    log = directory / "server.log"
    return ServerProcess("kvstrata server", command, log_path=log, ready=lambda: healthy(http_port))


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    port, http_port = free_port(), free_port()
    samples: list[Sample] = []
    with start(tmp_path, port, http_port) as server:
        command = [sys.executable, str(CLIENT), f"tcp://127.0.0.1:{port}"]
        clients = [
            subprocess.Popen([*command, salt, str(number), str(SECONDS)], stdout=subprocess.PIPE, text=True)
            for number, salt in enumerate(SALTS)
        ]
        try:
            rng, to_do = random.Random(2), operations(Api("127.0.0.1", http_port))
            ends_at, statuses = time.monotonic() + SECONDS, {200}
            while time.monotonic() < ends_at:
                statuses.add(rng.choice(to_do)().status)
                assert server.pid is not None
                samples.append(sample(server.pid))
                time.sleep(0.05)
            reports = [json.loads(client.communicate(timeout=60)[0]) for client in clients]
        finally:
            for client in clients:
                client.kill()
                client.communicate()
        assert statuses <= {200, 201, 202, 404, 409, 429, 503}, "503: a tier that is bypassed is not listed"
        assert all(report["wrong"] == 0 and report["requests"] for report in reports), reports
        assert sum(report["hit_tokens"] for report in reports) > 0
        assert "Traceback" not in server.log_tail(100_000)
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    for field, slack in (("fds", 3), ("threads", 3)):
        before, after = (statistics.median(getattr(s, field) for s in part) for part in (early, late))
        assert after <= before + slack, (field, before, after)
    before, after = (statistics.median(s.memory_kib for s in part) for part in (early, late))
    sys.stdout.write(f"memory {before:,.0f} -> {after:,.0f} KiB; {reports}; {len(samples)} operations\n")
    assert after <= before * 1.05 + 4096, (before, after)
