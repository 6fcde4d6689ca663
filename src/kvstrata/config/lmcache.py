"""What becomes of LMCache's settings, of the options of its server and of its commands: data for loading settings,
for the drop-in's commands (compat/lmcache) and for documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

LMCACHE_VERSION = "0.5.6"
"""The version whose settings, options and names these are."""

Fate = Literal["same", "mapped", "not needed", "not supported"]
FATES: tuple[Fate, ...] = ("same", "mapped", "not needed", "not supported")


class LMCacheKey(msgspec.Struct, frozen=True):
    """One key, option or command of LMCache: what it becomes here."""

    fate: Fate
    note: str = ""
    """For ``mapped`` what it becomes; otherwise a difference, or the reason."""


Takes = Literal["one value", "values", "no value"]


class LMCacheOption(LMCacheKey, frozen=True):
    """One option of ``lmcache server``."""

    takes: Takes = "one value"
    harmless: str = ""
    """The value with which it asks for nothing that is missing here."""


_SAME: dict[str, str] = {
    "chunk_size": "",
    "local_cpu": "",
    "max_local_cpu_size": "",
    "local_disk": "one directory; for several use `tiers`",
    "max_local_disk_size": "the default is 10 here, 0 there",
    "remote_url": "",
    "remote_serde": "",
    "save_decode_cache": "",
    "save_unfull_chunk": "the default is true here, false there",
    "blocking_timeout_secs": "the default is 5 here, 10 there",
    "lookup_timeout_ms": "",
    "min_retrieve_tokens": "",
    "cache_policy": "",
}

_MAPPED: dict[str, str] = {
    "mp_host": "server_url",
    "mp_port": "server_url",
    "local_storage": "local_disk",
    "max_local_storage_size": "max_local_disk_size",
    "log_level": "log_level",
}

_NOT_NEEDED: dict[str, tuple[str, ...]] = {
    "keys are SHA-256 on every process and host": ("pre_caching_hash_algorithm", "mp.hash_algorithm"),
    "look-ups never block the scheduler": (
        "enable_async_loading",
        "enable_scheduler_bypass_lookup",
        "external_lookup_client",
        "lookup_server_worker_ids",
        "mp.nonblocking_lookup_status",
        "mp.eager_prefetch",
    ),
    "whole pages are copied, for all layers": ("use_layerwise", "use_gpu_connector_v3"),
    "a lease ends with its request or its owner": ("pin_timeout_sec", "pin_check_interval_sec"),
    "the pool is prefaulted in the background": (
        "reserve_local_cpu_size",
        "enable_lazy_memory_allocator",
        "lazy_memory_initial_ratio",
        "lazy_memory_expand_trigger_ratio",
        "lazy_memory_step_ratio",
        "lazy_memory_safe_size",
    ),
    "use `rpc_timeout_ms`": ("mp.mq_timeout",),
    "the client notices by itself": ("mp.heartbeat_interval",),
    "the transfer is chosen by what both sides can do": (
        "mp.mp_transfer_mode",
        "mp.isolated_ipc",
        "mp.use_vmm_api",
        "mp.transfer_intermediate_tensors",
        "mp_transfer_mode",
    ),
    "without a URL the connector starts its own server": (
        "mp.autostart",
        "mp.server_args",
        "mp.wait_timeout",
    ),
    "use `save_decode_cache`": ("mp.save_decode_cache",),
    "there is no telemetry and no banner": (
        "use_experimental",
        "track_usage",
        "usage_track_url",
        "usage_track_interval",
        "disable_banner",
        "request_telemetry_type",
        "request_telemetry_endpoint",
    ),
    "collection of Python garbage is left alone": ("py_enable_gc",),
    "the default; a name of an instance plays no part": ("lmcache_instance_id",),
}

_NOT_SUPPORTED: dict[str, tuple[str, ...]] = {
    "reuse of text that is no prefix": (
        "enable_blending",
        "blend_recompute_ratios",
        "blend_thresholds",
        "blend_check_layers",
        "blend_min_tokens",
        "blend_special_str",
    ),
    "transfer between instances other than through a shared tier": (
        "enable_p2p",
        "p2p_host",
        "p2p_init_ports",
        "p2p_lookup_ports",
        "transfer_channel",
    ),
    "disaggregated prefill": (
        "enable_pd",
        "pd_role",
        "pd_buffer_size",
        "pd_buffer_device",
        "pd_peer_host",
        "pd_peer_init_port",
        "pd_peer_alloc_port",
        "pd_peer_query_port",
        "pd_proxy_host",
        "pd_proxy_port",
        "pd_allocation_timeout_sec",
        "pd_shutdown_timeout_sec",
        "pd_condition_poll_interval_sec",
        "pd_max_prefill_len",
        "pd_backend_mode",
        "pd_skip_proxy_notification",
        "pd_bidirectional",
        "nixl_backends",
        "nixl_buffer_size",
        "nixl_buffer_device",
    ),
    "LMCache's controller": (
        "enable_controller",
        "controller_pull_url",
        "controller_reply_url",
        "lmcache_worker_ports",
        "lmcache_worker_ids",
        "lmcache_worker_heartbeat_delay_time",
        "lmcache_worker_heartbeat_time",
    ),
    "LMCache's coordinator": (
        "coordinator_url",
        "coordinator_advertise_ip",
        "coordinator_heartbeat_interval",
        "coordinator_event_reporting",
        "coordinator_event_flush_interval",
    ),
    "vLLM's own client of LMCache's server": ("use_upstream_mp",),
    "GPUDirect storage": ("gds_path", "gds_path_sharding", "gds_buffer_size", "use_gds", "gds_backend"),
    "the Maru backend": ("maru_path", "maru_pool_size"),
    "an API inside the engine (see `http_port`)": (
        "internal_api_server_enabled",
        "internal_api_server_host",
        "internal_api_server_port_start",
        "internal_api_server_include_index_list",
        "internal_api_server_socket_path_prefix",
        "run_script_api_enabled",
        "script_allowed_imports",
    ),
    "plug-ins are found by entry points": (
        "runtime_plugin_locations",
        "storage_plugins",
        "remote_storage_plugins",
    ),
    "options of backends stand in `tiers`": (
        "extra_config",
        "resp_host",
        "resp_port",
        "resp_username",
        "resp_password",
    ),
    "statistics are in the metrics": (
        "enable_chunk_statistics",
        "chunk_statistics_auto_start_statistics",
        "chunk_statistics_auto_exit_timeout_hours",
        "chunk_statistics_auto_exit_target_unique_chunks",
        "chunk_statistics_strategy",
    ),
    "hidden states are not cached": (
        "enable_hidden_state_cache",
        "max_hidden_state_cpu_size",
        "hidden_state_layers",
        "hidden_states_retrieve_mode",
    ),
    "all tiers are asked, in order": ("retrieve_locations", "store_location"),
    "settings are not fetched from the network": ("remote_config_url", "app_id"),
    "events": ("enable_kv_events",),
    "a per-request bound": ("priority_limit", "hit_miss_ratio"),
    "placement of the pool": ("numa_mode", "local_cpu_use_hugepages"),
    "a directory per device": ("local_disk_path_sharding",),
    "auditing of a backend": ("audit_actual_remote_url",),
    "several servers for one connector": ("mp.server_urls",),
    "offloading on demand": (
        "mp.lazy_offload",
        "mp.lazy_offload_policy",
        "mp.lazy_offload_threshold",
        "mp.lazy_offload_select_count",
    ),
    "a switch per request stands in `kv_transfer_params`": ("force_skip_save",),
}

SILENT = frozenset({"use_experimental", "track_usage", "disable_banner", "config_file"})
"""Keys that change nothing here and are not worth a word in the log."""


def _keys() -> dict[str, LMCacheKey]:
    keys = {key: LMCacheKey("same", note) for key, note in _SAME.items()}
    keys |= {key: LMCacheKey("mapped", target) for key, target in _MAPPED.items()}
    for reason, names in _NOT_NEEDED.items():
        keys |= {name: LMCacheKey("not needed", reason) for name in names}
    for reason, names in _NOT_SUPPORTED.items():
        keys |= {name: LMCacheKey("not supported", reason) for name in names}
    return keys


LMCACHE_KEYS: dict[str, LMCacheKey] = _keys()
"""By LMCache's name: ``LMCACHE_`` + upper case in the environment, as it is in the file, ``lmcache.`` + name
in ``kv_connector_extra_config`` (those that begin with ``mp.`` only there)."""


_OPTIONS_SAME: dict[str, str] = {
    "--l1-size-gb": "",
    "--chunk-size": "",
    "--eviction-policy": "LRU; there is no ARC, IsolatedLRU or noop",
    "--host": "",
    "--port": "",
    "--http-host": "reachable from elsewhere it wants `--http-token-file`",
    "--http-port": "",
}

_OPTIONS_MAPPED: dict[str, str] = {"--l2-adapter": "tiers", "--enable-tracing": "tracing"}

_OPTIONS_NOT_NEEDED: dict[str, tuple[str, ...]] = {
    "keys are SHA-256 on every process and host": ("--hash-algorithm",),
    "the default; a name of an instance plays no part": ("--instance-id",),
    "the transfer is chosen by what both sides can do": (
        "--supported-transfer-mode",
        "--isolated-ipc",
        "--shm-name",
    ),
    "one process decides, each engine's workers copy": (
        "--max-workers",
        "--max-gpu-workers",
        "--max-cpu-workers",
    ),
    "the connector stores only blocks of requests": ("--null-block-id",),
    "a lease ends with its request or its owner": (
        "--l1-write-ttl-seconds",
        "--l1-read-ttl-seconds",
        "--session-ttl-seconds",
        "--worker-reap-timeout-seconds",
        "--worker-registration-grace-seconds",
    ),
    "the pool is prefaulted in the background": ("--l1-use-lazy", "--l1-init-size-gb", "--l1-align-bytes"),
    "what is needed is evicted, when it is needed": ("--eviction-trigger-watermark", "--eviction-ratio"),
    "each tier has its bounds": (
        "--l2-prefetch-policy",
        "--l2-prefetch-max-in-flight",
        "--periodic-notifier-interval-ms",
    ),
    "metrics are always on, at the HTTP port": (
        "--prometheus-port",
        "--disable-observability",
        "--disable-metrics",
        "--disable-grpc-metrics",
        "--event-bus-queue-size",
        "--metrics-sample-rate",
    ),
    "use `log_level`": ("--disable-logging",),
    "see `kvstrata status --watch 10`": ("--enable-extra-logging", "--extra-logging-interval"),
}

_OPTIONS_NOT_SUPPORTED: dict[str, tuple[str, ...]] = {
    "gRPC; engines speak ZMQ": ("--transport", "--grpc-server-workers"),
    "reuse of text that is no prefix": (
        "--engine-type",
        "--enable-segmented-prefix",
        "--enable-dedup-content",
        "--enable-blend-reorder",
    ),
    "transfer between instances other than through a shared tier": (
        "--p2p-advertise-url",
        "--p2p-listen-url",
        "--p2p-lookup-timeout",
        "--p2p-load-timeout",
        "--p2p-transfer-engine",
    ),
    "LMCache's coordinator": (
        "--coordinator-url",
        "--coordinator-advertise-ip",
        "--coordinator-heartbeat-interval",
        "--coordinator-event-reporting",
        "--coordinator-event-flush-interval",
        "--coordinator-event-transport",
        "--coordinator-kafka-bootstrap-servers",
        "--coordinator-kafka-topic",
        "--coordinator-kafka-delivery-timeout",
        "--coordinator-blend-timeout",
        "--coordinator-blend-match-concurrency",
        "--coordinator-l2-event-reporting",
        "--coordinator-l2-event-flush-interval",
    ),
    "an L1 other than host memory": (
        "--l1-manager",
        "--l1-devdax-path",
        "--gds-l1-path",
        "--gds-l1-use-direct-io",
        "--gds-l1-backend",
    ),
    "placement of the pool": ("--l1-use-hugepages",),
    "use `write_policy` of a tier": ("--l2-store-policy",),
    "events": ("--kv-event-log-size",),
    "use the variable `OTEL_EXPORTER_OTLP_ENDPOINT`": ("--otlp-endpoint",),
    "records of operations": (
        "--trace-level",
        "--trace-output",
        "--lookup-hash-log-dir",
        "--lookup-hash-log-rotation-interval",
        "--lookup-hash-log-rotation-max-size",
        "--lookup-hash-log-max-files",
    ),
    "a watch on Python's garbage collector": (
        "--enable-gc-monitor",
        "--gc-monitor-min-pause-ms",
        "--gc-monitor-top-objects",
    ),
    "plug-ins are found by entry points": (
        "--runtime-plugin-locations",
        "--runtime-plugin-config",
        "--server-module",
    ),
    "scripts over HTTP": ("--script-allowed-imports", "--run-script-api-enabled"),
    "hybrid models": ("--separate-object-groups",),
    "optional parts of LMCache's server": ("--enable",),
}

_OPTION_TAKES: dict[Takes, tuple[str, ...]] = {
    "values": ("--runtime-plugin-locations", "--script-allowed-imports", "--enable"),
    "no value": (
        "--coordinator-event-reporting",
        "--coordinator-l2-event-reporting",
        "--disable-grpc-metrics",
        "--disable-logging",
        "--disable-metrics",
        "--disable-observability",
        "--enable-blend-reorder",
        "--enable-dedup-content",
        "--enable-extra-logging",
        "--enable-gc-monitor",
        "--enable-segmented-prefix",
        "--enable-tracing",
        "--gds-l1-use-direct-io",
        "--isolated-ipc",
        "--l1-use-hugepages",
        "--l1-use-lazy",
        "--run-script-api-enabled",
        "--separate-object-groups",
    ),
}


_HARMLESS = {"--engine-type": "default", "--l2-store-policy": "default", "--transport": "zmq"}


def _options() -> dict[str, LMCacheOption]:
    takes = {name: how for how, names in _OPTION_TAKES.items() for name in names}

    def option(name: str, fate: Fate, note: str) -> LMCacheOption:
        return LMCacheOption(fate, note, takes.get(name, "one value"), _HARMLESS.get(name, ""))

    options = {name: option(name, "same", note) for name, note in _OPTIONS_SAME.items()}
    options |= {name: option(name, "mapped", target) for name, target in _OPTIONS_MAPPED.items()}
    for reason, names in _OPTIONS_NOT_NEEDED.items():
        options |= {name: option(name, "not needed", reason) for name in names}
    for reason, names in _OPTIONS_NOT_SUPPORTED.items():
        options |= {name: option(name, "not supported", reason) for name in names}
    return options


LMCACHE_OPTIONS: dict[str, LMCacheOption] = _options()
"""The options of ``lmcache server``. Those that take no value have a ``--no-`` form too."""

LMCACHE_COMMANDS: dict[str, LMCacheKey] = {
    "lmcache server": LMCacheKey("mapped", "kvstrata server"),
    "lmcache ping kvcache": LMCacheKey("mapped", "kvstrata ping"),
    "lmcache ping engine": LMCacheKey("same", "asks the engine's `/health`"),
    "lmcache describe kvcache": LMCacheKey("mapped", "kvstrata status"),
    "lmcache describe engine": LMCacheKey("not supported", "use `lmcache ping engine`"),
    "lmcache query kvcache": LMCacheKey("mapped", "kvstrata tiers"),
    "lmcache query engine": LMCacheKey("same", "one request, with its times; no `--documents`"),
    "lmcache query coordinator": LMCacheKey("not supported", "there is no coordinator"),
    "lmcache kvcache clear": LMCacheKey("mapped", "kvstrata clear --tier l1 --yes"),
    "lmcache bench server": LMCacheKey("mapped", "kvstrata bench lookup"),
    "lmcache bench l2": LMCacheKey("mapped", "kvstrata bench tier"),
    "lmcache bench engine": LMCacheKey("mapped", "kvstrata bench ttft"),
    "lmcache coordinator": LMCacheKey(
        "not supported", "engines share what a tier holds, with nothing between"
    ),
    "lmcache quota set": LMCacheKey("mapped", "kvstrata quota set"),
    "lmcache quota get": LMCacheKey("mapped", "kvstrata quota get"),
    "lmcache quota list": LMCacheKey("mapped", "kvstrata quota list"),
    "lmcache quota delete": LMCacheKey("mapped", "kvstrata quota remove"),
    "lmcache trace": LMCacheKey("not supported", "see `kvstrata explain`"),
    "lmcache tool": LMCacheKey("not supported", "see `kvstrata bench --help`"),
    "lmcache mock": LMCacheKey("not supported", "see `make demo`"),
    "lmcache_server": LMCacheKey("mapped", "kvstrata remote"),
    "lmcache_experimental_server": LMCacheKey("mapped", "kvstrata remote"),
    "lmcache_controller": LMCacheKey("not supported", "see `kvstrata status`, `clear`, `pin` and `warm`"),
}
"""The commands that LMCache installs, those of older versions included."""


def without_effect(names: Iterable[str], table: Mapping[str, LMCacheKey]) -> str:
    """Those of ``names`` that are not supported, and those that are not needed, with the reasons; "" if none."""
    parts = []
    for fate in ("not supported", "not needed"):
        named = [
            f"{name} ({table[name].note})"
            for name in sorted(names)
            if table[name].fate == fate and name not in SILENT
        ]
        if named:
            parts.append(f"{fate}: {', '.join(named)}")
    return "; ".join(parts)
