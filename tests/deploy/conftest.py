"""Renders the chart with Helm's own engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "kvstrata"
NAMESPACE = "caches"


class Rendered:
    """What a release consists of."""

    def __init__(self, files: dict[str, str]) -> None:
        self.notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        manifests = [text for path, text in files.items() if path.endswith(".yaml")]
        self.objects: list[dict[str, Any]] = [
            each for text in manifests for each in yaml.safe_load_all(text) if each
        ]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """The one object of that kind and name."""
        return self.named(kind)[name]

    def named(self, kind: str) -> dict[str, dict[str, Any]]:
        """All objects of a kind, by name."""
        return {each["metadata"]["name"]: each for each in self.objects if each["kind"] == kind}


Render = Callable[[dict[str, Any]], Rendered]


@pytest.fixture(scope="session")
def render() -> Render:
    charts = pytest.importorskip("helm_python.chart", reason="needs the extra deploy")
    chart = charts.Chart.load(CHART)

    def render(values: dict[str, Any]) -> Rendered:
        return Rendered(chart.render(values=values, name="demo", namespace=NAMESPACE))

    return render
