from __future__ import annotations

import pytest
import torch
from simulated import VOCABULARY
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvstrata.integrations.vllm.hashes import RequestHashes, UnknownExtraKeyError, encode_extra_keys
from kvstrata.types import KVLayout, Namespace

LAYOUT = KVLayout(block_size=16, page_bytes=(64, 64), dtype="bfloat16", kernel_format="TEST/vec")
NAMESPACE = Namespace("vllm", "model", "f" * 64, "auto", 1, "one", 32, LAYOUT)
TOKENS = [31 * n % VOCABULARY for n in range(100)]


def image(identifier, offset, length):
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=identifier, mm_position=PlaceholderRange(offset, length)
    )


def hashes(tokens=TOKENS, **arguments):
    request = Request("r", list(tokens), SamplingParams(max_tokens=9), None, **arguments)
    return RequestHashes(request, NAMESPACE)


def blocks(chain, num_tokens=100):
    prefix = chain.prefix(num_tokens)
    return [prefix.block_hash(index) for index in range(prefix.num_blocks)] + [prefix.remainder_hash]


def first_difference(left, right):
    pairs = zip(blocks(left), blocks(right), strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), None)


def test_equal_requests_have_equal_hashes():
    assert blocks(hashes()) == blocks(hashes())
    assert len(blocks(hashes())) == 7


def test_hashes_do_not_depend_on_how_they_were_asked_for():
    chain = hashes(mm_features=[image("cat", 20, 40), image("dog", 70, 10)])
    for num_tokens in (10, 33, 64, 90):
        chain.prefix(num_tokens)
    assert blocks(chain) == blocks(hashes(mm_features=[image("cat", 20, 40), image("dog", 70, 10)]))


def test_a_salt_changes_every_block():
    assert first_difference(hashes(), hashes(cache_salt="tenant")) == 0
    assert first_difference(hashes(cache_salt="a"), hashes(cache_salt="b")) == 0


def test_an_adapter_changes_every_block_by_name_and_path():
    one = LoRARequest("name", 1, "/one")
    assert first_difference(hashes(), hashes(lora_request=one)) == 0
    assert (
        first_difference(hashes(lora_request=one), hashes(lora_request=LoRARequest("name", 1, "/two"))) == 0
    )
    assert (
        first_difference(hashes(lora_request=one), hashes(lora_request=LoRARequest("other", 1, "/one"))) == 0
    )
    assert (
        first_difference(hashes(lora_request=one), hashes(lora_request=LoRARequest("name", 7, "/one")))
        is None
    )


def test_an_image_changes_the_blocks_from_where_it_is():
    cat = hashes(mm_features=[image("cat", 36, 8)])
    assert first_difference(hashes(), cat) == 2
    assert first_difference(cat, hashes(mm_features=[image("dog", 36, 8)])) == 2
    assert first_difference(cat, hashes(mm_features=[image("cat", 37, 8)])) == 2
    assert first_difference(hashes(), hashes(mm_features=[image("cat", 97, 3)])) == 6  # in the remainder


def test_prompt_embeddings_change_their_blocks():
    embeddings = torch.zeros(100, 4)
    other = embeddings.clone()
    other[50] = 1
    with_embeddings = [
        RequestHashes(Request("r", None, SamplingParams(max_tokens=9), None, prompt_embeds=values), NAMESPACE)
        for values in (embeddings, other)
    ]
    assert first_difference(*with_embeddings) == 3


def test_pieces_fit_together():
    chain = hashes()
    prefix = chain.prefix(100)
    pieces = chain.chunks(0, 3) + chain.tail(100)
    assert [(piece.first_token, piece.num_tokens) for piece in pieces] == [
        (0, 32),
        (32, 32),
        (64, 32),
        (96, 4),
    ]
    assert [piece.parent_hash for piece in pieces] == [prefix.root] + [
        piece.chunk_hash for piece in pieces[:-1]
    ]
    assert pieces[1].chunk_hash == prefix.block_hash(3)
    assert pieces[3].chunk_hash == prefix.remainder_hash
    assert len({piece.tokens_hash for piece in pieces}) == 4
    assert hashes().chunks(1, 2) == pieces[1:2]


def test_extra_keys_are_told_apart():
    keys = [
        None,
        (("lora", "a", "bc"),),
        (("lora", "ab", "c"),),
        (("mm", "a", 1),),
        (("mm", "a", "1"),),
        (("mm", "a", 1), ("mm", "b", 2)),
        (("mm", "a", 1), ("mm", "b", 3)),
        (("prompt_embeds", b"abc"),),
        (("prompt_embeds", "abc"),),
    ]
    assert len({encode_extra_keys(key) for key in keys}) == len(keys)
    assert encode_extra_keys((("cache_salt", "x"),)) == b""


@pytest.mark.parametrize("keys", [(("weather", "sunny"),), ("cat",), (("mm", ["a"], 1),), ((),)])
def test_unknown_extra_keys_are_refused(keys):
    with pytest.raises(UnknownExtraKeyError):
        encode_extra_keys(keys)
