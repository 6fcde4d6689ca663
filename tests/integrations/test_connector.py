"""The connector in vLLM's own scheduler, on a real core. Wrong KV anywhere makes a wrong answer."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from functools import partial

import pytest
import simulated
from simulated import expected_answer
from vllm.lora.request import LoRARequest

import kvstrata.integrations.vllm.connector as connector_module
from kvstrata.client import LocalClient, RemoteClient
from kvstrata.config import Settings
from kvstrata.testing.forked import ServerHost
from kvstrata.testing.waiting import wait_until
from kvstrata.types import PENDING

PROMPT = [17 * n % 50_000 for n in range(1, 201)]


def leases(client):
    return client.cache._lookups


def test_an_exact_repeat_hits_all_but_one_token(make_engine, client, log):
    engine = make_engine()
    prompt = PROMPT[:50]
    assert engine.ask("first", prompt, 3) == expected_answer(prompt, 3)
    engine.scheduler.reset_prefix_cache()
    computed = engine.num_computed
    assert engine.ask("second", prompt, 3) == expected_answer(prompt, 3)
    assert engine.num_computed - computed == 3  # the prompt's last token and two of the answer
    said = [message.partition(" in ")[0] for message in log()]
    for line in (
        "Reqid: first, Total tokens 50, KVStrata hit tokens: 0, need to load: 0",
        "Storing KV cache for 50 out of 50 tokens for request first",
        "Stored 50 tokens",
        "Reqid: second, Total tokens 50, KVStrata hit tokens: 49, need to load: 49",
        "Retrieved 49 tokens",
    ):
        assert said.count(line) == 1, line
    assert not any("request second" in line for line in said)  # nothing new to store
    assert not leases(client)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 95, 96, 97, 128, 200])
def test_lengths_around_blocks_and_chunks(make_engine, client, length):
    prompt = PROMPT[:length]
    for name in ("cold", "warm"):
        engine = make_engine()
        assert engine.ask(name, prompt, 20) == expected_answer(prompt, 20)
    assert engine.num_computed == 20
    assert not leases(client)


def test_chunked_prefill_stores_as_it_goes(make_engine, client, log):
    engine = make_engine(max_num_batched_tokens=50)
    assert engine.ask("a", PROMPT, 2) == expected_answer(PROMPT, 2)
    stored = [message for message in log() if message.startswith("Storing")]
    assert [message.split()[4] for message in stored] == [
        "32",
        "64",
        "32",
        "72",
    ]  # at 50, 100, 150, 200 tokens
    other = make_engine()
    assert other.ask("b", [*PROMPT[:150], 7, 8, 9], 2) == expected_answer([*PROMPT[:150], 7, 8, 9], 2)
    assert other.num_computed == 153 - 128 + 1


def test_without_tails_whole_chunks_are_stored(make_engine):
    make_engine(extra_config={"save_unfull_chunk": False}).ask("a", PROMPT[:50])
    engine = make_engine()
    assert engine.ask("b", PROMPT[:50]) == expected_answer(PROMPT[:50], 1)
    assert engine.num_computed == 50 - 32


def test_a_tail_is_found_by_a_longer_prompt(make_engine):
    make_engine().ask("a", PROMPT[:55])
    engine = make_engine()
    assert engine.ask("b", PROMPT[:100]) == expected_answer(PROMPT[:100], 1)
    assert engine.num_computed == 100 - 48


def test_generated_tokens_are_stored_when_asked(make_engine):
    engine = make_engine(extra_config={"save_decode_cache": True})
    prompt = PROMPT[:40]
    answer = engine.ask("a", prompt, 60)
    assert answer == expected_answer(prompt, 60)
    other = make_engine()
    turn = prompt + answer + [5, 6, 7]
    assert other.ask("b", turn) == expected_answer(turn, 1)
    assert other.num_computed == len(turn) - 96


def test_generated_tokens_are_not_stored_otherwise(make_engine):
    engine = make_engine()
    answer = engine.ask("a", PROMPT[:40], 60)
    other = make_engine()
    other.ask("b", PROMPT[:40] + answer)
    assert other.num_computed == 100 - 32


def test_only_what_vllm_lacks_is_loaded(make_engine, log):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    engine.ask("b", PROMPT[:70])  # four blocks of 16 in vLLM's own cache: two chunks
    assert engine.ask("c", PROMPT) == expected_answer(PROMPT, 1)
    assert "Reqid: c, Total tokens 200, KVStrata hit tokens: 199, need to load: 135" in log()
    # A hit in the middle of a chunk: vLLM has 5 blocks, the cache 6.
    other = make_engine()
    other.ask("d", [*PROMPT[:80], 1])
    other.ask("e", PROMPT[:96])
    assert other.ask("f", PROMPT) == expected_answer(PROMPT, 1)


@pytest.fixture
def disk_client(tmp_path, monkeypatch):
    """A core with a disk tier, in the place of ``client``."""
    tier = {"kind": "disk", "path": str(tmp_path), "max_bytes": 1 << 30, "name": "disk"}
    with LocalClient(Settings(max_local_cpu_size=0.02, gate="always", tiers=(tier,))) as local:
        monkeypatch.setattr(connector_module, "connect", lambda *_, **__: local)
        yield local


def test_what_vllm_has_is_not_read_from_tiers(make_engine, disk_client):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    engine.ask("b", PROMPT[:100])  # six blocks of 16 in vLLM's own cache: three chunks
    assert disk_client.cache.flush(20)
    disk_client.clear(tiers=False)
    before = disk_client.stats()["totals"]["hit_tokens"]["disk"]
    assert engine.ask("c", PROMPT) == expected_answer(PROMPT, 1)
    assert disk_client.stats()["totals"]["hit_tokens"]["disk"] - before == 200 - 96
    assert disk_client.stats()["totals"]["lookup_tokens"] < 600
    # Nobody looked whether the first three chunks are held, so they were offered, and are in L1 again.
    held = disk_client.stats()["l1"]["entries"]
    disk_client.clear(tiers=False)
    other = make_engine()
    assert other.ask("d", PROMPT) == expected_answer(PROMPT, 1)
    assert disk_client.stats()["l1"]["entries"] == held
    assert not leases(disk_client)


def test_vllm_evicts_what_a_look_up_left_out(make_engine, disk_client, monkeypatch):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    engine.ask("b", PROMPT[:100])
    assert disk_client.cache.flush(20)
    disk_client.clear(tiers=False)
    lookup, seen = disk_client.lookup, []

    def held_up(request_id, namespace, prefix, first_token=0, **_):
        seen.append(first_token)
        return PENDING if len(seen) < 4 else lookup(request_id, namespace, prefix, first_token)

    monkeypatch.setattr(disk_client, "lookup", held_up)
    request = engine.add("c", PROMPT)
    engine.step()
    engine.scheduler.reset_prefix_cache()
    computed = engine.num_computed
    engine.run()
    assert seen[0] == 96
    assert set(seen[1:]) == {0}
    assert list(request.output_token_ids) == expected_answer(PROMPT, 1)
    assert engine.num_computed - computed == 1
    assert not leases(disk_client)


def test_blocks_of_vllms_own_cache_are_not_written(make_engine, client, monkeypatch):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    engine.ask("b", [*PROMPT[:80], 1])
    copier = engine.workers[0]._worker._copier
    written, load = [], copier.load

    def watched(payload, first, block_ids):
        written.extend(block_ids)
        load(payload, first, block_ids)

    monkeypatch.setattr(copier, "load", watched)
    request = engine.add("c", PROMPT)
    engine.step()
    engine.step()
    table = engine._tables["c"]
    assert written == table[5:13]  # blocks 0-4 were vLLM's own, in the middle of the third chunk
    engine.run()
    assert list(request.output_token_ids) == expected_answer(PROMPT, 1)


def test_a_hit_that_vllm_has_itself_loads_nothing(make_engine, client, log):
    engine = make_engine()
    engine.ask("a", PROMPT[:64])
    prompt = [*PROMPT[:64], 3, 4]
    assert engine.ask("b", prompt) == expected_answer(prompt, 1)
    assert "Reqid: b, Total tokens 66, KVStrata hit tokens: 64, need to load: 0" in log()
    # Nothing could be gained here: nobody is asked.
    assert engine.ask("c", prompt[:65]) == expected_answer(prompt[:65], 1)
    assert not any(message.startswith(("Reqid: c", "Retrieved")) for message in log())
    assert not leases(client)


def test_without_vllms_prefix_cache(make_engine):
    engine = make_engine(prefix_caching=False)
    for name in "abc":
        assert engine.ask(name, PROMPT, 4) == expected_answer(PROMPT, 4)
    assert engine.num_computed == 203 + 4 + 4


def test_requests_that_share_a_prefix_in_flight(make_engine, client, log):
    engine = make_engine(max_num_batched_tokens=48)
    requests = {n: engine.add(f"r{n}", PROMPT[:100] + [n] * 10, 5) for n in range(6)}
    engine.run()
    for n, request in requests.items():
        assert list(request.output_token_ids) == expected_answer(PROMPT[:100] + [n] * 10, 5)
    warm = make_engine(max_num_batched_tokens=48)
    requests = {n: warm.add(f"s{n}", PROMPT[:100] + [n] * 10, 5) for n in range(6)}
    warm.run()
    for n, request in requests.items():
        assert list(request.output_token_ids) == expected_answer(PROMPT[:100] + [n] * 10, 5)
    assert warm.num_computed == 6 * 5
    # The shared blocks are loaded once; the others wait for them and load what is their own.
    loaded = [int(message.split()[1]) for message in log() if message.startswith("Retrieved")]
    assert sorted(loaded) == [13] * 5 + [109]
    assert not leases(client)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_preemption_and_resumption(make_engine, client, prefix_caching, overlap):
    engine = make_engine(
        num_blocks=14, prefix_caching=prefix_caching, overlap=overlap, max_num_batched_tokens=40
    )
    prompts = {f"p{n}": [n, *PROMPT[: 60 + n]] for n in range(4)}
    requests = {name: engine.add(name, prompt, 40) for name, prompt in prompts.items()}
    engine.run()
    assert sum(request.num_preemptions for request in requests.values()) > 0
    for name, request in requests.items():
        assert list(request.output_token_ids) == expected_answer(prompts[name], 40)
    assert not leases(client)


def test_aborts_end_their_leases(make_engine, client):
    make_engine().ask("a", PROMPT)
    engine = make_engine(max_num_seqs=1)
    engine.add("running", PROMPT[:100], 50)
    engine.step()
    engine.add("waiting", PROMPT, 5)
    engine.step()
    engine.abort("waiting")
    engine.abort("running")
    engine.run()
    assert not leases(client)
    assert not engine.connector._scheduler._requests
    assert engine.ask("next", PROMPT, 2) == expected_answer(PROMPT, 2)


def test_an_abort_while_the_load_is_under_way(make_engine, client):
    make_engine().ask("a", PROMPT)
    engine = make_engine(overlap=True)
    engine.add("b", PROMPT, 5)
    engine.step()
    engine.abort("b")
    engine.run()
    assert not leases(client)
    assert engine.ask("c", PROMPT, 2) == expected_answer(PROMPT, 2)


@pytest.mark.parametrize(
    ("params", "num_read", "num_written"),
    [
        (None, 199, 200),
        ({"kvstrata.skip_read": True}, 0, 200),
        ({"kvstrata.skip_write": True}, 199, 0),
        ({"lmcache.skip_save": True}, 199, 0),
        ({"kvstrata.skip_read": False, "kvstrata.skip_write": False}, 199, 200),
    ],
)
def test_switches_of_a_request(make_engine, params, num_read, num_written):
    make_engine().ask("a", PROMPT, params=params)
    engine = make_engine()
    engine.ask("b", PROMPT)
    assert engine.num_computed == (1 if num_written else 200)
    again = make_engine()
    again.ask("c", PROMPT, params=params)
    assert again.num_computed == 200 - num_read


def test_prompt_logprobs_compute_every_token(make_engine):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    assert engine.ask("b", PROMPT, prompt_logprobs=True) == expected_answer(PROMPT, 1)
    assert engine.num_computed == 200


def test_roles(make_engine):
    make_engine(kv_role="kv_consumer").ask("a", PROMPT)
    producer = make_engine(kv_role="kv_producer")
    producer.ask("b", PROMPT)
    assert producer.num_computed == 200
    again = make_engine(kv_role="kv_producer")
    again.ask("c", PROMPT)
    assert again.num_computed == 200
    consumer = make_engine(kv_role="kv_consumer")
    consumer.ask("d", PROMPT)
    assert consumer.num_computed == 1


def test_small_hits_are_not_worth_loading(make_engine, log):
    make_engine().ask("a", PROMPT[:64])
    engine = make_engine(extra_config={"min_retrieve_tokens": 64})
    assert engine.ask("b", PROMPT[:64]) == expected_answer(PROMPT[:64], 1)
    assert "Reqid: b, Total tokens 64, KVStrata hit tokens: 63, need to load: 0" in log()
    assert engine.num_computed == 64


def test_salts_and_adapters_do_not_share(make_engine):
    make_engine().ask("a", PROMPT)
    salted = make_engine()
    salted.ask("b", PROMPT, cache_salt="tenant")
    assert salted.num_computed == 200
    tuned = make_engine()
    tuned.ask("c", PROMPT, lora_request=LoRARequest("adapter", 1, "/path/one"))
    assert tuned.num_computed == 200
    for arguments in (
        {"cache_salt": "tenant"},
        {"lora_request": LoRARequest("adapter", 2, "/path/one")},
    ):
        engine = make_engine()
        engine.ask("d", PROMPT, **arguments)
        assert engine.num_computed == 1, arguments
    moved = make_engine()
    moved.ask("e", PROMPT, lora_request=LoRARequest("adapter", 1, "/path/two"))
    assert moved.num_computed == 200


def test_weights_that_are_replaced_while_an_engine_runs(make_engine, tmp_path):
    """What an engine stores is of the weights that it has loaded, whatever lies there since."""
    folder = simulated.model_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"old")
    engine = simulated.Engine(folder, extra_config={"chunk_size": 32})
    weights.write_bytes(b"new")
    engine.ask("a", PROMPT)
    other = simulated.Engine(folder, extra_config={"chunk_size": 32})
    other.ask("b", PROMPT)
    assert other.num_computed == len(PROMPT)


def test_weights_that_cannot_be_read_are_not_cached_for(make_engine, tmp_path, log):
    folder = simulated.model_folder(tmp_path / "model")
    (folder / "model.safetensors").symlink_to("nowhere")
    engine = simulated.Engine(folder)
    assert engine.ask("a", PROMPT) == expected_answer(PROMPT, 1)
    assert any("weights" in message for message in log())


def test_the_chunk_size_is_rounded_up_to_blocks(make_engine, log):
    engine = make_engine(extra_config={"chunk_size": 8})
    assert engine.connector._scheduler.namespace.chunk_size == 16
    assert sum("chunks have 16 tokens" in message for message in log()) == 1


def test_resetting_the_connectors_cache(make_engine, client):
    engine = make_engine()
    engine.ask("a", PROMPT)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.ask("b", PROMPT) == expected_answer(PROMPT, 1)
    assert engine.num_computed == 400
    engine.scheduler.reset_prefix_cache()
    engine.ask("c", PROMPT)
    assert engine.num_computed == 401


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_what_cannot_be_loaded_is_computed(make_engine, client, monkeypatch, overlap, prefix_caching):
    make_engine().ask("a", PROMPT)
    engine = make_engine(overlap=overlap, prefix_caching=prefix_caching, max_num_batched_tokens=400)
    monkeypatch.setattr(type(client), "payloads", lambda *_: None)
    requests = [engine.add(f"b{n}", [*PROMPT[:190], n], 6) for n in range(3)]
    engine.run()
    for n, request in enumerate(requests):
        assert list(request.output_token_ids) == expected_answer([*PROMPT[:190], n], 6)
    assert engine.num_computed > 3 * 6
    assert not leases(client)


def test_nothing_computed_on_missing_kv_is_stored(make_engine, client, monkeypatch):
    make_engine().ask("a", PROMPT[:96])
    engine = make_engine(max_num_batched_tokens=400)
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "payloads", lambda *_: None)
        # The second request finds the first one's blocks in vLLM's own cache, before they are known to be bad.
        engine.add("b", PROMPT)
        engine.add("c", PROMPT[:96] + [3] * 100)
        engine.run()
    other = make_engine()
    for name, prompt in (("d", PROMPT), ("e", PROMPT[:96] + [3] * 100)):
        assert other.ask(name, prompt, 3) == expected_answer(prompt, 3)
    assert other.num_computed == 2 * 3


def test_a_reset_takes_back_what_has_been_found(make_engine, client):
    """New weights: neither hits found before nor KV computed before may be used after."""
    make_engine().ask("a", PROMPT)
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=64)
    running = engine.add("running", [1, *PROMPT], 5)
    engine.step()
    waiting = engine.add("waiting", PROMPT, 1)
    engine.connector.get_num_new_matched_tokens(waiting, 0)
    assert leases(client)
    engine.connector.reset_cache()
    assert not leases(client)
    engine.run()
    assert list(running.output_token_ids) == expected_answer([1, *PROMPT], 5)
    assert engine.num_computed == 201 + 4 + 200
    other = make_engine()
    other.ask("b", [1, *PROMPT])
    assert other.num_computed == 201


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_reset_covers_what_a_step_under_way_stores(make_engine, overlap, num_ranks):
    """New weights while vLLM is a step ahead: that step stores KV of the old ones after the reset."""
    engine = make_engine(overlap=overlap, num_ranks=num_ranks, max_num_batched_tokens=400)
    engine.add("a", PROMPT)
    planned = engine.scheduler.schedule()
    engine.connector.reset_cache()
    engine._in_flight.append((planned, engine._run(planned)))
    engine.run()
    assert not make_engine(num_ranks=num_ranks).connector._scheduler._client.keys()
    engine.scheduler.reset_prefix_cache()
    engine.num_computed = 0
    engine.ask("b", PROMPT)
    assert engine.num_computed == len(PROMPT)
    engine.scheduler.reset_prefix_cache()
    engine.ask("c", PROMPT)
    assert engine.num_computed == len(PROMPT) + 1, "and then it is used as ever"


def connect_to(endpoint, monkeypatch):
    """The connector's clients are those of a server at ``endpoint``."""

    def connect(*_, name, map_pool, **__):
        remote = RemoteClient(endpoint, name, map_pool=map_pool)
        assert remote.wait_connected(20)
        return remote

    monkeypatch.setattr(connector_module, "connect", connect)


def with_disk(path):
    tier = {"kind": "disk", "path": str(path), "max_bytes": 1 << 30}
    return Settings(max_local_cpu_size=0.02, gate="always", tiers=(tier,))


@contextlib.contextmanager
def disk_filled_through_a_server(make_engine, monkeypatch, path):
    """An engine that has asked for PROMPT, its server, and how another one like that is started."""
    with ServerHost() as host:
        start = partial(host.start, with_disk(path), endpoint=f"ipc://{host.directory}/control")
        connect_to(f"ipc://{host.directory}/control", monkeypatch)
        server = start()
        engine = make_engine()
        engine.ask("a", PROMPT)
        yield engine, server, start


def wait_connected(engine):
    for side in (engine.connector._scheduler, engine.workers[0]._worker):
        wait_until(lambda client=side._client: client.connected, "it has found the server")


def check_all_is_computed_once(engine):
    engine.num_computed = 0
    assert engine.ask("b", PROMPT) == expected_answer(PROMPT, 1)
    assert engine.num_computed == len(PROMPT)
    wait_connected(engine)
    engine.ask("c", [*PROMPT, 1])
    engine.scheduler.reset_prefix_cache()
    engine.num_computed = 0
    engine.ask("d", [*PROMPT, 1])
    assert engine.num_computed == 1, "and then it is used as ever"


def test_a_reset_reaches_a_server_that_is_away(make_engine, monkeypatch, tmp_path):
    """New weights while the server is down: what its disk still holds must not be used once it is back."""
    with disk_filled_through_a_server(make_engine, monkeypatch, tmp_path) as (engine, server, start):
        server.end(signal.SIGTERM)  # it writes what is queued
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        with start():
            wait_connected(engine)
            check_all_is_computed_once(engine)
            engine.close()


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_reset_reaches_a_server_that_comes_after_one_that_was_killed(
    make_engine, monkeypatch, tmp_path, is_noticed
):
    """It had said that all was dropped, and was killed before its disk was cleared."""
    directory, kept = tmp_path / "disk", tmp_path / "kept"
    with disk_filled_through_a_server(make_engine, monkeypatch, directory) as (engine, server, start):
        client = engine.connector._scheduler._client
        wait_until(lambda: client.stats()["tiers"][0]["queued_bytes"] == 0, "all is on disk")
        shutil.copytree(directory, kept)
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        server.end(signal.SIGKILL)
        shutil.rmtree(directory)
        kept.rename(directory)
        with start():
            if is_noticed:
                wait_connected(engine)
            else:  # the look-up finds it
                wait_until(lambda: client._channel.connections % 2 == 1, "there is a connection")
            check_all_is_computed_once(engine)
            engine.close()


def test_what_was_computed_while_the_server_was_away_is_offered_later(make_engine, client, monkeypatch, log):
    engine = make_engine(max_num_batched_tokens=64)
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "connected", False)
        engine.add("a", PROMPT, 5)
        engine.step()
        engine.step()
        assert not any(message.startswith(("Reqid", "Storing")) for message in log())
    engine.run()
    assert "Storing KV cache for 192 out of 200 tokens for request a" in log()
    other = make_engine()
    assert other.ask("b", PROMPT, 3) == expected_answer(PROMPT, 3)
    assert other.num_computed == 3


def test_errors_of_our_own_do_not_fail_requests(make_engine, client, monkeypatch, caplog):
    make_engine().ask("a", PROMPT)
    for broken in ("load", "store"):
        engine = make_engine(prefix_caching=False)

        def fail(*_):
            raise ValueError("broken")

        monkeypatch.setattr(engine.workers[0]._worker._copier, broken, fail)
        for name in ("b", "c"):
            prompt = [*PROMPT, ord(name)]
            assert engine.ask(name, prompt, 3) == expected_answer(prompt, 3)
        assert not leases(client)
    engine = make_engine()
    monkeypatch.setattr("kvstrata.integrations.vllm.hashes.PrefixHasher", fail)
    assert engine.ask("d", PROMPT, 3) == expected_answer(PROMPT, 3)
    caplog.clear()  # its tracebacks hold payloads, and so the pool


def test_what_was_computed_after_a_failed_load_is_stored(make_engine, client, monkeypatch):
    make_engine().ask("a", PROMPT)
    engine = make_engine()
    with monkeypatch.context() as patch:
        # The server has lost everything between the look-up and the load.
        patch.setattr(type(client), "payloads", lambda *_: client.clear() and None)
        engine.ask("b", PROMPT, 20)
    other = make_engine()
    assert other.ask("c", PROMPT) == expected_answer(PROMPT, 1)
    assert other.num_computed == 1


def test_pending_look_ups_do_not_take_the_schedulers_time(make_engine, client, monkeypatch):
    engine = make_engine()
    requests = [engine.add(f"a{n}", [n, *PROMPT]) for n in range(5)]
    asked = []

    def is_pending(_, lease_id, *__, **___):
        asked.append(lease_id)
        time.sleep(0.002)
        return PENDING

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "lookup", is_pending)
        for _ in range(50):
            for request in requests:
                assert engine.connector.get_num_new_matched_tokens(request, 0) == (None, False)
    assert len(set(asked)) == len(requests)
    assert len(asked) < 50 * len(requests) / 2
    engine.run()
    assert not engine.connector._scheduler._pending


@pytest.mark.parametrize("mla", [True, False])
def test_tensor_parallel_ranks(make_engine, client, mla):
    num_shards = 1 if mla else 2
    expected = expected_answer(PROMPT, 4, num_ranks=num_shards)
    assert make_engine(num_ranks=2, mla=mla).ask("a", PROMPT, 4) == expected
    assert client.stats()["l1"]["entries"] == num_shards * 7  # six chunks and a remainder
    engine = make_engine(num_ranks=2, mla=mla)
    assert engine.ask("b", PROMPT, 4) == expected
    assert engine.num_computed == 4
    assert not leases(client)


def test_mla_is_shared_with_engines_of_another_size(make_engine):
    make_engine(num_ranks=2, mla=True).ask("a", PROMPT)
    engine = make_engine(mla=True)
    assert engine.ask("b", PROMPT) == expected_answer(PROMPT, 1)
    assert engine.num_computed == 1


def test_a_load_that_fails_on_one_rank_only(make_engine, client, monkeypatch):
    expected = expected_answer(PROMPT, 4, num_ranks=2)
    make_engine(num_ranks=2).ask("a", PROMPT[:96])
    engine = make_engine(num_ranks=2, max_num_batched_tokens=400)
    payloads = client.payloads
    with monkeypatch.context() as patch:
        patch.setattr(
            client, "payloads", lambda *arguments: None if arguments[1] == 0 else payloads(*arguments)
        )
        assert engine.ask("b", PROMPT, 4) == expected
    other = make_engine(num_ranks=2)
    assert other.ask("c", PROMPT, 4) == expected
    assert other.num_computed == 4
    assert not leases(client)


@pytest.mark.parametrize(("overlap", "num_ranks"), [(True, 1), (False, 1), (False, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_a_random_schedule(make_engine, client, monkeypatch, seed, overlap, num_ranks):
    """Shared prefixes, multi-turn, aborts, preemption, failed loads, eviction, restarts: answers stay right."""
    chance = random.Random(f"{seed} {overlap} {num_ranks}")
    payloads = client.payloads
    monkeypatch.setattr(
        client, "payloads", lambda *arguments: None if chance.random() < 0.1 else payloads(*arguments)
    )
    stems = [[chance.randrange(50_000) for _ in range(200)] for _ in range(3)]
    conversations: list[list[int]] = []
    for life in range(3):
        engine = make_engine(
            num_blocks=chance.choice([24, 30, 60]),
            max_num_batched_tokens=chance.choice([20, 64, 300]),
            prefix_caching=chance.random() < 0.5,
            overlap=overlap,
            num_ranks=num_ranks,
            extra_config={
                "chunk_size": chance.choice([16, 32, 64]),
                "save_decode_cache": chance.random() < 0.5,
            },
        )
        open_requests = {}
        for number in range(25):
            stem = chance.choice(stems + conversations[-4:])
            prompt = stem[: chance.randrange(1, len(stem))] + [chance.randrange(50_000)] * chance.randrange(3)
            name = f"{life}.{number}"
            open_requests[name] = (prompt, engine.add(name, prompt[:260], chance.randrange(1, 30)))
            for _ in range(chance.randrange(4)):
                engine.step()
            if chance.random() < 0.1:
                engine.abort(chance.choice(list(open_requests)))
            if chance.random() < 0.1:
                client.clear()
        engine.run()
        for _, request in open_requests.values():
            prompt = list(request.prompt_token_ids)
            answer = list(request.output_token_ids)
            expected = expected_answer(prompt, len(answer), num_ranks=num_ranks)
            assert answer == expected, request.request_id
            conversations.append(prompt + answer)
        assert not leases(client)
