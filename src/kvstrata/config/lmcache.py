"""What becomes of every key of LMCache's configuration (0.5.6): data for loading and documentation."""

from __future__ import annotations

from typing import Literal

import msgspec

Fate = Literal["same", "mapped", "not needed", "not supported"]


class LMCacheKey(msgspec.Struct, frozen=True):
    """One key of LMCache: what it becomes here."""

    fate: Fate
    note: str = ""
    """For ``mapped`` the key it becomes; otherwise a difference, or the reason."""


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
