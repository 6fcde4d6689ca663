"""The client contract in embedded mode, where it is not the same server as elsewhere; who starts and ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.client import RemoteClient, connect
from kvstrata.config import Settings
from kvstrata.testing.client import (
    Join,
    SharedClientContract,
    Start,
    look,
    prompt,
    small_settings,
    store,
)
from kvstrata.testing.forked import wait_for_end
from kvstrata.testing.process import free_port
from kvstrata.testing.waiting import wait_until


def server_pid(client: RemoteClient) -> int:
    """The process of the server that ``client`` started."""
    embedded = client._on_close.__self__  # type: ignore[union-attr]
    return embedded._process.pid


@pytest.fixture
def runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Short enough for the paths of sockets."""
    directory = tmp_path_factory.mktemp("rt", numbered=True)
    yield directory
    assert [path for path in directory.rglob("*") if path.is_socket()] == []


class TestEmbedded:
    @pytest.fixture
    def engine(self) -> list[Settings]:
        """The settings of the caches that were started."""
        return []

    @pytest.fixture
    def start(self, runtime_dir: Path, with_plugin: None, engine: list[Settings]) -> Iterator[Start]:
        with contextlib.ExitStack() as stack:

            def start(settings: Settings) -> RemoteClient:
                fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
                engine.append(
                    Settings(**fields | {"runtime_dir": str(runtime_dir), "rpc_timeout_ms": 10_000})
                )
                client = connect(engine[-1], engine_id=f"engine {len(engine)}", name="first")
                assert client.connected
                return stack.enter_context(client)

            yield start

    @pytest.fixture
    def join(self, engine: list[Settings], start: Start) -> Iterator[Join]:
        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(
                connect(engine[-1], engine_id=f"engine {len(engine)}", name="next")
            )

    client = SharedClientContract.client
    faulty = SharedClientContract.faulty
    _fill_tier = SharedClientContract._fill_tier
    _settle = SharedClientContract._settle
    test_round_trips = SharedClientContract.test_an_exact_repeat_hits_everything
    test_leases = SharedClientContract.test_a_lease_keeps_its_payloads_while_all_else_is_evicted
    test_pass_through = SharedClientContract.test_host_memory_that_only_passes_through
    test_tiers = SharedClientContract.test_what_lower_tiers_hold_is_loaded
    test_slow_tiers = SharedClientContract.test_a_slow_tier_holds_up_nobody
    test_close = SharedClientContract.test_close_is_idempotent_and_nothing_raises_afterwards
    test_scheduler_and_worker = SharedClientContract.test_one_client_looks_up_and_another_copies
    test_what_is_left_behind = SharedClientContract.test_what_a_client_leaves_behind_is_taken_back

    def test_the_server_ends_with_its_starter_and_leaves_no_file(
        self, start: Start, runtime_dir: Path
    ) -> None:
        client = start(small_settings())
        pid = server_pid(client)
        client.close()
        assert wait_for_end(pid)
        assert list(runtime_dir.glob("*/*")) == []

    def test_it_is_started_again_after_it_was_killed(self, start: Start, join: Join) -> None:
        client = start(small_settings())
        other = join()
        asked = prompt(200, seed=1)
        for _ in range(2):
            assert store(client, asked) == 200
            assert look(client, "r", asked) == 200
            assert look(other, "r", asked) == 200
            os.kill(server_pid(client), signal.SIGKILL)
            wait_until(
                lambda: client.lookup("r", asked.namespace, asked.prefix).num_tokens == 0, "it is gone"
            )
            wait_until(lambda: client.connected and other.connected, "both use the new server")

    def test_another_process_of_the_engine_takes_over(self, start: Start, join: Join) -> None:
        client = start(small_settings())
        other = join()
        pid = server_pid(client)
        client.close()
        assert wait_for_end(pid)
        wait_until(lambda: other.connected, "the other has started a server")
        assert store(other, prompt(200, seed=1)) == 200

    def test_a_server_that_cannot_start_is_not_tried_again(self, runtime_dir: Path, capfd: object) -> None:
        settings = Settings(runtime_dir=str(runtime_dir), max_local_cpu_size=2.0**19, rpc_timeout_ms=200)
        with contextlib.closing(connect_briefly(settings)) as client:
            wait_until(lambda: not client.connected and exit_status(client) is not None, "it has ended")
            assert exit_status(client) == os.EX_CONFIG
            pid = server_pid(client)
            for _ in range(3):
                client._next_attempt_at = 0.0
                assert not client.connected
            assert server_pid(client) == pid

    def test_nobody_waits_for_a_server_that_cannot_start(
        self, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("kvstrata.client._START_SECONDS", 3600.0)
        monkeypatch.setattr(logging.getLogger("kvstrata"), "propagate", True)
        settings = Settings(runtime_dir=str(runtime_dir), max_local_cpu_size=2.0**19)
        with connect(settings, engine_id="e", name="first") as client:
            assert not client.connected
            with connect(settings, engine_id="e", name="next") as other:  # did not start it, and knows it too
                assert not other.connected
        said = {record.getMessage() for record in caplog.records}  # once for each handler of pytest
        for name in ("first", "next"):
            (line,) = [message for message in said if message.startswith(f"{name}: there is no cache")]
            assert "memory" in line, "it says why"

    def test_nobody_waits_for_a_server_that_crashes(
        self, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kvstrata.client._START_SECONDS", 3600.0)
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        settings = Settings(runtime_dir=str(runtime_dir), max_local_cpu_size=0.01)
        with connect(settings, engine_id="e") as client:
            assert not client.connected

    def test_two_engines_with_one_environment_both_have_a_cache(self, start: Start) -> None:
        settings = small_settings(http_port=free_port())
        first, second = start(settings), start(settings)
        assert first.connected
        assert second.connected

    def test_two_engines_have_servers_of_their_own(self, start: Start) -> None:
        first, second = start(small_settings()), start(small_settings())
        store(first, prompt(200, seed=1))
        assert look(second, "r", prompt(200, seed=1)) == 0
        assert server_pid(first) != server_pid(second)


def connect_briefly(settings: Settings) -> RemoteClient:
    """As ``connect``, without its wait."""
    from kvstrata.client.embedded import EmbeddedServer  # noqa: PLC0415  only here

    embedded = EmbeddedServer(settings, settings.runtime_directory, "engine")
    return RemoteClient(
        embedded.endpoint,
        "test",
        timeout_seconds=0.2,
        keep_alive=embedded.keep_alive,
        on_close=embedded.close,
    )


def exit_status(client: RemoteClient) -> int | None:
    return client._on_close.__self__._process.poll()  # type: ignore[union-attr]


PARENT = """
import os, sys
from pathlib import Path
from kvstrata.client import connect
from kvstrata.config import Settings
client = connect(Settings(max_local_cpu_size=0.05, runtime_dir=sys.argv[1]), engine_id="e")
assert client.connected
print(client._on_close.__self__._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_server_ends_when_its_starter_is_killed(runtime_dir: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(runtime_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert "kvstrata-l1" in Path(f"/proc/{pid}/maps").read_text()
        parent.kill()
        parent.wait()
        assert wait_for_end(pid)
    # Its memory has no name; it went with the last process that mapped it.
    assert not Path(f"/proc/{pid}").exists() or not Path(f"/proc/{pid}/maps").read_text()
    # The directory is swept by the next engine, once it is old.
    for path in runtime_dir.rglob("*.sock"):
        path.unlink()
