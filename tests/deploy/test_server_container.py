"""The DaemonSet's container, run as Kubernetes would run it: its arguments, its environment, its probes."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.redis_server import RedisServer

pytestmark = pytest.mark.deploy


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_the_container_starts_and_its_probes_answer(render: Any, tmp_path: Path) -> None:
    ports = {"5555": str(free_port()), "8080": str(free_port())}
    with RedisServer(password="s3cret") as redis:
        rendered = render(
            {
                "image": {"repository": "registry.example.net/kvstrata"},
                "externalRedis": {
                    "url": f"redis://:$(REDIS_PASSWORD)@127.0.0.1:{redis.port}",
                    "existingSecret": "cache",
                },
                "server": {"enabled": True, "l1SizeGb": 1, "settings": {"num_workers": 2}},
            }
        )
        (spec,) = rendered.get("DaemonSet", "kvstrata-server")["spec"]["template"]["spec"]["containers"]
        token = base64.b64decode(rendered.get("Secret", "kvstrata-server")["data"]["token"])
        (tmp_path / "token").write_bytes(token)
        (tmp_path / "token").chmod(0o440)
        settings = rendered.get("ConfigMap", "kvstrata-server")["data"]["kvstrata.yaml"]
        (tmp_path / "kvstrata.yaml").write_text(settings)

        def adapt(text: str) -> str:
            for path, here in (
                ("/etc/kvstrata/token", tmp_path),
                ("/etc/kvstrata/settings", tmp_path),
                ("/run/kvstrata", tmp_path / "run"),
                ("0.0.0.0", "127.0.0.1"),
                ("$(REDIS_PASSWORD)", "s3cret"),
            ):
                text = text.replace(path, str(here))
            return re.sub(r"=(5555|8080)$", lambda match: f"={ports[match[1]]}", text)

        env = {item["name"]: adapt(item["value"]) for item in spec["env"] if "value" in item}
        probes = {
            kind: spec[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
        }
        url = f"http://127.0.0.1:{ports['8080']}"
        with ServerProcess(
            "server",
            [str(Path(sys.executable).parent / "kvstrata"), *map(adapt, spec["args"])],
            log_path=tmp_path / "log",
            env=env,
            ready=lambda: answers(url + probes["startup"]),
        ):
            assert answers(url + probes["liveness"])
            assert answers(url + probes["readiness"])
            assert "kvstrata_" in httpx.get(f"{url}/metrics").text
            assert httpx.post(f"{url}/clear", json={}).status_code == 401
            authorization = {"Authorization": f"Bearer {token.decode()}"}
            config = httpx.get(f"{url}/config", headers=authorization).text
            assert str(redis.port) in config
            assert "s3cret" not in config + (tmp_path / "log").read_text()
            assert (tmp_path / "run" / f"pool-{ports['5555']}.sock").is_socket()
