from __future__ import annotations

import os
from types import SimpleNamespace

import msgspec
import pytest

from kvstrata.errors import LayoutError
from kvstrata.integrations.vllm.metadata import WorkerReport
from kvstrata.integrations.vllm.namespace import common_layout, model_fingerprint, round_chunk_size
from kvstrata.types import KVLayout

LAYOUT = KVLayout(block_size=16, page_bytes=(64, 64), dtype="bfloat16", kernel_format="TEST/vec")


def model(folder, **changes):
    config = {"num_layers": 2, "rope": {"theta": 1e4}, "transformers_version": "5", "_name_or_path": "x"}
    facts = {"dtype": "bfloat16", "quantization": None, "revision": None, "model": str(folder)}
    config |= changes.pop("config", {})
    return SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config), **(facts | changes))


def test_the_fingerprint_depends_on_what_the_model_is(tmp_path):
    base = model_fingerprint(model(tmp_path))
    assert base == model_fingerprint(model(tmp_path))
    assert base == model_fingerprint(
        model(tmp_path, config={"transformers_version": "6", "_name_or_path": "y"})
    )
    for changes in (
        {"config": {"rope": {"theta": 1e5}}},
        {"config": {"num_layers": 3}},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"revision": "abc"},
    ):
        assert base != model_fingerprint(model(tmp_path, **changes)), changes


def test_the_fingerprint_depends_on_local_weights_and_not_on_their_place(tmp_path):
    weights = os.urandom(300_000)
    prints = []
    for name, content in (
        ("a", weights),
        ("b", weights),
        ("c", weights[:-1] + bytes([weights[-1] ^ 1])),
        ("d", weights + b"x"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        prints.append(model_fingerprint(model(folder)))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_fingerprint_notices_training_in_place(tmp_path):
    weights = bytearray(os.urandom(1_000_000))
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights)
    before = model_fingerprint(model(tmp_path))
    for position in range(0, len(weights), 1000):  # a step of training changes nearly every weight
        weights[position] ^= 1
    file.write_bytes(weights)
    assert model_fingerprint(model(tmp_path)) != before


@pytest.mark.parametrize(("wanted", "rounded"), [(256, 256), (16, 128), (1, 128), (129, 256), (300, 384)])
def test_chunks_are_whole_blocks(wanted, rounded):
    assert round_chunk_size(wanted, 128) == rounded


def test_ranks_with_the_same_layout_have_one():
    assert common_layout({(0, 0): LAYOUT, (0, 1): LAYOUT}) == LAYOUT


def test_ranks_that_differ_in_meaning_only_have_a_layout_of_their_own():
    other = msgspec.structs.replace(LAYOUT, kernel_format="TEST/vec scales [0.5]")
    both = common_layout({(0, 0): LAYOUT, (0, 1): other})
    swapped = common_layout({(0, 0): other, (0, 1): LAYOUT})
    assert len({both.fingerprint, swapped.fingerprint, LAYOUT.fingerprint, other.fingerprint}) == 4
    assert both.payload_bytes(16) == LAYOUT.payload_bytes(16)


def test_ranks_that_differ_in_how_pages_unpack_have_one_layout_without_it():
    described = msgspec.structs.replace(LAYOUT, pages="this one does not know")
    for ranks in ({(0, 0): LAYOUT, (0, 1): described}, {(0, 0): described, (0, 1): LAYOUT}):
        both = common_layout(ranks)
        assert both.pages == "ranks arrange their pages differently"
        assert both.fingerprint == LAYOUT.fingerprint


def test_ranks_that_differ_in_size_are_refused():
    other = msgspec.structs.replace(LAYOUT, page_bytes=(64,))
    with pytest.raises(LayoutError, match="different amounts"):
        common_layout({(0, 0): LAYOUT, (1, 0): other})


def test_reports_add_up():
    first = WorkerReport(7, {"a#1": 1, "b#1": 1})
    second = WorkerReport(7, {"a#1": 1}, frozenset({"a#1"}))
    assert first.aggregate(second) == WorkerReport(7, {"a#1": 2, "b#1": 1}, frozenset({"a#1"}))
    with pytest.raises(TypeError):
        first.aggregate(object())
