"""Spans on the real SDK, over OTLP/HTTP to a real receiver; and what happens without either."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

import pytest

from kvstrata.errors import ConfigError, PluginError
from kvstrata.testing.collector import Collector
from kvstrata.tracing import open_tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = PARENT[:-1] + "0"


def test_a_span_reaches_the_collector_below_its_parent(collector: Collector) -> None:
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    span = tracer.begin("outer", {"n": 1}, parent=PARENT, kind="server")
    inner = span.begin("inner", {})
    span.record("past", 0.5, {"b": True}, kind="client", error="it broke")
    span.event("happened", {"x": 0.5})
    span.link(inner)
    inner.end(error="wrong")
    span.end({"m": "two"})
    span.end({"m": "three"})
    span.record("late", 0.0, {})
    tracer.close()
    outer, inner_span, past, late = (collector.named(name)[0] for name in ("outer", "inner", "past", "late"))
    assert span.traceparent == f"00-{outer.trace_id}-{outer.span_id}-01"
    assert (outer.trace_id, outer.parent_id) == tuple(PARENT.split("-")[1:3])
    assert (outer.kind, outer.attributes, outer.process, outer.service) == (
        "server",
        {"n": 1, "m": "two"},
        "test",
        "kvstrata",
    )
    assert outer.links == (inner_span.span_id,)
    assert outer.events == (("happened", {"x": 0.5}),)
    assert {each.parent_id for each in (inner_span, past, late)} == {outer.span_id}
    assert (past.kind, past.error, inner_span.error, outer.error) == ("client", "it broke", "wrong", "")
    assert past.end_ns - past.start_ns == 500_000_000


@pytest.mark.parametrize(
    "parent", ["", "no", "00-zz-yy-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10**6]
)
def test_a_malformed_parent_is_none(collector: Collector, parent: str) -> None:
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    tracer.begin("alone", {}, parent=parent).end()
    tracer.close()
    assert [span.parent_id for span in collector.spans] == [""]


def test_what_is_not_sampled_is_not_sent_and_says_so_on(collector: Collector) -> None:
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    span = tracer.begin("outer", {}, parent=NOT_SAMPLED)
    span.record("past", 0.5, {})
    assert span.begin("inner", {}).traceparent.endswith("-00")
    span.end()
    tracer.close()
    assert collector.spans == []


def test_ids_do_not_repeat_where_random_is_seeded(collector: Collector) -> None:
    """vLLM seeds it in every process, with the same number."""
    state = random.getstate()
    try:
        for process in ("worker 0", "worker 1"):
            random.seed(0)
            tracer = open_tracer(process, enabled=True)
            assert tracer is not None
            tracer.begin("a", {}).end()
            tracer.close()
    finally:
        random.setstate(state)
    first, second = collector.spans
    assert first.trace_id != second.trace_id
    assert first.span_id != second.span_id


def test_headers_of_a_request_are_a_parent(collector: Collector) -> None:
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    tracer.begin("a", {}, parent={"traceparent": PARENT, "tracestate": "x=1"}).end()
    tracer.close()
    assert collector.spans[0].parent_id == PARENT.split("-")[2]


@pytest.mark.parametrize(
    ("variable", "value", "service"),
    [
        ("OTEL_SERVICE_NAME", "vllm-7", "vllm-7"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,zone=z", "mine"),
        ("OTEL_RESOURCE_ATTRIBUTES", "zone=z", "kvstrata"),
    ],
)
def test_the_environment_names_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, service: str
) -> None:
    monkeypatch.setenv(variable, value)
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    tracer.begin("a", {}).end()
    tracer.close()
    assert collector.spans[0].service == service


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(
        ConfigError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL = 'http/json' is not allowed: expected grpc"
    ):
        open_tracer("test", enabled=True)


def test_a_collector_that_hangs_holds_up_nobody() -> None:
    """Neither spans beyond what the queue holds nor the end of the process wait for it (it would for 40 s)."""
    program = (
        "from kvstrata.tracing import open_tracer\n"
        "tracer = open_tracer('test', enabled=True)\n"
        "for _ in range(5000):\n"
        "    tracer.begin('a', {}).end()\n"
        "tracer.close()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "40"}
        subprocess.run([sys.executable, "-c", program], check=True, timeout=30, env=env, capture_output=True)


def test_off_nothing_is_imported() -> None:
    program = (
        "import sys, kvstrata.client, kvstrata.server.server, kvstrata.tracing as t\n"
        "assert t.open_tracer('x', enabled=False) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_missing_library_names_the_extra() -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('opentelemetry'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from kvstrata.tracing import open_tracer\n"
        "try:\n"
        "    open_tracer('x', enabled=True)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.startswith(PluginError.__name__)
    assert "pip install 'kvstrata[tracing]'" in done.stdout
    assert len(done.stdout.splitlines()) == 1
