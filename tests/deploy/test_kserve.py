"""deploy/kserve: built by kustomize, valid for Kubernetes and KServe, and its containers run as they are."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pod import VLLMContainer, environment, expand

from kvstrata.config import load_settings, tier_from_url
from kvstrata.errors import TierUnavailable
from kvstrata.testing.model import smollm2
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.text import natural_text
from kvstrata.tiers.base import PROBE_KEY
from kvstrata.tiers.open import open_tier

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
KSERVE = ROOT / "deploy" / "kserve"
CACHE = ROOT / ".cache"
OVERLAYS = ("redis", "remote")
SECRETS = {"kvstrata-cache": {"password": "s3cret"}, "hf-secret": {"HF_TOKEN": "hf_x"}}

# KServe's API types: pkg/apis/serving/v1beta1/{predictor,predictor_model,component}.go and
# v1alpha1/servingruntime_types.go. Everything else in a predictor, a model or a runtime is Kubernetes' own.
COMPONENT_FIELDS = {
    "minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "containerConcurrency", "timeout", "batcher",
    "canaryTrafficPercent", "logger", "labels", "annotations", "deploymentStrategy",
}  # fmt: skip
MODEL_FIELDS = {"modelFormat", "runtime", "storageUri", "runtimeVersion", "protocolVersion", "storage"}
RUNTIME_FIELDS = {
    "supportedModelFormats",
    "protocolVersions",
    "annotations",
    "labels",
    "multiModel",
    "disabled",
}

Manifest = dict[str, Any]


@functools.cache
def _kubectl() -> str | None:
    return shutil.which("kubectl") or shutil.which(str(Path(sys.executable).parent / "kubectl"))


def kustomize(directory: Path) -> dict[tuple[str, str], Manifest]:
    """The objects that an overlay makes, by kind and name."""
    kubectl = _kubectl()
    if kubectl is None:
        pytest.skip("needs the extra deploy")
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> dict[tuple[str, str], Manifest]:
    return kustomize(KSERVE / "overlays" / request.param)


@pytest.fixture(scope="module")
def with_kserves_runtime(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Manifest]:
    """The overlay redis with the component that the guide names."""
    copied = tmp_path_factory.mktemp("kserve") / "kserve"
    shutil.copytree(KSERVE, copied)
    file = copied / "overlays" / "redis" / "kustomization.yaml"
    file.write_text(file.read_text() + "components:\n  - ../../components/huggingfaceserver\n")
    return kustomize(file.parent)


def pod_of(manifest: Manifest) -> Manifest:
    """The pod that an object becomes, KServe's own fields checked and taken out."""
    spec = copy.deepcopy(manifest["spec"])
    if manifest["kind"] == "Deployment":
        return spec["template"]["spec"]
    if manifest["kind"] == "ServingRuntime":
        for each in spec["supportedModelFormats"]:
            assert each.keys() <= {"name", "version", "autoSelect", "priority"}
        return {key: value for key, value in spec.items() if key not in RUNTIME_FIELDS}
    assert spec.keys() == {"predictor"}
    predictor = spec["predictor"]
    model = predictor.pop("model")
    assert model["modelFormat"].keys() <= {"name", "version"}
    container = {key: value for key, value in model.items() if key not in MODEL_FIELDS}
    container = {"name": "kserve-container", "image": "runtime:1", **container}
    pod = {key: value for key, value in predictor.items() if key not in COMPONENT_FIELDS}
    return {"containers": [container], **pod}


def check(objects: dict[tuple[str, str], Manifest]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra deploy")
    for each in objects.values():
        if each["apiVersion"].startswith("serving.kserve.io/"):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod_of(each)}
            kubernetes_validate.validate(pod, "1.37", strict=True)
        else:
            kubernetes_validate.validate(each, "1.37", strict=True)


class TestManifests:
    def test_objects_are_valid(self, overlay: dict[tuple[str, str], Manifest]) -> None:
        check(overlay)

    def test_the_component_makes_it_kserves_runtime(
        self, with_kserves_runtime: dict[tuple[str, str], Manifest]
    ) -> None:
        check(with_kserves_runtime)
        assert not [name for kind, name in with_kserves_runtime if kind == "ServingRuntime"]
        model = with_kserves_runtime["InferenceService", "llama3"]["spec"]["predictor"]["model"]
        assert model["runtime"] == "kserve-huggingfaceserver"
        assert "--model_name=llama3" in model["args"]
        assert any(each["name"] == "KVSTRATA_REMOTE_URL" for each in model["env"])

    def test_servers_are_restricted_pinned_and_bounded(
        self, overlay: dict[tuple[str, str], Manifest]
    ) -> None:
        for manifest in overlay.values():
            if manifest["kind"] not in {"Deployment", "ServingRuntime"}:
                continue
            pod = pod_of(manifest)
            for container in pod["containers"]:
                context = pod.get("securityContext", {}) | container["securityContext"]
                assert context["runAsNonRoot"] is True
                assert context["runAsUser"] > 0
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert re.search(r":v?\d+\.\d+\.\d+", container["image"])
                assert container["resources"]["limits"]["memory"]
                assert container["readinessProbe"]
                assert container["livenessProbe"]

    def test_mounts_and_secrets_are_there(self, overlay: dict[tuple[str, str], Manifest]) -> None:
        for manifest in overlay.values():
            if manifest["kind"] not in {"Deployment", "InferenceService", "ServingRuntime"}:
                continue
            pod = pod_of(manifest)
            (container,) = pod["containers"]
            volumes = {volume["name"] for volume in pod.get("volumes", ())}
            assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes
            for volume in pod.get("volumes", ()):
                assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in overlay
                assert "secret" not in volume or volume["secret"]["secretName"] in SECRETS
            environment(container, SECRETS)

    def test_the_url_leads_to_the_service(self, overlay: dict[tuple[str, str], Manifest]) -> None:
        (container,) = pod_of(overlay["InferenceService", "llama3"])["containers"]
        url = environment(container, SECRETS)["KVSTRATA_REMOTE_URL"]
        match = re.fullmatch(r"(redis|lm)://:s3cret@([a-z-]+):(\d+)", url)
        assert match is not None
        service = overlay["Service", match[2]]["spec"]
        assert service["ports"][0]["port"] == int(match[3])
        deployment = overlay["Deployment", match[2]]["spec"]["template"]
        assert service["selector"].items() <= deployment["metadata"]["labels"].items()
        assert overlay["NetworkPolicy", match[2]]["spec"]["ingress"][0]["ports"][0]["port"] == int(match[3])

    def test_the_engine_gets_a_right_configuration(
        self, overlay: dict[tuple[str, str], Manifest], tmp_path: Path
    ) -> None:
        """Also beside the variables by which Kubernetes tells a pod of the namespace's services."""
        (container,) = pod_of(overlay["InferenceService", "llama3"])["containers"]
        (tmp_path / "kvstrata.yaml").write_text(overlay["ConfigMap", "kvstrata"]["data"]["kvstrata.yaml"])
        env = environment(container, SECRETS)
        env["KVSTRATA_CONFIG_FILE"] = str(tmp_path / "kvstrata.yaml")
        for (_, name), each in ((key, value) for key, value in overlay.items() if key[0] == "Service"):
            port, stem = each["spec"]["ports"][0], name.upper().replace("-", "_")
            env |= {
                f"{stem}_SERVICE_HOST": "10.0.0.1",
                f"{stem}_SERVICE_PORT": str(port["port"]),
                f"{stem}_SERVICE_PORT_{port['name'].upper()}": str(port["port"]),
                f"{stem}_PORT": f"tcp://10.0.0.1:{port['port']}",
                f"{stem}_PORT_{port['port']}_TCP_ADDR": "10.0.0.1",
            }
        resolved = load_settings(env)
        assert resolved.notices == ()
        assert resolved.settings.remote_url == env["KVSTRATA_REMOTE_URL"]
        assert resolved.settings.max_local_cpu_size == 2.0


@contextlib.contextmanager
def shared_server(overlay: dict[tuple[str, str], Manifest], directory: Path) -> Iterator[dict[str, str]]:
    """The overlay's Redis or remote server as a process; what stands for its address in the engine's variables."""
    ((_, name),) = [key for key in overlay if key[0] == "Deployment"]
    (container,) = pod_of(overlay["Deployment", name])["containers"]
    port, there = free_port(), container["ports"][0]["containerPort"]
    if container["command"] == ["redis-server"] and shutil.which("redis-server") is None:
        pytest.skip("needs redis-server of the system")
    here = {"/etc/kvstrata": str(directory), "0.0.0.0": "127.0.0.1", str(there): str(port)}
    (directory / "password").write_text(SECRETS["kvstrata-cache"]["password"])
    (directory / "password").chmod(0o440)
    env = environment(container, SECRETS)
    program = shutil.which(container["command"][0]) or str(
        Path(sys.executable).parent / container["command"][0]
    )
    command = [program, *(here.get(each, each) for each in (expand(each, env) for each in container["args"]))]
    command = [part.replace("/etc/kvstrata", str(directory)) for part in command]
    if name == "kvstrata-redis":
        command += ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    url = f"{'redis' if name == 'kvstrata-redis' else 'lm'}://:s3cret@127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with contextlib.closing(open_tier(tier_from_url(url))) as tier:
                tier.contains([PROBE_KEY])
        except TierUnavailable:
            return False
        return True

    with ServerProcess(name, command, log_path=directory / "server.log", env=env, ready=answers):
        yield {f"{name}:{there}": f"127.0.0.1:{port}"}


@pytest.mark.system
def test_the_shared_server_starts_and_wants_its_password(
    overlay: dict[tuple[str, str], Manifest], tmp_path: Path
) -> None:
    with shared_server(overlay, tmp_path) as here:
        (address,) = here.values()
        scheme = "redis" if "kvstrata-redis:6379" in here else "lm"
        with (
            contextlib.closing(open_tier(tier_from_url(f"{scheme}://:wrong@{address}"))) as tier,
            pytest.raises(TierUnavailable),
        ):
            tier.contains([PROBE_KEY])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_replicas_share_prompts(overlay: dict[tuple[str, str], Manifest], tmp_path: Path) -> None:
    """A real vLLM with the InferenceService's arguments and variables; its successor finds what it computed."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    model = smollm2(CACHE)
    (tmp_path / "kvstrata.yaml").write_text(overlay["ConfigMap", "kvstrata"]["data"]["kvstrata.yaml"])
    (engine,) = pod_of(overlay["InferenceService", "llama3"])["containers"]
    (runtime,) = pod_of(overlay["ServingRuntime", "kvstrata-vllm"])["containers"]
    # As KServe joins them: the runtime's container, the model's arguments and variables behind its own.
    args = [each.replace("{{.Name}}", "llama3") for each in (*runtime["args"], *engine["args"])]
    args += ["--enforce-eager", "--enable-prompt-tokens-details", "--max-num-seqs=8"]
    container = {"command": runtime["command"], "args": args, "env": engine["env"]}
    prompt = natural_text(2000)
    with shared_server(overlay, tmp_path) as here:
        for number, hits in enumerate((False, True)):
            port = free_port()
            vllm = VLLMContainer(
                container,
                "llama3",
                port=port,
                log_path=tmp_path / f"vllm-{number}.log",
                secrets=SECRETS,
                here={
                    **here,
                    "--port=8080": f"--port={port}",
                    "--model=meta-llama/Llama-3.2-1B-Instruct": f"--model={model}",
                    "--max-model-len=10000": "--max-model-len=1024",
                    "/etc/kvstrata": str(tmp_path),
                },
            )
            with vllm.process:
                answer = vllm.complete(prompt, max_tokens=4)
                assert (answer.cached_tokens == answer.prompt_tokens - 1) is hits
                assert vllm.complete(prompt, max_tokens=4).cached_tokens
            assert "s3cret" not in (tmp_path / f"vllm-{number}.log").read_text()
