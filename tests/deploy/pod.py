"""A pod's container as a process here: its command, arguments and environment as Kubernetes would give them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstrata.testing.process import ServerProcess
from kvstrata.testing.vllm_client import VLLMClient

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
# What the image and the node supply instead: an interpreter, and how vLLM is to use a CPU.
_OF_THE_MACHINE = {
    "PATH": os.environ["PATH"],
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
}


def expand(text: str, known: Mapping[str, str]) -> str:
    """``$(NAME)`` of variables that stand before, as the kubelet fills them in; others stay as they are."""
    return _REFERENCE.sub(lambda match: known.get(match[1], match[0]), text)


def environment(container: Mapping[str, Any], secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The variables of a container, in their order."""
    found: dict[str, str] = {}
    for item in container.get("env", ()):
        if "value" in item:
            found[item["name"]] = expand(item["value"], found)
        else:
            reference = item["valueFrom"]["secretKeyRef"]
            found[item["name"]] = secrets[reference["name"]][reference["key"]]
    return found


class VLLMContainer(VLLMClient):
    """A container of vLLM, run with nothing but its own environment and what ``_OF_THE_MACHINE`` says.

    Args:
        container: as the Deployment has it.
        secrets: by name, with their keys.
        here: texts that stand for something else on this machine (directories, the port), replaced everywhere.
    """

    def __init__(
        self,
        container: Mapping[str, Any],
        model_name: str,
        *,
        port: int,
        log_path: Path,
        secrets: Mapping[str, Mapping[str, str]],
        here: Mapping[str, str],
    ) -> None:
        super().__init__("127.0.0.1", port, model_name)

        def adapt(text: str) -> str:
            for there, local in here.items():
                text = text.replace(there, local)
            return text

        variables = environment(container, secrets)
        command = [adapt(expand(each, variables)) for each in (*container["command"], *container["args"])]
        command[0] = {"python3": sys.executable}.get(command[0], command[0])
        env: dict[str, str | None] = dict.fromkeys(os.environ)
        env |= {**_OF_THE_MACHINE, **{name: adapt(value) for name, value in variables.items()}}
        self.process = ServerProcess(
            "vLLM",
            [*command, "--host", "127.0.0.1"],
            log_path=log_path,
            env=env,
            ready=self.healthy,
            start_timeout_seconds=300,
            grace_seconds=15,
        )
