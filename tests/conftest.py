"""Every test is checked for what it leaves behind."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from kvstrata.testing.collector import Collector

pytest_plugins = ["kvstrata.testing.leaks"]

# The machine decides how long an example takes; no test asserts on time.
settings.register_profile("kvstrata", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstrata")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Receives the spans of this process, and of those it starts."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector
