"""The public Python API: what the documentation shows works as shown."""

from __future__ import annotations

import kvstrata


def test_every_public_name_is_there() -> None:
    for name in kvstrata.__all__:
        assert getattr(kvstrata, name) is not None, name


def test_store_and_find_a_prefix_again() -> None:
    """The example of docs/python-api.md."""
    layout = kvstrata.KVLayout(block_size=16, page_bytes=(4096,) * 4, dtype="bfloat16", kernel_format="mine")
    namespace = kvstrata.Namespace(
        engine="mine",
        model_name="org/model",
        model_fingerprint="1",
        kv_dtype="auto",
        world_size=1,
        parallel_shape="one",
        chunk_size=64,
        layout=layout,
    )
    tokens = list(range(200))
    hasher = kvstrata.PrefixHasher(namespace)
    hasher.extend(tokens)
    prefix = hasher.prefix(tokens)
    with kvstrata.LocalClient(kvstrata.Settings(max_local_cpu_size=0.01)) as cache:
        pieces = kvstrata.full_chunks(hasher, 64, 0, 3) + kvstrata.tail_pieces(prefix, 16, 64)
        reservation = cache.reserve(namespace, 0, pieces)
        for number, buffer in enumerate(reservation.buffers):
            assert buffer is not None
            buffer[:] = bytes([number]) * len(buffer)
        cache.commit(reservation)

        hit = cache.wait_lookup("request-1", namespace, prefix)
        assert hit.num_tokens == 200
        payloads = cache.payloads("request-1", 0, hit, namespace)
        assert payloads is not None
        assert [payload[0] for payload in payloads] == [0, 1, 2, 3]
        cache.release("request-1")
