"""Traces of requests, by OpenTelemetry. Off unless the setting ``tracing`` is on.

While it is off nothing of OpenTelemetry is imported, and whoever could begin a span has ``None`` in place of a
:class:`Tracer`: a look at that is all it costs. A request's spans in several processes are one trace, because each
process hands a **traceparent** (https://www.w3.org/TR/trace-context/) on to the next.

What is exported and where is said by the standard ``OTEL_*`` variables. Spans carry ids, names, counts and times;
never tokens, hashes, keys or salts.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from kvstrata.__about__ import __version__
from kvstrata.errors import ConfigError
from kvstrata.plugins import library

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
"""How long the end of a process waits for its last spans to be sent."""

Kind = Literal["internal", "client", "server"]
Attributes = Mapping[str, str | int | float | bool]

_EXTRA = "tracing"
_GRPC_PORT = 4317
_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}


class Tracer:
    """Begins spans, and sends those that have ended. Thread-safe.

    It has a provider of its own, so that the process it lives in (vLLM's, say) keeps its tracing as it is.
    """

    def __init__(self, process: str, exporter: Any) -> None:
        """Start the thread that sends.

        Args:
            process: which of our processes this is, for the resource attribute ``kvstrata.process``.
            exporter: an OpenTelemetry ``SpanExporter``.

        Raises:
            PluginError: the SDK is not installed.
        """
        sdk = library("opentelemetry.sdk.trace", _EXTRA)
        export = library("opentelemetry.sdk.trace.export", _EXTRA)
        resource = library("opentelemetry.sdk.resources", _EXTRA).Resource.create(_resource(process))
        self._api = _Api()
        self._provider = sdk.TracerProvider(resource=resource, id_generator=_Ids(), shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvstrata", __version__)

    def begin(
        self,
        name: str,
        attributes: Attributes,
        *,
        parent: str | Mapping[str, str] | None = None,
        kind: Kind = "internal",
    ) -> Span:
        """A span from now on; of a trace of its own unless ``parent`` (a traceparent, or the headers that a request
        came with) says another. One that is malformed counts as none."""
        headers = {"traceparent": parent} if isinstance(parent, str) else parent or {}
        return Span(self._api, self._tracer, name, self._api.extract(headers), attributes, kind)

    def close(self, timeout_seconds: float = FLUSH_SECONDS) -> None:
        """Send what has ended, within about ``timeout_seconds``; what cannot be sent by then is lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="kvstrata-spans", daemon=True)
        flush.start()
        flush.join(timeout_seconds)


class Span:
    """A span under way. Thread-safe; it may end on another thread than it was begun on, before its children do."""

    __slots__ = ("_api", "_context", "_ended", "_span", "_tracer")

    def __init__(
        self, api: _Api, tracer: Any, name: str, parent: Any, attributes: Attributes, kind: Kind
    ) -> None:
        self._api = api
        self._tracer = tracer
        self._span = tracer.start_span(name, context=parent, kind=api.kinds[kind], attributes=attributes)
        self._context = api.below(self._span)
        self._ended = False

    @property
    def traceparent(self) -> str:
        """What another process has to know to add to this trace, below this span."""
        about = self._span.get_span_context()
        return f"00-{about.trace_id:032x}-{about.span_id:016x}-{about.trace_flags:02x}"

    def begin(self, name: str, attributes: Attributes, *, kind: Kind = "internal") -> Span:
        """A span below this one, from now on."""
        return Span(self._api, self._tracer, name, self._context, attributes, kind)

    def record(
        self, name: str, seconds: float, attributes: Attributes, *, kind: Kind = "internal", error: str = ""
    ) -> None:
        """A span below this one that has taken so long and ends now; with ``error``, it failed."""
        if not self._span.get_span_context().trace_flags.sampled:
            return
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=self._context,
            kind=self._api.kinds[kind],
            attributes=attributes,
            start_time=end - int(seconds * 1e9),
        )
        if error:
            span.set_status(self._api.failed(error))
        span.end(end)

    def event(self, name: str, attributes: Attributes) -> None:
        """Something happened at this moment."""
        self._span.add_event(name, attributes)

    def link(self, other: Span) -> None:
        """It has to do with ``other``, which may be of another trace."""
        self._span.add_link(other._span.get_span_context())

    def end(self, attributes: Attributes | None = None, *, error: str = "") -> None:
        """It ends now; with ``error``, it failed. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        if attributes:
            self._span.set_attributes(attributes)
        if error:
            self._span.set_status(self._api.failed(error))
        self._span.end()


class _Ids:
    """An ``IdGenerator``. The SDK's own uses :mod:`random`, which vLLM seeds in all of its workers with the same
    number: their spans would have the same ids."""

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8), "little") or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(os.urandom(16), "little") or 1

    def is_trace_id_random(self) -> bool:
        return True


class _Api:
    """What is used of OpenTelemetry's API, looked up once."""

    def __init__(self) -> None:
        trace = library("opentelemetry.trace", _EXTRA)
        propagation = library("opentelemetry.trace.propagation.tracecontext", _EXTRA)
        self.kinds = {
            "internal": trace.SpanKind.INTERNAL,
            "client": trace.SpanKind.CLIENT,
            "server": trace.SpanKind.SERVER,
        }
        self._trace = trace
        # Never the current context of the thread: that is of the process that we live in.
        self._empty = library("opentelemetry.context", _EXTRA).Context()
        self._propagator = propagation.TraceContextTextMapPropagator()

    def failed(self, text: str) -> Any:
        return self._trace.Status(self._trace.StatusCode.ERROR, text)

    def below(self, span: Any) -> Any:
        """The context of what ``span`` is the parent of."""
        return self._trace.set_span_in_context(span, self._empty)

    def extract(self, headers: Mapping[str, str]) -> Any:
        """The context that W3C headers say."""
        return self._propagator.extract(headers, context=self._empty)


def open_tracer(process: str, *, enabled: bool) -> Tracer | None:
    """The tracer of this process; None unless ``enabled``.

    Raises:
        PluginError: the extra is not installed.
        ConfigError: a variable ``OTEL_*`` names what there is not.
    """
    return Tracer(process, _exporter()) if enabled else None


def _exporter() -> Any:
    """The OTLP exporter that the environment asks for. Everything else about it the SDK reads itself."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if os.environ.get(name)), "")
    protocol = os.environ[name].strip().lower() if name else _usual_protocol()
    if protocol not in _EXPORTERS:
        raise ConfigError(f"{name} = {protocol!r} is not allowed: expected {', '.join(_EXPORTERS)}")
    return library(_EXPORTERS[protocol], _EXTRA).OTLPSpanExporter()


def _usual_protocol() -> str:
    """OTLP over HTTP as the specification wants, but gRPC where the endpoint has the port of that."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = next((value for name in names if (value := os.environ.get(name))), "")
    try:
        is_grpc = urlsplit(endpoint).port == _GRPC_PORT
    except ValueError:
        is_grpc = False
    return "grpc" if is_grpc else "http/protobuf"


def _resource(process: str) -> dict[str, str]:
    """What all spans of this process say. A service's name in the environment wins over ours."""
    said = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return {"kvstrata.process": process} | ({} if said else {"service.name": "kvstrata"})
