import re
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstrata.metrics import OPERATIONS, Metrics
from kvstrata.types import MissReason


def samples(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def l1(**changed):
    figures = {
        "used_bytes": 0,
        "budget_bytes": 0,
        "entries": 0,
        "lookups": 0,
        "reservations": 0,
        "evictions": 0,
        "budget_evictions": 0,
        "limit_evictions": 0,
        "fragmentation": 0.0,
    }
    return figures | changed


def test_every_series_exists_before_the_first_event():
    metrics = Metrics()
    metrics.tier_added("disk")
    found = samples(metrics)
    assert found["kvstrata_lookups_total"] == 0
    for reason in MissReason:
        assert found[f"kvstrata_misses_total{{reason={reason}}}"] == 0
        assert found[f"kvstrata_tier_frame_misses_total{{reason={reason},tier=disk}}"] == 0
    for operation in OPERATIONS:
        assert found[f"kvstrata_tier_bytes_total{{operation={operation},tier=disk}}"] == 0
        assert found[f"kvstrata_tier_operation_seconds_count{{operation={operation},tier=disk}}"] == 0
    for name in ("hit_tokens_total", "tier_errors_total", "tier_write_drops_total", "tier_breaker_open"):
        assert found[f"kvstrata_{name}{{tier=disk}}"] == 0
    assert found["kvstrata_hit_tokens_total{tier=l1}"] == 0


def test_names_follow_the_conventions():
    metrics = Metrics()
    for family in metrics.registry.collect():
        assert re.fullmatch(r"kvstrata_[a-z0-9_]+", family.name)
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert (
                any(sample.name == f"{family.name}_total" for sample in family.samples) or not family.samples
            )


def test_instances_share_nothing():
    first, second = Metrics(), Metrics()
    first.looked_up(10, {"l1": 10}, None, 0.1)
    assert samples(first)["kvstrata_lookups_total"] == 1
    assert samples(second)["kvstrata_lookups_total"] == 0


def test_a_lookup_is_counted_by_tier_and_reason():
    metrics = Metrics()
    metrics.looked_up(1000, {"l1": 256, "redis": 512}, MissReason.EVICTED, 0.02)
    metrics.looked_up(100, {"l1": 256}, MissReason.GATED, 0.02)  # the last piece may be longer than asked for
    metrics.looked_up(10, {}, MissReason.ABSENT, 0.02)
    found = samples(metrics)
    assert found["kvstrata_lookups_total"] == found["kvstrata_lookup_seconds_count"] == 3
    assert found["kvstrata_lookup_tokens_total"] == 1110
    assert found["kvstrata_hit_tokens_total{tier=l1}"] == 512
    assert found["kvstrata_hit_tokens_total{tier=redis}"] == 512
    assert found["kvstrata_misses_total{reason=evicted}"] == 1
    assert found["kvstrata_miss_tokens_total{reason=evicted}"] == 232
    assert found["kvstrata_miss_tokens_total{reason=gated}"] == 0
    assert found["kvstrata_miss_tokens_total{reason=absent}"] == 10


def test_a_tier_is_counted():
    metrics = Metrics()
    metrics.tier_added("redis")
    metrics.tier_operation("redis", "read", 4096, 0.01)
    metrics.tier_operation("redis", "read", 4096, 0.02)
    metrics.tier_failed("redis")
    metrics.write_dropped("redis")
    metrics.frame_missed("redis", MissReason.CORRUPT)
    metrics.breaker_changed("redis", is_open=True)
    metrics.gated("redis")
    found = samples(metrics)
    assert found["kvstrata_tier_bytes_total{operation=read,tier=redis}"] == 8192
    assert found["kvstrata_tier_operation_seconds_count{operation=read,tier=redis}"] == 2
    assert found["kvstrata_tier_operation_seconds_sum{operation=read,tier=redis}"] == pytest.approx(0.03)
    assert found["kvstrata_tier_errors_total{tier=redis}"] == 1
    assert found["kvstrata_tier_write_drops_total{tier=redis}"] == 1
    assert found["kvstrata_tier_frame_misses_total{reason=corrupt,tier=redis}"] == 1
    assert found["kvstrata_tier_breaker_open{tier=redis}"] == 1
    assert found["kvstrata_gated_total{tier=redis}"] == 1
    metrics.breaker_changed("redis", is_open=False)
    assert samples(metrics)["kvstrata_tier_breaker_open{tier=redis}"] == 0


def test_gauges_show_the_last_state_and_evictions_add_up():
    metrics = Metrics()
    tier = SimpleNamespace(name="disk", queued_bytes=77, state="bypassed")
    metrics.update_gauges(l1(used_bytes=5, budget_bytes=9, entries=2, lookups=1, evictions=3), 4, [tier])
    metrics.update_gauges(
        l1(
            used_bytes=6,
            budget_bytes=9,
            entries=3,
            reservations=2,
            evictions=10,
            budget_evictions=2,
            limit_evictions=3,
            fragmentation=0.25,
        ),
        5,
        [tier],
    )
    found = samples(metrics)
    assert found["kvstrata_l1_used_bytes"] == 6
    assert found["kvstrata_l1_capacity_bytes"] == 9
    assert found["kvstrata_l1_entries"] == 3
    assert found["kvstrata_leases"] == 0
    assert found["kvstrata_reservations"] == 2
    assert found["kvstrata_sessions"] == 5
    assert found["kvstrata_evictions_total{reason=room}"] == 5
    assert found["kvstrata_evictions_total{reason=quota}"] == 3
    assert found["kvstrata_evictions_total{reason=budget}"] == 2
    assert found["kvstrata_l1_fragmentation_ratio"] == 0.25
    assert found["kvstrata_tier_bypassed{tier=disk}"] == 1
    assert found["kvstrata_tier_queue_bytes{tier=disk}"] == 77


def test_totals_are_plain_numbers():
    metrics = Metrics()
    metrics.tier_added("disk")
    metrics.stored(256, 1 << 20)
    metrics.looked_up(300, {"l1": 256}, MissReason.ABSENT, 0.001)
    metrics.tier_operation("disk", "write", 4096, 0.5)
    totals = metrics.totals()
    assert totals["stored_tokens"] == 256
    assert totals["stored_bytes"] == 1 << 20
    assert totals["hit_tokens"] == {"l1": 256, "disk": 0}
    assert totals["misses"]["absent"] == 1
    assert totals["tier_bytes"]["disk"]["write"] == 4096
    assert totals["stores_dropped"] == 0
