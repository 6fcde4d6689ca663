"""A request's spans in vLLM's processes and in the core: one trace, below the client's."""

from __future__ import annotations

from kvstrata.client import LocalClient
from kvstrata.config import Settings

PROMPT = [17 * n % 50_000 for n in range(1, 201)]
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
TRACED = {"tracing": True}


def end(engine):
    """As vLLM ends, which sends what has not been sent yet."""
    engine.connector.shutdown()
    for worker in engine.workers:
        worker.shutdown()


def below(collector, span):
    return {(each.name, each.process) for each in collector.spans if each.parent_id == span.span_id}


def test_a_request_is_one_trace_over_all_processes(collector, make_engine):
    client = LocalClient(Settings(max_local_cpu_size=0.02, tracing=True))
    engine = make_engine(extra_config=TRACED)
    for side in (engine.scheduler.connector._scheduler, *(worker._worker for worker in engine.workers)):
        side._client = client
    engine.ask("cold", PROMPT, 2, trace_headers=PARENT)
    engine.scheduler.reset_prefix_cache()
    engine.ask("warm", PROMPT, 2)
    end(engine)
    client.close()

    requests = {span.attributes["kvstrata.request.id"]: span for span in collector.named("kvstrata.request")}
    cold, warm = requests["cold"], requests["warm"]
    assert (cold.trace_id, cold.parent_id) == tuple(PARENT["traceparent"].split("-")[1:3])
    assert warm.parent_id == ""
    assert warm.trace_id != cold.trace_id
    assert {span.trace_id for span in collector.spans} == {cold.trace_id, warm.trace_id}
    assert below(collector, cold) == {
        ("kvstrata.lookup", "vllm-scheduler"),
        ("kvstrata.store", "vllm-worker-0"),
    }
    assert below(collector, warm) == {
        ("kvstrata.lookup", "vllm-scheduler"),
        ("kvstrata.retrieve", "vllm-worker-0"),
    }
    assert warm.attributes["kvstrata.tokens.hit"] == len(PROMPT)
    for span in collector.named("kvstrata.lookup"):
        if span.process == "vllm-scheduler":
            assert below(collector, span) == {("kvstrata.lookup", "local")}
            assert span.kind == "client"
    stores = [span for span in collector.named("kvstrata.store") if span.process == "vllm-worker-0"]
    assert stores
    for span in stores:
        assert below(collector, span) == {("kvstrata.store", "local")}
    assert sum(span.attributes["kvstrata.tokens"] for span in stores) == len(PROMPT)
    (retrieve,) = collector.named("kvstrata.retrieve")
    assert retrieve.attributes["kvstrata.tokens"] == len(PROMPT) - 1
    assert not any(span.error for span in collector.spans)


def test_a_load_that_fails_is_an_error(collector, make_engine, client, monkeypatch):
    make_engine().ask("a", PROMPT)
    engine = make_engine(extra_config=TRACED)
    monkeypatch.setattr(client, "payloads", lambda *_: None)
    engine.ask("b", PROMPT)
    end(engine)
    (retrieve,) = collector.named("kvstrata.retrieve")
    assert retrieve.error == "it could not be loaded"


def test_an_aborted_request_ends_its_spans(collector, make_engine):
    engine = make_engine(extra_config=TRACED, max_num_batched_tokens=50)
    engine.add("a", PROMPT, 2)
    engine.step()
    engine.abort("a")
    engine.run()
    end(engine)
    assert [span.attributes["kvstrata.request.id"] for span in collector.named("kvstrata.request")] == ["a"]


def test_off_no_tracer_is_made(make_engine, collector):
    engine = make_engine()
    engine.ask("a", PROMPT, trace_headers=PARENT)
    assert engine.connector._scheduler._tracer is None
    assert all(worker._worker._tracer is None for worker in engine.workers)
    assert collector.raw == []
