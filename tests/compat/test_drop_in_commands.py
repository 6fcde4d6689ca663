"""LMCache's commands as real processes, against real servers."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from drop_in_package import DropIn

from kvstrata.config.lmcache import LMCACHE_COMMANDS, LMCACHE_OPTIONS
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.lm import LmOptions, LmTier

BATCH = """
import contextlib, io, json, sys
from kvstrata_lmcache import commands

for name, *arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = (commands.main if name == "lmcache" else commands.remote)(arguments)
        except SystemExit as leaving:
            status = leaving.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def run_all(drop_in: DropIn, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Status and output of many commands, one after the other in one process, which saves half a second each."""
    done = subprocess.run(
        [sys.executable, "-c", BATCH],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **drop_in.environment},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def answers(port: int, path: str = "/health") -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def lmcache_server(drop_in: DropIn, directory: Path, port: int, http_port: int, *more: str) -> ServerProcess:
    command = [drop_in.command("lmcache"), "server", "--l1-size-gb", "0.02", "--eviction-policy", "LRU"]
    command += [
        "--chunk-size",
        "16",
        "--host",
        "localhost",
        "--port",
        str(port),
        "--http-port",
        str(http_port),
    ]
    return ServerProcess(
        "lmcache server",
        [*command, *more],
        log_path=directory / f"{port}.log",
        env={**drop_in.environment, "KVSTRATA_RUNTIME_DIR": str(directory)},
        ready=lambda: answers(http_port),
    )


@pytest.fixture(scope="module")
def server(drop_in: DropIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ServerProcess]]:
    """``lmcache server`` with everything that it takes besides: without effect, an L2, and one of our own."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "l2").mkdir()
    adapter = {"type": "fs", "base_path": str(directory / "l2"), "max_capacity_gb": 1, "num_workers": 4}
    more = [
        "--no-l1-use-lazy",
        "--enable-tracing",
        "--transport",
        "zmq",
        "--max-workers",
        "2",
        "--engine-type",
        "blend",
        "--enable",
        "transfer_query",
    ]
    more += ["--l2-adapter", json.dumps(adapter), "--log-level", "debug", "--json"]
    http_port = free_port()
    with lmcache_server(drop_in, directory, free_port(), http_port, *more) as process:
        yield f"http://localhost:{http_port}", process


def test_server(server: tuple[str, ServerProcess]) -> None:
    """The tiers that were asked for; what has no effect is named in one line."""
    log = server[1].log_path.read_text()
    assert answers(int(server[0].rpartition(":")[2]), "/healthcheck")
    with urllib.request.urlopen(f"{server[0]}/config", timeout=10) as answer:
        settings = json.load(answer)["settings"]
    assert (settings["chunk_size"], settings["tracing"], settings["log_level"]) == (16, True, "DEBUG")
    about = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert about["tiers"] == ["l1", "file"]
    (line,) = [line for line in log.splitlines() if line.startswith("lmcache server: ")]
    assert line == (
        "lmcache server: options without effect here; not supported: --enable (optional parts of LMCache's server)"
        ", --engine-type (reuse of text that is no prefix); not needed: --max-workers (one process decides, each "
        "engine's workers copy)"
    )


ASKING = {
    "quota set tenant --limit-gb 0.01": "tenant",
    "quota get tenant": "tenant",
    "quota list": "tenant",
    "quota delete tenant": "tenant",
    "ping kvcache": "answers: ",
    "describe kvcache": "kvstrata 0.1.0 at ",
    "query kvcache": "file: ",
    "kvcache clear": "dropped: ",
}


def test_commands_that_ask_a_server(
    drop_in: DropIn, server: tuple[str, ServerProcess], tmp_path: Path
) -> None:
    url, gone = server[0], f"http://127.0.0.1:{free_port()}"
    done = drop_in.run("lmcache", "ping", "kvcache", "--url", url)
    assert done.returncode == 0, done.stderr
    assert "answers: " in done.stdout
    bases = [["lmcache", *command.split(), "--url"] for command in ASKING]
    files = [tmp_path / str(number) for number in range(len(bases))]
    saving = ["--format", "json", "--output"]
    found = run_all(
        drop_in,
        *([*base, url] for base in bases),
        *([*base, gone] for base in bases),
        *([*base, url.removeprefix("http://"), "-q"] for base in bases),
        *([*base, url, *saving, str(file)] for base, file in zip(bases, files, strict=True)),
    )
    shown, refused, quiet, saved = (found[len(bases) * part :][: len(bases)] for part in range(4))
    for (status, out, err), expected in zip(shown, ASKING.values(), strict=True):
        assert status == 0, err
        assert expected in out
    for status, out, err in refused:
        assert status == 1
        assert len((out + err).splitlines()) == 1
    assert quiet == saved == [(0, "", "")] * len(bases)
    assert all(isinstance(json.loads(file.read_text()), dict) for file in files)


class Engine(http.server.BaseHTTPRequestHandler):
    """The part of an engine's API that the commands use."""

    def do_GET(self) -> None:
        self._answer(b'{"data": [{"id": "model-a"}]}' if self.path == "/v1/models" else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["model"], body["prompt"], body["max_tokens"]) == ("model-a", "Hello", 3)
        event = {"choices": [{"text": " world", "finish_reason": "length", "logprobs": None}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}}
        lines = [f"data: {json.dumps(each)}\n\n" for each in (event, usage)]
        self._answer("".join([*lines, "data: [DONE]\n\n"]).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def engine_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_commands_that_ask_an_engine(drop_in: DropIn, engine_url: str) -> None:
    """Against a stand-in; the test of configurations asks a real vLLM."""
    done = drop_in.run("lmcache", "ping", "engine", "--url", engine_url)
    assert done.returncode == 0
    assert "up             True" in done.stdout
    asked = ("lmcache", "query", "engine", "--prompt", "Hello", "--max-tokens", "3", "--format", "json")
    done = drop_in.run(*asked, "--url", engine_url)
    assert json.loads(done.stdout)["answer"] == " world", done.stderr
    for command in (asked, ("lmcache", "ping", "engine")):
        gone = drop_in.run(*command, "--url", f"127.0.0.1:{free_port()}", "-q")
        assert gone.returncode == 1
        assert len(gone.stderr.splitlines()) == 1


def test_bench_l2_measures_a_tier(drop_in: DropIn, tmp_path: Path) -> None:
    url = f"disk://{tmp_path}?max_bytes=100000000"
    sizes = ("--frame-bytes", "65536", "--num-frames", "4", "--runs", "1")
    done = drop_in.run("lmcache", "bench", "l2", url, *sizes, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["benchmark"] == "tier"


REFUSED = [
    ("lmcache frobnicate", "lmcache: no command 'frobnicate'; LMCache has server, "),
    ("lmcache coordinator --port 9300", "lmcache coordinator: not provided by kvstrata: "),
    ("lmcache trace info x", "lmcache trace: not provided by kvstrata: "),
    ("lmcache server --frobnicate 1", "kvstrata: No such option: --frobnicate "),
    ("lmcache server --eviction-policy ARC", "kvstrata: cache_policy = 'ARC' "),
    ("lmcache server --l1-size-gb", "lmcache server: argument --l1-size-gb: expected one argument"),
    ("lmcache server --l2-adapter {", "lmcache server: --l2-adapter: Expecting property name"),
    ('lmcache server --l2-adapter {"type":"dax"}', "lmcache server: --l2-adapter: type 'dax' has no "),
    (
        'lmcache server --l2-adapter {"type":"resp","host":"h","port":1,"serde":{}}',
        "lmcache server: --l2-adapter: resp: serde has no counterpart",
    ),
    ("lmcache ping kvcache --format xml", "lmcache ping kvcache: argument --format: invalid choice"),
    ("lmcache ping engine --url ftp://x", "lmcache ping engine: --url 'ftp://x': expected http://"),
    ("lmcache bench engine --workload rag", "kvstrata: No such option: --workload "),
    ("lmcache_server localhost", "kvstrata: Missing argument 'PORT'"),
    ("lmcache_server localhost 65432 cuda", "kvstrata: Invalid value: device 'cuda' is not possible"),
]


def test_what_cannot_be_done_ends_in_one_line(drop_in: DropIn) -> None:
    found = run_all(drop_in, *(arguments.split() for arguments, _ in REFUSED))
    for (arguments, line), (status, out, err) in zip(REFUSED, found, strict=True):
        assert (status, out) == (2, ""), arguments
        assert err.startswith(line), err
        assert len(err.splitlines()) == 1, err


def test_the_controller_ends_in_one_line(drop_in: DropIn) -> None:
    done = drop_in.run("lmcache_controller", "--port", "9000")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("lmcache_controller: not provided by kvstrata")


def test_a_file_that_cannot_be_written_ends_in_one_line(drop_in: DropIn) -> None:
    done = drop_in.run("lmcache", "quota", "list", "--output", "/no/such/file")
    assert (done.returncode, done.stderr) == (1, "lmcache: /no/such/file: No such file or directory\n")


def test_a_reader_that_goes_away_is_no_traceback(drop_in: DropIn) -> None:
    piped = f"{sys.executable} -u {drop_in.command('lmcache')} --help | head -1"
    environment = {**os.environ, **drop_in.environment}
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("usage: lmcache COMMAND [OPTIONS]\n", "")


def test_help_lists_what_there_is(drop_in: DropIn) -> None:
    done = drop_in.run("lmcache", "--help")
    assert done.returncode == 0
    for name, command in LMCACHE_COMMANDS.items():
        if name.startswith("lmcache "):
            assert (f"  {name} " in done.stdout) == (command.fate != "not supported"), name


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("lmcache_server", ("localhost", "cpu")),
        ("lmcache_experimental_server", ("0.0.0.0",)),
    ],
)
def test_the_remote_server_speaks_lm(
    drop_in: DropIn, command: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    port = free_port()
    host, *device = arguments
    log = tmp_path / "log"
    with (
        ServerProcess(
            command,
            [drop_in.command(command), host, str(port), *device],
            log_path=log,
            env=drop_in.environment,
            ready=lambda: "serving on lm://" in log.read_text(),
        ),
    ):
        tier = LmTier(LmOptions(url=f"lm://127.0.0.1:{port}"))
        try:
            keys = make_keys(2)
            frames = [make_frame(1000, seed) for seed in range(2)]
            tier.write(keys, frames)
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]
        finally:
            tier.close()


def test_every_option_is_taken(drop_in: DropIn) -> None:
    """All of LMCache's options at once reach the check of the one value that is wrong."""
    given = []
    for name, option in LMCACHE_OPTIONS.items():
        if option.takes == "no value":
            given += [name, name.replace("--", "--no-", 1)]
        elif name not in ("--l2-adapter", "--port"):
            given += [name, "LRU" if name == "--eviction-policy" else "1"]
    done = drop_in.run("lmcache", "server", *given, "--port", "99999")
    assert done.returncode == 2
    notice, error = done.stderr.splitlines()
    assert notice.startswith("lmcache server: options without effect here; not supported: --coordinator-")
    assert error.startswith("kvstrata: ")
    assert "99999" in error
