"""Every metric: its name, unit and labels.

All begin with ``kvstrata_``. Labels take few values, known in advance: tiers by their configured names,
reasons, operations, quotas by the names that an operator gave them. Never a model, a salt, a key or a client.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvstrata.__about__ import __version__
from kvstrata.types import MissReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of :meth:`Metrics.render`."""
L1 = "l1"
"""The value of the label ``tier`` for host memory."""
MOVES = ("store", "retrieve")
"""Device to L1, and back; the values of the label ``move``."""
EVICTION_REASONS = ("room", "budget", "quota")
"""Room for others, a budget that was lowered, the limit of their own salt; values of ``reason`` of evictions."""
OPERATIONS = ("contains", "read", "write", "delete", "clear")
"""What is done to a tier; the values of the label ``operation``."""
GATE_DECISIONS = ("load", "trial", "recompute")
"""The values of the label ``decision``."""
_PREFIX = "kvstrata_"
_LOOKUP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LOOKUP_METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "lookups_total": ("counter", (), "Look-ups that were answered."),
    "lookup_tokens_total": ("counter", (), "Prompt tokens that were looked up."),
    "lookup_seconds": (
        "histogram",
        (),
        "From the first question to the final answer, loading from tiers included.",
    ),
    "hit_tokens_total": ("counter", ("tier",), "Prompt tokens that were found, by the tier that had them."),
    "misses_total": (
        "counter",
        ("reason",),
        "Look-ups that found less than all, by why they ended where they did.",
    ),
    "miss_tokens_total": (
        "counter",
        ("reason",),
        "Prompt tokens that were not found, by the reason of their look-up.",
    ),
    "saved_prefill_seconds_total": (
        "counter",
        (),
        "Estimate of the prefill time that hits saved their engines.",
    ),
}
"""Kind, labels, text."""
_OPERATION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class QueuedTier(Protocol):
    """What the gauges want to know of a tier."""

    @property
    def name(self) -> str: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def state(self) -> str: ...


class HeldQuota(Protocol):
    """What the gauges want to know of a quota in one tier."""

    @property
    def name(self) -> str: ...
    @property
    def tier(self) -> str: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int | None: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def num_evicted(self) -> int: ...
    @property
    def num_refused(self) -> int: ...


@dataclass(frozen=True)
class Description:
    """One metric, for people."""

    name: str
    kind: str
    """"counter", "gauge" or "histogram"."""
    labels: tuple[str, ...]
    text: str


class Metrics:
    """The metrics of one core, in a registry of their own. Thread-safe.

    Attributes are the metrics themselves; methods are what the core reports, one call per event.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.descriptions: list[Description] = []
        """Every metric, in the order of the page about them."""
        self._num_evicted = dict.fromkeys(EVICTION_REASONS, 0)
        self._lookups = _LookupCounts()
        self._declare_lookups()
        self._declare_l1()
        self._declare_tiers()
        self._declare_quotas()
        self._gauge("build_info", "Always 1; the label says the version.", ["version"]).labels(
            __version__
        ).set(1)
        for move in MOVES:
            self.device_bytes_total.labels(move)
            self.device_seconds_total.labels(move)
        for why in EVICTION_REASONS:
            self.evictions_total.labels(why)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        self._note(name, "counter", labels, text)
        return Counter(_PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        self._note(name, "gauge", labels, text)
        return Gauge(_PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str] = (), *, buckets: Sequence[float]
    ) -> Histogram:
        self._note(name, "histogram", labels, text)
        return Histogram(_PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def _note(self, name: str, kind: str, labels: Iterable[str], text: str) -> None:
        self.descriptions.append(Description(_PREFIX + name, kind, tuple(labels), text))

    def _declare_lookups(self) -> None:
        for name, (kind, labels, text) in _LOOKUP_METRICS.items():
            self._note(name, kind, labels, text)
        self.registry.register(self._lookups)
        self.gated_total = self._counter(
            "gated_total", "Look-ups that recompute what a tier holds, because loading is slower.", ["tier"]
        )
        self.gate_decisions_total = self._counter(
            "gate_decisions_total",
            "What the gate said to loading from a tier: load, trial (to measure it) or recompute.",
            ["tier", "decision"],
        )
        self.gate_estimated_seconds_total = self._counter(
            "gate_estimated_load_seconds_total", "Estimates of the loads that were begun.", ["tier"]
        )
        self.gate_load_seconds_total = self._counter(
            "gate_load_seconds_total", "What those loads took; the same as the estimates, ideally.", ["tier"]
        )

    def _declare_l1(self) -> None:
        self.stored_tokens_total = self._counter("stored_tokens_total", "Tokens stored; once per shard.")
        self.stored_bytes_total = self._counter("stored_bytes_total", "Payload bytes stored.")
        self.stores_dropped = self._counter(
            "stores_dropped_total", "Payloads that were not stored because L1 had no room."
        )
        self.device_bytes_total = self._counter(
            "device_bytes_total", "Bytes that workers copied between their devices and L1.", ["move"]
        )
        self.device_seconds_total = self._counter(
            "device_seconds_total", "Seconds that those copies took, of all workers together.", ["move"]
        )
        self.evictions_total = self._counter(
            "evictions_total",
            "Entries of L1 evicted for room, because its budget was lowered, or for the limit of their own salt.",
            ["reason"],
        )
        self.l1_used_bytes = self._gauge("l1_used_bytes", "Bytes of L1 in use.")
        self.l1_capacity_bytes = self._gauge("l1_capacity_bytes", "Bytes of L1.")
        self.l1_entries = self._gauge("l1_entries", "Entries of L1.")
        self.l1_fragmentation_ratio = self._gauge(
            "l1_fragmentation_ratio", "Share of L1's free bytes that lie outside its largest hole."
        )
        self.pins = self._gauge("pins", "Pins of operators.")
        self.pinned_bytes = self._gauge("pinned_bytes", "Payload bytes that pins keep in L1.")
        self.stores_frozen = self._gauge("stores_frozen", "1 while an operator lets nothing be stored.")
        self.leases = self._gauge("leases", "Look-ups whose hit is held for their request.")
        self.reservations = self._gauge("reservations", "Slots that workers are filling.")
        self.sessions = self._gauge("sessions", "Clients.")

    def _declare_tiers(self) -> None:
        both = ["tier", "operation"]
        self.tier_operation_seconds = self._histogram(
            "tier_operation_seconds",
            "Operations on a tier that succeeded; a batch is one.",
            both,
            buckets=_OPERATION_BUCKETS,
        )
        self.tier_bytes_total = self._counter("tier_bytes_total", "Bytes moved by those operations.", both)
        self.tier_errors_total = self._counter("tier_errors_total", "Operations that failed.", ["tier"])
        self.write_drops_total = self._counter(
            "tier_write_drops_total", "Writes dropped: queue full, tier down, or failed.", ["tier"]
        )
        self.frame_misses_total = self._counter(
            "tier_frame_misses_total", "Entries asked of a tier and not delivered.", ["tier", "reason"]
        )
        self.breaker_open = self._gauge("tier_breaker_open", "1 while the tier is left alone.", ["tier"])
        self.bypassed = self._gauge("tier_bypassed", "1 while an operator has the tier left alone.", ["tier"])
        self.queue_bytes = self._gauge("tier_queue_bytes", "Bytes that wait to be written.", ["tier"])

    def _declare_quotas(self) -> None:
        both = ["quota", "tier"]
        self.quota_used_bytes = self._gauge("quota_used_bytes", "Bytes that a salt with a quota holds.", both)
        self.quota_reserved_bytes = self._gauge("quota_reserved_bytes", "Bytes that others leave it.", both)
        self.quota_limit_bytes = self._gauge(
            "quota_limit_bytes", "Bytes it never exceeds; +Inf without.", both
        )
        self.quota_evictions = self._gauge(
            "quota_evictions", "Its entries evicted for its limit, since the quota was set.", both
        )
        self.quota_refusals = self._gauge(
            "quota_refusals",
            "Its entries that its limit, or what is reserved for others, left no room for, since then.",
            both,
        )

    # What the core reports

    def looked_up(
        self, num_tokens: int, hit_tokens: Mapping[str, int], reason: MissReason | None, seconds: float
    ) -> None:
        """A look-up was answered. ``hit_tokens`` is by tier; there is a ``reason`` unless all were found."""
        self._lookups.add(num_tokens, hit_tokens, reason, seconds)

    def gated(self, tier: str) -> None:
        """The gate decided against loading from ``tier``."""
        self.gated_total.labels(tier).inc()

    def gate_decided(self, tier: str, decision: str) -> None:
        """The gate decided (one of :data:`GATE_DECISIONS`) about loading from ``tier``."""
        self.gate_decisions_total.labels(tier, decision).inc()

    def gate_loaded(self, tier: str, estimated_seconds: float, seconds: float) -> None:
        """A load that the gate had an estimate of has ended."""
        self.gate_estimated_seconds_total.labels(tier).inc(estimated_seconds)
        self.gate_load_seconds_total.labels(tier).inc(seconds)

    def prefill_saved(self, seconds: float) -> None:
        """A hit spared its engine so much prefill."""
        self._lookups.add_saved(seconds)

    def stored(self, num_tokens: int, payload_bytes: int) -> None:
        """Payloads of one shard became visible."""
        self.stored_tokens_total.inc(num_tokens)
        self.stored_bytes_total.inc(payload_bytes)

    def device_moved(self, num_bytes: int, seconds: float, *, is_store: bool) -> None:
        """A worker copied from its device to L1 (``is_store``), or back."""
        move = "store" if is_store else "retrieve"
        self.device_bytes_total.labels(move).inc(num_bytes)
        self.device_seconds_total.labels(move).inc(seconds)

    def tier_added(self, tier: str) -> None:
        """A tier is in use: all its series exist from now on, as zeros."""
        self._lookups.tier_added(tier)
        for operation in OPERATIONS:
            self.tier_operation_seconds.labels(tier, operation)
            self.tier_bytes_total.labels(tier, operation)
        for reason in MissReason:
            self.frame_misses_total.labels(tier, reason.value)
        for decision in GATE_DECISIONS:
            self.gate_decisions_total.labels(tier, decision)
        for metric in (
            self.gate_estimated_seconds_total,
            self.gate_load_seconds_total,
            self.gated_total,
            self.tier_errors_total,
            self.write_drops_total,
        ):
            metric.labels(tier)
        self.breaker_open.labels(tier)
        self.bypassed.labels(tier)
        self.queue_bytes.labels(tier)

    def tier_operation(self, tier: str, operation: str, num_bytes: int, seconds: float) -> None:
        """An operation (one of :data:`OPERATIONS`) succeeded."""
        self.tier_operation_seconds.labels(tier, operation).observe(seconds)
        self.tier_bytes_total.labels(tier, operation).inc(num_bytes)

    def tier_failed(self, tier: str) -> None:
        """An operation failed."""
        self.tier_errors_total.labels(tier).inc()

    def write_dropped(self, tier: str) -> None:
        """An entry will not be in ``tier``."""
        self.write_drops_total.labels(tier).inc()

    def frame_missed(self, tier: str, reason: MissReason) -> None:
        """``tier`` did not deliver an entry that it was asked for."""
        self.frame_misses_total.labels(tier, reason.value).inc()

    def breaker_changed(self, tier: str, *, is_open: bool) -> None:
        """``tier`` is left alone from now on, or used again."""
        self.breaker_open.labels(tier).set(is_open)

    def update_gauges(self, l1: Mapping[str, Any], num_sessions: int, tiers: Iterable[QueuedTier]) -> None:
        """What is counted elsewhere: the ``l1`` part of the core's figures, sessions, queues. One thread."""
        self.l1_used_bytes.set(l1["used_bytes"])
        self.l1_capacity_bytes.set(l1["budget_bytes"])
        self.l1_entries.set(l1["entries"])
        self.leases.set(l1["lookups"])
        self.reservations.set(l1["reservations"])
        evicted = {"budget": l1["budget_evictions"], "quota": l1["limit_evictions"]}
        evicted["room"] = l1["evictions"] - sum(evicted.values())
        for reason, count in evicted.items():
            self.evictions_total.labels(reason).inc(count - self._num_evicted[reason])
        self._num_evicted = evicted
        self.l1_fragmentation_ratio.set(l1["fragmentation"])
        self.sessions.set(num_sessions)
        for tier in tiers:
            self.queue_bytes.labels(tier.name).set(tier.queued_bytes)
            self.bypassed.labels(tier.name).set(tier.state == "bypassed")

    def update_quotas(self, quotas: Iterable[HeldQuota]) -> None:
        """The quotas that there are now, and what they hold."""
        gauges = (
            self.quota_used_bytes,
            self.quota_reserved_bytes,
            self.quota_limit_bytes,
            self.quota_evictions,
            self.quota_refusals,
        )
        for gauge in gauges:
            gauge.clear()
        for each in quotas:
            values = (
                each.used_bytes,
                each.reserved_bytes,
                math.inf if each.limit_bytes is None else each.limit_bytes,
                each.num_evicted,
                each.num_refused,
            )
            for gauge, value in zip(gauges, values, strict=True):
                gauge.labels(each.name, each.tier).set(value)

    # What readers get

    def totals(self) -> dict[str, Any]:
        """All counters by name, without prefix and suffix; those with labels as (nested) dicts by label."""
        totals: dict[str, Any] = {}
        for family in self.registry.collect():
            if family.type != "counter":
                continue
            name = family.name.removeprefix(_PREFIX)
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    value = int(sample.value) if sample.value.is_integer() else round(sample.value, 6)
                    _put(totals, [name, *sample.labels.values()], value)
        return totals

    def operation_buckets(self, tier: str, operation: str) -> tuple[list[tuple[float, float]], float]:
        """The histogram of an operation on a tier: (upper bound, number up to it), and the sum of all seconds."""
        buckets, seconds = [], 0.0
        for family in self.tier_operation_seconds.labels(tier, operation).collect():
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    buckets.append((float(sample.labels["le"]), sample.value))
                elif sample.name.endswith("_sum"):
                    seconds = sample.value
        return buckets, seconds

    def operation_bytes(self, tier: str, operation: str) -> int:
        """Bytes moved by an operation on a tier."""
        (family,) = self.tier_bytes_total.labels(tier, operation).collect()
        return int(next(sample.value for sample in family.samples if sample.name.endswith("_total")))

    def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class _LookupCounts(Collector):
    """What every look-up adds to. Thread-safe.

    Plain numbers, put into Prometheus' form when they are read: the library's own counters and histogram took seven
    times as long (23 and 35 us of a hit and of a miss on a busy machine, against 3 and 5).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_lookups = 0
        self._num_tokens = 0
        self._seconds = 0.0
        self._saved_seconds = 0.0
        self._by_bucket = [0] * (len(_LOOKUP_BUCKETS) + 1)
        self._hit_tokens = {L1: 0}
        self._misses = {reason.value: 0 for reason in MissReason}
        self._miss_tokens = dict(self._misses)

    def tier_added(self, tier: str) -> None:
        with self._lock:
            self._hit_tokens.setdefault(tier, 0)

    def add(
        self, num_tokens: int, hit_tokens: Mapping[str, int], reason: MissReason | None, seconds: float
    ) -> None:
        with self._lock:
            self._num_lookups += 1
            self._num_tokens += num_tokens
            self._seconds += seconds
            self._by_bucket[bisect.bisect_left(_LOOKUP_BUCKETS, seconds)] += 1
            for tier, count in hit_tokens.items():
                self._hit_tokens[tier] = self._hit_tokens.get(tier, 0) + count
            if reason is not None:
                self._misses[reason] += 1
                self._miss_tokens[reason] += max(0, num_tokens - sum(hit_tokens.values()))

    def add_saved(self, seconds: float) -> None:
        with self._lock:
            self._saved_seconds += seconds

    def collect(self) -> Iterator[Metric]:
        """For the registry: all of it at one moment."""
        with self._lock:
            counts: dict[str, float] = {
                "lookups_total": self._num_lookups,
                "lookup_tokens_total": self._num_tokens,
                "saved_prefill_seconds_total": self._saved_seconds,
            }
            by_label = {
                "hit_tokens_total": dict(self._hit_tokens),
                "misses_total": dict(self._misses),
                "miss_tokens_total": dict(self._miss_tokens),
            }
            seconds, by_bucket = self._seconds, list(self._by_bucket)
        for name, (_, labels, text) in _LOOKUP_METRICS.items():
            if name in counts:
                yield CounterMetricFamily(_PREFIX + name, text, value=float(counts[name]))
            elif name in by_label:
                family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
                for label, count in by_label[name].items():
                    family.add_metric([label], float(count))
                yield family
            else:
                bounds = map(floatToGoString, (*_LOOKUP_BUCKETS, math.inf))
                buckets = list(zip(bounds, itertools.accumulate(by_bucket), strict=True))
                yield HistogramMetricFamily(_PREFIX + name, text, buckets=buckets, sum_value=seconds)


def _put(tree: dict[str, Any], path: list[str], value: float) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
