"""Recording rules, alerts and the dashboard: every expression is valid, and of metrics that a server shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvstrata.cli.metrics import reference_text
from kvstrata.testing.api import serving
from kvstrata.testing.client import look, prompt, small_settings, store

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy" / "prometheus").glob("*.yaml"))
DASHBOARD = ROOT / "deploy" / "grafana" / "kvstrata.json"
OF_PROMETHEUS = {"up"}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NOT_METRICS = re.compile(
    r"""("[^"]*")|(\{[^}]*\})|(\[[^]]*\])|(\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\))""",
    re.X,
)
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
_LABEL = re.compile(r"([a-zA-Z_]+)\s*(=~|!~|=|!=)")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"}
PROMTOOL = shutil.which("promtool")


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads: names that are no function, keyword or label."""
    bare = _NOT_METRICS.sub(" ", expression)
    return {
        match[0]
        for match in _NAME.finditer(bare)
        if match[0] not in _WORDS and not re.match(r"\s*\(", bare[match.end() :])
    }


def rules() -> Iterator[tuple[str, str]]:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                yield rule.get("record") or rule["alert"], rule["expr"]


def panels() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def plain(expression: str) -> str:
    """A dashboard's expression with its variables filled in."""
    filled = expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*")
    assert "$" not in filled
    return filled


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series of a server with traffic: its name, and its labels."""
    directory = tmp_path_factory.mktemp("scrape")
    with serving(small_settings(local_disk=str(directory / "kv"), runtime_dir=str(directory))) as served:
        store(served.client, prompt(200, 1))
        look(served.client, "r", prompt(300, 1))
        text = served.api.ask("GET", "/metrics").body.decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_names_are_found_in_expressions() -> None:
    expression = (
        'sum by (a, b) (rate(x_total{tier="y_z"}[5m])) / on (c) group_left (d) w{e=~"f"} > bool 0.2 and v'
    )
    assert metric_names(expression) == {"x_total", "w", "v"}


@pytest.mark.parametrize(("title", "expression"), [*rules(), *panels()])
def test_every_expression_is_of_metrics_that_a_server_shows(
    title: str, expression: str, scraped: dict[str, set[str]]
) -> None:
    names = metric_names(expression) - OF_PROMETHEUS
    assert names or "up" in expression
    for name in names:
        assert name in scraped, f"{title}: there is no {name}"
    for name, selector in _SELECTOR.findall(expression):
        for label, _ in _LABEL.findall(selector):
            known = scraped.get(name, set()) | {"job", "instance"}
            assert label in known, f"{title}: {name} has no label {label}"


def test_the_names_of_lmcache_are_recorded() -> None:
    recorded = {name for name, _ in rules()}
    assert {
        "lmcache_cache_hit_rate",
        "lmcache_gpu_to_cpu_transfer_bytes",
        "lmcache_redis_latency_ms",
    } <= recorded


def test_alerts_say_what_to_do() -> None:
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    assert set(rule["annotations"]) == {"summary", "description"}
                    assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"


def test_the_reference_of_metrics_is_current() -> None:
    """Otherwise: kvstrata metrics docs > docs/metrics.md."""
    assert (ROOT / "docs" / "metrics.md").read_text() == reference_text()


def test_every_metric_is_in_the_reference(scraped: dict[str, set[str]]) -> None:
    text = reference_text()
    for name in scraped:
        if name.endswith("_created"):  # when a counter began, which the library adds
            continue
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        assert f"`{name}`" in text or f"`{family}`" in text


def run_promtool(*arguments: str) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_rules(expressions: list[tuple[str, str]]) -> dict[str, Any]:
    listed = [{"record": f"r:{i}", "expr": plain(expr)} for i, (_, expr) in enumerate(expressions)]
    return {"groups": [{"name": "all", "rules": listed}]}


@pytest.mark.system
@pytest.mark.skipif(PROMTOOL is None, reason="wants promtool (Debian: prometheus)")
def test_promtool_accepts_rules_and_dashboard(tmp_path: Path) -> None:
    for file in RULES:
        assert "SUCCESS" in run_promtool("check", "rules", str(file))
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump(as_rules(list(panels()))))
    assert "SUCCESS" in run_promtool("check", "rules", str(tmp_path / "dashboard.yaml"))


@pytest.mark.system
@pytest.mark.skipif(PROMTOOL is None, reason="wants promtool (Debian: prometheus)")
def test_recording_rules_and_alerts_evaluate_to_what_they_should(tmp_path: Path) -> None:
    at = 'instance="a", job="kvstrata"'
    latency = "kvstrata_tier_operation_seconds"
    series = {
        f'kvstrata_hit_tokens_total{{{at}, tier="l1"}}': "0+600x20",
        f'kvstrata_hit_tokens_total{{{at}, tier="redis"}}': "0+150x20",
        f"kvstrata_lookup_tokens_total{{{at}}}": "0+1000x20",
        f'kvstrata_device_bytes_total{{{at}, move="store"}}': "0+7x20",
        f'kvstrata_device_bytes_total{{{at}, move="retrieve"}}': "0+9x20",
        f'{latency}_sum{{{at}, tier="redis", operation="read"}}': "0+0.3x20",
        f'{latency}_count{{{at}, tier="redis", operation="read"}}': "0+60x20",
        f'{latency}_sum{{{at}, tier="disk", operation="read"}}': "0+9x20",
        f'{latency}_count{{{at}, tier="disk", operation="read"}}': "0+9x20",
        f'kvstrata_tier_breaker_open{{{at}, tier="redis"}}': "1x20",
        f'kvstrata_tier_breaker_open{{{at}, tier="disk"}}': "0x20",
    }
    expected = {
        "lmcache_cache_hit_rate": 0.75,
        "lmcache_gpu_to_cpu_transfer_bytes": 7 * 10,
        "lmcache_redis_latency_ms": 5.0,
    }
    checks = [
        {
            "expr": f"round({name}, 0.0001)",
            "eval_time": "10m",
            "exp_samples": [{"labels": f"{{{at}}}", "value": value}],
        }
        for name, value in expected.items()
    ]
    alert = {
        "alertname": "KVStrataTierDown",
        "eval_time": "10m",
        "exp_alerts": [
            {
                "exp_labels": {"instance": "a", "job": "kvstrata", "tier": "redis", "severity": "warning"},
                "exp_annotations": {
                    "summary": "Tier redis of a is down",
                    "description": "It is probed in the background. "
                    "`kvstrata tiers` and `kvstrata doctor` say more.",
                },
            }
        ],
    }
    test = {
        "rule_files": [str(file) for file in RULES],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": checks,
                "alert_rule_test": [alert],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    assert "SUCCESS" in run_promtool("test", "rules", str(tmp_path / "test.yaml"))
