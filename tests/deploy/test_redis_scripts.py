"""The chart's scripts and configuration, run as the pods would run them: three nodes on loopback addresses."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstrata.config import tier_from_url
from kvstrata.errors import TierUnavailable
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.base import Tier
from kvstrata.tiers.open import open_tier

pytestmark = [pytest.mark.deploy, pytest.mark.system]

DOMAIN = "lmcache-redis-nodes.caches.svc.cluster.local"
DEADLINE_SECONDS = 120.0
"""What takes longer hangs: sentinels may need their failover timeout twice, on a busy machine."""


def nodes(count: int) -> list[str]:
    """Addresses of this process' own, so that every node has the same ports, as in a cluster."""
    network = f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}"
    return [f"{network}.{number + 1}" for number in range(count)]


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class Container:
    """A container of a rendered pod: its command and environment, with an address and a directory of its own."""

    def __init__(self, group: Group, node: str, spec: dict[str, Any], directory: Path) -> None:
        self.group = group
        self.node = node
        directory.mkdir(parents=True)
        data = group.directory / node / "data"
        data.mkdir(exist_ok=True)
        self.env = {item["name"]: group.adapt(str(item.get("value", ""))) for item in spec["env"]}
        self.env |= {"ME": node, "LOCAL_HOST": node, "BIND": node, "PATH": os.environ["PATH"]}
        self.env |= {"CONFIG_DIR": str(group.scripts), "DATA_DIR": str(data), "RUN_DIR": str(directory)}
        self.env |= {"REDISCLI_AUTH": group.password} if group.password else {}
        self.env["TLS_DIR"] = str(group.tls_directory) if self.env["TLS_DIR"] else ""
        ports = {str(port["containerPort"]): group.ports[port["containerPort"]] for port in spec["ports"]}
        self.probe = [group.adapt(word) for word in spec["readinessProbe"]["exec"]["command"]]
        self.port = next(iter(ports.values()))
        self.process = ServerProcess(
            f"{spec['name']} on {node}",
            self.command(spec["command"]),
            log_path=directory / "log",
            env={**dict.fromkeys(os.environ, None), **self.env},
            grace_seconds=5,
        )

    def command(self, words: list[str]) -> list[str]:
        return [word.replace("/etc/kvstrata", str(self.group.scripts)) for word in words]

    def run(self, words: list[str]) -> bool:
        """Run a probe or a hook in the container; whether it succeeds."""
        done = subprocess.run(self.command(words), env=self.env, capture_output=True, timeout=30, check=False)
        return done.returncode == 0

    def is_ready(self) -> bool:
        return self.process.running and self.run(self.probe)

    def ask(self, *words: str) -> Any:
        tls = (
            {"ssl": True, "ssl_ca_certs": str(self.group.tls_directory / "ca.crt")}
            if self.env["TLS_DIR"]
            else {}
        )
        with redis.Redis(
            host=self.node, port=self.port, password=self.group.password or None, decode_responses=True, **tls
        ) as client:
            return client.execute_command(*words)


class Group:
    """The pods of the StatefulSet."""

    def __init__(self, rendered: Any, directory: Path, tls_directory: Path) -> None:
        self.directory = directory
        self.tls_directory = tls_directory
        self.scripts = directory / "config"
        self.scripts.mkdir()
        self.ports = {6379: free_port(), 26379: free_port()}
        pod = rendered.get("StatefulSet", "lmcache-redis")["spec"]
        self.replicas = pod["replicas"]
        self.nodes = nodes(self.replicas)
        secrets = rendered.named("Secret")
        self.password = ""
        if "lmcache-redis" in secrets:
            self.password = base64.b64decode(secrets["lmcache-redis"]["data"]["redis-password"]).decode()
        for name, text in rendered.get("ConfigMap", "lmcache-redis")["data"].items():
            # Minutes of a cluster in seconds.
            for slow, quick in (
                ("milliseconds SERVICE 5000", "milliseconds SERVICE 1000"),
                ("SERVICE 10000", "SERVICE 4000"),
            ):
                text = text.replace(slow, quick)  # noqa: PLW2901
            (self.scripts / name).write_text(text)
        self.specs = {spec["name"]: spec for spec in pod["template"]["spec"]["containers"]}
        self.containers = {
            (kind, node): Container(self, node, spec, directory / node / kind)
            for node in self.nodes
            for kind, spec in self.specs.items()
        }

    def adapt(self, text: str) -> str:
        """Addresses and ports of this machine in place of the cluster's."""
        for number, node in enumerate(self.nodes):
            text = text.replace(f"lmcache-redis-{number}.{DOMAIN}", node)
        for port, here in self.ports.items():
            text = re.sub(rf"\b{port}\b", str(here), text)
        return text.replace("/etc/kvstrata/redis-tls", str(self.tls_directory)).replace(
            "$(REDIS_PASSWORD)", self.password
        )

    def start(self) -> None:
        # Sentinels look for replicas every ten seconds: these are there when the sentinels first do.
        for kind in self.specs:
            started = [each for key, each in self.containers.items() if key[0] == kind]
            for container in started:
                container.process.start()
            until(lambda started=started: all(each.is_ready() for each in started), f"each {kind} is ready")
        until(self.is_settled, "the nodes are ready, and the sentinels know each other")

    def is_settled(self) -> bool:
        return (
            (bool(self.master()) or self.replicas < 3)
            and all(container.is_ready() for container in self.containers.values())
            and all(
                int(self.sentinel(node)["num-other-sentinels"]) == self.replicas - 1
                and int(self.sentinel(node)["num-slaves"]) == self.replicas - 1
                # A failover that meets another one leaves sentinels that disagree for good.
                and self.sentinel(node)["flags"] == "master"
                for kind, node in self.containers
                if kind == "sentinel"
            )
        )

    def sentinel(self, node: str) -> Any:
        return self.containers["sentinel", node].ask("SENTINEL", "MASTER", "mymaster")

    def master(self) -> str:
        """The node that the sentinels which run name, when they agree."""
        asked = [
            each for (kind, _), each in self.containers.items() if kind == "sentinel" and each.process.running
        ]
        named = {each.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")[0] for each in asked}
        return named.pop() if len(named) == 1 else ""

    def redis(self, node: str) -> Container:
        return self.containers["redis", node]

    def num_keys(self, node: str) -> int:
        return int(self.redis(node).ask("DBSIZE"))

    def stop(self) -> None:
        for container in self.containers.values():
            container.process.stop()


@pytest.fixture(autouse=True)
def programs() -> None:
    for program in ("redis-server", "redis-cli"):
        if shutil.which(program) is None:
            pytest.skip(f"system: needs {program} in PATH")


@pytest.fixture
def tls_directory(tmp_path: Path) -> Path:
    """A Secret as cert-manager makes it, for the nodes' addresses."""
    from kvstrata.testing.tls import Certificates  # noqa: PLC0415 - needs cryptography

    directory = tmp_path / "tls"
    directory.mkdir()
    Certificates(directory).issue("tls", nodes(3))
    (directory / "authority.crt").rename(directory / "ca.crt")
    return directory


def written(tier: Tier, keys: list[str], frames: list[memoryview]) -> bool:
    try:
        tier.write(keys, frames)
    except TierUnavailable:
        return False
    return True


def remote_url(rendered: Any) -> str:
    """The URL that the chart gives to engines."""
    return next(word for word in rendered.notes.split() if "-sentinel://" in word)


@contextlib.contextmanager
def running(rendered: Any, directory: Path, tls_directory: Path) -> Iterator[Group]:
    group = Group(rendered, directory, tls_directory)
    try:
        group.start()
        yield group
    finally:
        group.stop()


def test_three_replicas_live_through_what_pods_live_through(render, tmp_path: Path) -> None:
    rendered = render({"lmcache": {"enabled": True}})
    keys, frames = make_keys(20), [make_frame(100_000, seed) for seed in range(20)]
    with running(rendered, tmp_path, tmp_path) as group:
        first, *others = group.nodes
        assert group.master() == first
        assert group.redis(first).ask("CONFIG", "GET", "maxmemory")["maxmemory"] == str(64 << 30)
        with contextlib.closing(open_tier(tier_from_url(group.adapt(remote_url(rendered))))) as tier:
            tier.write(keys, frames)
            until(
                lambda: all(group.num_keys(node) == 40 for node in group.nodes),
                "the replicas have everything",
            )

            # The master's node is lost: another one takes over with all it had.
            for kind in ("redis", "sentinel"):
                group.containers[kind, first].process.stop()
            until(lambda: group.master() in others, "the sentinels choose another master")
            until(lambda: written(tier, keys[:1], frames[:1]), "the tier writes to the new master")
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]

            # It comes back, with an empty sentinel: a replica, and no stranger to the others.
            shutil.rmtree(tmp_path / first / "sentinel")
            (tmp_path / first / "sentinel").mkdir()
            for kind in ("redis", "sentinel"):
                group.containers[kind, first].process.start()
            until(group.is_settled, "the node is a replica again")
            assert group.master() in others

            # The master's process is killed and restarted at once, empty: it does not empty the others.
            second = group.master()
            group.redis(second).process.kill()
            assert group.redis(second).process.wait_until_ended()
            group.redis(second).process.stop()
            group.redis(second).process.start()
            until(lambda: group.master() not in {"", second} and group.is_settled(), "another one takes over")
            assert group.num_keys(group.master()) == 40

            # A pod ends in an orderly way: the hook hands over, the cache is written to disk.
            third = group.master()
            hook = group.specs["redis"]["lifecycle"]["preStop"]["exec"]["command"]
            assert group.redis(third).run(hook)
            until(lambda: group.master() not in {"", third}, "all sentinels know")
            group.redis(third).process.stop()
            assert group.redis(third).process.returncode == 0
            assert (tmp_path / third / "data" / "dump.rdb").stat().st_size > 2_000_000
            until(lambda: written(tier, keys[:1], frames[:1]), "the tier writes to the new master")
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]


def test_two_replicas_with_tls(render, tmp_path: Path, tls_directory: Path) -> None:
    values = {"enabled": True, "replicas": 2, "tls": {"enabled": True, "existingSecret": "redis-tls"}}
    with running(render({"lmcache": values}), tmp_path, tls_directory) as group:
        first, second = group.nodes
        group.redis(first).ask("SET", "a", "b")
        until(lambda: group.redis(second).ask("GET", "a") == "b", "the copy is made")
        assert group.redis(second).ask("ROLE")[0] == "slave"
        # The master comes back as master, with what it wrote to disk.
        group.redis(first).process.stop()
        until(lambda: not group.redis(second).is_ready(), "the copy is not ready without its master")
        group.redis(first).process.start()
        until(group.is_settled, "both are there again")
        assert group.redis(first).ask("ROLE")[0] == "master"
        assert group.redis(first).ask("GET", "a") == "b"


def test_three_replicas_with_tls_have_one_master(render, tmp_path: Path, tls_directory: Path) -> None:
    rendered = render({"lmcache": {"enabled": True, "tls": {"enabled": True, "existingSecret": "redis-tls"}}})
    keys, frames = make_keys(3), [make_frame(1000, seed) for seed in range(3)]
    with running(rendered, tmp_path, tls_directory) as group:
        url = group.adapt(remote_url(rendered))
        assert url.startswith("rediss-sentinel://")
        with contextlib.closing(open_tier(tier_from_url(url))) as tier:
            tier.write(keys, frames)
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]


def test_one_without_password(render, tmp_path: Path) -> None:
    rendered = render({"lmcache": {"enabled": True, "replicas": 1, "auth": {"enabled": False}}})
    keys, frames = make_keys(3), [make_frame(1000, seed) for seed in range(3)]
    with running(rendered, tmp_path, tmp_path) as group:
        url = f"redis://{group.nodes[0]}:{group.ports[6379]}"
        with contextlib.closing(open_tier(tier_from_url(url))) as tier:
            tier.write(keys, frames)
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]
