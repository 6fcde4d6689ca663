"""A collector of OpenTelemetry's spans: what arrives over OTLP/HTTP, as tests want to read it."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

_KINDS = ("unspecified", "internal", "server", "client")


class CollectedSpan(msgspec.Struct, frozen=True):
    """One span as it was sent."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for the root of a trace."""
    attributes: dict[str, Any]
    process: str
    """The resource attribute ``kvstrata.process``."""
    service: str
    links: tuple[str, ...]
    """Span ids."""
    events: tuple[tuple[str, dict[str, Any]], ...]
    error: str
    start_ns: int
    end_ns: int


class Collector:
    """Listens on a free port of 127.0.0.1. A context manager."""

    def __init__(self) -> None:
        self.spans: list[CollectedSpan] = []
        """In the order of their arrival."""
        self.raw: list[bytes] = []
        """The requests' bodies."""
        collector = self

        class _Request(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Request)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="kvstrata-collector", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """For ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> None:
        """One export request."""
        self.raw.append(body)
        request = ExportTraceServiceRequest.FromString(body)
        for resource_spans in request.resource_spans:
            resource = _attributes(resource_spans.resource.attributes)
            for scope in resource_spans.scope_spans:
                self.spans += [_span(span, resource) for span in scope.spans]

    def named(self, name: str) -> list[CollectedSpan]:
        """The spans of that name."""
        return [span for span in self.spans if span.name == name]

    def close(self) -> None:
        """Stop to listen."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _span(span: Any, resource: dict[str, Any]) -> CollectedSpan:
    return CollectedSpan(
        name=span.name,
        kind=_KINDS[span.kind],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        process=resource.get("kvstrata.process", ""),
        service=resource.get("service.name", ""),
        links=tuple(link.span_id.hex() for link in span.links),
        events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
        error=span.status.message,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
