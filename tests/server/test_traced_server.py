"""A traced server and its clients: one trace over the socket, over OTLP to a real receiver."""

from __future__ import annotations

from pathlib import Path

from kvstrata.client import LocalClient
from kvstrata.protocol import messages as m
from kvstrata.testing.api import serving
from kvstrata.testing.client import (
    CHUNK_SIZE,
    fill,
    prompt,
    small_settings,
    store,
    wait_lookup,
    written,
)
from kvstrata.testing.collector import Collector
from kvstrata.testing.waiting import wait_until

A = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaa-01"
ASKED = prompt(3 * CHUNK_SIZE, seed=1)


def test_the_clients_trace_goes_on_in_the_server(collector: Collector, tmp_path: Path) -> None:
    settings = small_settings(tracing=True, local_disk=str(tmp_path), gate="always")
    with serving(settings) as served:
        client, (namespace, pieces) = served.client, (ASKED.namespace, ASKED.pieces)
        reservation = client.reserve(namespace, 0, pieces, traceparents=[A] * len(pieces))
        fill(reservation)
        client.commit(reservation)
        wait_until(lambda: written(client, len(pieces)), "the tier has it")
        client.clear(tiers=False)
        hit = client.lookup("r", namespace, ASKED.prefix, traceparent=A)
        while hit.pending:
            hit = client.lookup("r", namespace, ASKED.prefix, traceparent=A)
        assert hit.num_tokens == len(ASKED)
        client.release("r")
    assert {span.trace_id for span in collector.spans} == {"a" * 32}
    assert {span.process for span in collector.spans} == {"server"}
    names = {span.name for span in collector.spans}
    assert names == {
        f"kvstrata.{name}"
        for name in ("lookup", "prefetch", "store", "tier.contains", "tier.read", "tier.write")
    }


def test_of_a_client_that_says_no_trace_look_ups_are_traces_of_their_own(collector: Collector) -> None:
    with serving(small_settings(tracing=True)) as served:
        for number in range(2):
            assert wait_lookup(served.client, f"r{number}", ASKED).num_tokens == 0
    first, second = collector.named("kvstrata.lookup")
    assert first.parent_id == second.parent_id == ""
    assert first.trace_id != second.trace_id


def test_a_server_that_does_not_trace_ignores_it(collector: Collector) -> None:
    with serving(small_settings()) as served:
        reservation = served.client.reserve(ASKED.namespace, 0, ASKED.pieces, traceparents=[A, A, A])
        fill(reservation)
        served.client.commit(reservation)
        assert served.client.lookup("r", ASKED.namespace, ASKED.prefix, traceparent=A).num_tokens == len(
            ASKED
        )
        served.client.release("r")
    assert collector.raw == []


def test_traceparents_that_do_not_match_the_pieces_are_refused(collector: Collector) -> None:
    with serving(small_settings(tracing=True)) as served:
        assert served.client.reserve(ASKED.namespace, 0, ASKED.pieces, traceparents=[A]).num_tokens == 0
        assert store(served.client, ASKED) == len(ASKED), "the session goes on"
        message = m.Lookup("r", ASKED.namespace.fingerprint, ASKED.prefix, traceparent="x" * 100_000)
        assert served.client._ask(message) is not None


def test_in_process_too(collector: Collector) -> None:
    with LocalClient(small_settings(tracing=True)) as client:
        store(client, ASKED)
        assert wait_lookup(client, "r", ASKED).num_tokens == len(ASKED)
    assert {span.name for span in collector.spans} == {"kvstrata.store", "kvstrata.lookup"}
    assert {span.process for span in collector.spans} == {"local"}
