"""The settings tree: every key with its type, default, unit, bounds and meaning. The only list of them."""

from __future__ import annotations

import os
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvstrata.config.secrets import mask

GIB = 2**30


def _meta(description: str, unit: str = "", **bounds: Any) -> Meta:
    return Meta(description=description, extra={"unit": unit}, **bounds)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of kvstrata, as one flat, immutable value.

    Made by :func:`kvstrata.config.load_settings`, which checks types and bounds; a direct call of the class
    does not. ``repr`` masks secrets; ``msgspec.json.encode`` does not (it is how a child process gets them).
    """

    chunk_size: Annotated[
        int,
        _meta(
            "Tokens per stored chunk. Rounded up to a multiple of the inference engine's block size.",
            "tokens",
            ge=1,
            le=2**20,
        ),
    ] = 256
    save_unfull_chunk: Annotated[
        bool, _meta("Store the end of a prompt that does not fill a chunk, so that an exact repeat hits it.")
    ] = True
    save_decode_cache: Annotated[bool, _meta("Store the KV of generated tokens too, chunk by chunk.")] = False
    min_retrieve_tokens: Annotated[
        int, _meta("A hit of fewer tokens is not used: they are recomputed.", "tokens", ge=0)
    ] = 0
    gate: Annotated[
        str,
        _meta(
            "`auto`: recompute what is measured to load slower than it is recomputed. `always`: load all that "
            "tiers hold. `never`: load nothing from tiers. `true` is `auto`, `false` is `always`."
        ),
    ] = "auto"
    read_policy: Annotated[
        str,
        _meta(
            "Which tier an entry is read from that several hold: the `first` in order, or the one that is "
            "measured `fastest` (the first while they are not measured)."
        ),
    ] = "first"
    lookup_timeout_ms: Annotated[
        int,
        _meta("How long a look-up may wait for lower tiers; then what has arrived counts.", "ms", ge=0),
    ] = 3000

    local_cpu: Annotated[
        bool,
        _meta(
            "Keep chunks in host memory (L1). When false, host memory is only passed through "
            "on the way to and from the other tiers."
        ),
    ] = True
    max_local_cpu_size: Annotated[
        float, _meta("Size of the L1 pool. It holds what passes through, too.", "GiB", gt=0, le=2**20)
    ] = 5.0
    cache_policy: Annotated[
        str, _meta("Which L1 entry is evicted first: the name of a policy plug-in, in any case.")
    ] = "LRU"
    shm_dir: (
        Annotated[
            str,
            _meta(
                "Directory for the shared pool's file, which is unlinked at once. "
                "None: anonymous shared memory, which needs no directory."
            ),
        ]
        | None
    ) = None

    local_disk: (
        Annotated[str, _meta("Directory of the disk tier, as a path or a file:// URL. None: no such tier.")]
        | None
    ) = None
    max_local_disk_size: Annotated[
        float,
        _meta("Budget of `local_disk`; above it entries are evicted.", "GiB", ge=0, le=2**30),
    ] = 10.0
    remote_url: (
        Annotated[str, _meta("URL of a tier that several hosts may share. None: no such tier.")] | None
    ) = None
    remote_serde: Annotated[
        str,
        _meta(
            "Codec of `remote_url`, as docs/codecs.md lists them: `naive` (bytes as they are), `floats`, `zstd:3`, "
            "`floats+aesgcm` ..."
        ),
    ] = "naive"
    encryption_key_file: (
        Annotated[
            str,
            _meta(
                "Keys of the codec `aesgcm`: 64 hexadecimal digits a line, the first for writing, all for reading."
            ),
        ]
        | None
    ) = None
    require_encryption: Annotated[
        bool,
        _meta("Entries that are not encrypted are misses, and every tier's codec has to end with `aesgcm`."),
    ] = False
    ttl_seconds: (
        Annotated[
            int,
            _meta(
                "Entries of `remote_url` expire this long after they were written. None: never.", "s", ge=1
            ),
        ]
        | None
    ) = None
    tiers: Annotated[
        tuple[dict[str, Any], ...],
        _meta(
            "Further tiers below those, in the order they are asked: a list of mappings with `kind` or "
            "`url`, and `name`, `codec`, `write_policy` (`all`; `second_use`: what is used twice; `none`: "
            "read-only) and its own options."
        ),
    ] = ()
    isolation: Annotated[
        str,
        _meta(
            "`salt`: nothing that belongs to a `cache_salt` is listed, or told to requests of another. `none`: "
            "operators see all of it. Hits are apart in either case."
        ),
    ] = "none"
    quotas: Annotated[
        tuple[dict[str, Any], ...],
        _meta(
            "What each `cache_salt` may hold: a list of mappings with `name`, `salt` (the name, unless given) and "
            "`tiers`: by tier `reserved_bytes` and `limit_bytes`. The name `default` is for every other salt."
        ),
    ] = ()
    blocking_timeout_secs: Annotated[
        float, _meta("Deadline of one operation of a tier, unless the tier sets its own.", "s", gt=0, le=3600)
    ] = 5.0
    num_workers: Annotated[
        int, _meta("Batches that a tier works on at once, unless the tier sets its own.", "", ge=1, le=64)
    ] = 4
    write_queue_bytes: Annotated[
        int,
        _meta(
            "Bound of the writes that wait for each tier; above it writes are dropped and counted.",
            "bytes",
            ge=0,
        ),
    ] = GIB
    breaker_failures: Annotated[
        int, _meta("Consecutive faults after which a tier is left alone.", "", ge=1)
    ] = 2
    breaker_reset_seconds: Annotated[
        float,
        _meta("How long a tier is left alone before it is probed, in the background.", "s", gt=0, le=3600),
    ] = 1.0

    runtime_dir: (
        Annotated[
            str,
            _meta(
                "Directory for the unix sockets of servers. "
                "None: below XDG_RUNTIME_DIR, or kvstrata-UID in the directory for temporary files."
            ),
        ]
        | None
    ) = None
    server_url: (
        Annotated[
            str,
            _meta(
                "Where the connector finds its server: tcp://HOST:PORT or ipc://PATH. "
                "None: embedded mode, the connector starts a private one."
            ),
        ]
        | None
    ) = None
    rpc_timeout_ms: Annotated[
        int, _meta("How long a client waits for an answer of the server.", "ms", ge=1, le=600_000)
    ] = 1000
    host: Annotated[str, _meta("Address that `kvstrata server` listens on.")] = "127.0.0.1"
    port: Annotated[
        int, _meta("TCP port that `kvstrata server` listens on; 0 takes a free one.", "", ge=0, le=65535)
    ] = 5555
    http_host: Annotated[str, _meta("Address of the HTTP API.")] = "127.0.0.1"
    http_port: (
        Annotated[
            int,
            _meta(
                "TCP port of the HTTP API; 0 takes a free one. None: no HTTP API, except that "
                "`kvstrata server` then takes 8080.",
                "",
                ge=0,
                le=65535,
            ),
        ]
        | None
    ) = None
    http_token_file: (
        Annotated[
            str,
            _meta(
                "File with the token that requests to the HTTP API must bear. Needed when `http_host` can be "
                "reached from elsewhere. None: no token."
            ),
        ]
        | None
    ) = None
    http_open_reads: Annotated[bool, _meta("Whether requests that only read (GET) go without the token.")] = (
        False
    )
    http_dashboard: Annotated[bool, _meta("Whether the HTTP API has a page for people at `/`.")] = True
    tracing: Annotated[
        bool,
        _meta(
            "Send OpenTelemetry spans of each request (look-up, prefetch, retrieve, store) to where the variables "
            "`OTEL_*` say. Wants the extra `tracing`."
        ),
    ] = False
    log_level: Annotated[str, _meta("DEBUG, INFO, WARNING, ERROR or CRITICAL.")] = "INFO"

    @property
    def max_local_cpu_bytes(self) -> int:
        """``max_local_cpu_size`` in bytes."""
        return int(self.max_local_cpu_size * GIB)

    @property
    def max_local_disk_bytes(self) -> int:
        """``max_local_disk_size`` in bytes."""
        return int(self.max_local_disk_size * GIB)

    @property
    def runtime_directory(self) -> Path:
        """Where the unix sockets of this user's servers are."""
        if self.runtime_dir is not None:
            return Path(self.runtime_dir)
        base = os.environ.get("XDG_RUNTIME_DIR")
        if base and os.access(base, os.W_OK):
            return Path(base) / "kvstrata"
        return Path(tempfile.gettempdir()) / f"kvstrata-{os.getuid()}"

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={mask(getattr(self, key), key)!r}" for key in self.__struct_fields__)
        return f"Settings({shown})"


ALIASES: dict[str, str] = {
    "eviction_policy": "cache_policy",
    "local_storage": "local_disk",
    "max_local_storage_size": "max_local_disk_size",
    "url": "server_url",
}
"""Other names of keys, accepted wherever the key is."""


@dataclass(frozen=True)
class Setting:
    """One key of the tree, as data for parsing, messages and documentation."""

    key: str
    annotation: Any
    """The annotated type, for ``msgspec.convert``."""
    base: type
    """bool, int, float, str or tuple."""
    optional: bool
    default: Any
    meta: Meta

    @property
    def unit(self) -> str:
        return str((self.meta.extra or {}).get("unit", ""))

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        words = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            str: "a string",
            tuple: "a list of mappings",
        }[self.base]
        unit = f" ({self.unit})" if self.unit else ""
        bounds = [
            f"{word} {bound:,}"
            for word, bound in (
                ("at least", self.meta.ge),
                ("more than", self.meta.gt),
                ("at most", self.meta.le),
            )
            if bound is not None
        ]
        bounded = f", {' and '.join(bounds)}" if bounds else ""
        return words + unit + bounded + (", or none" if self.optional else "")


def _setting(key: str, annotation: Any, default: Any) -> Setting:
    optional = type(None) in typing.get_args(annotation)
    inner, meta = typing.get_args(typing.get_args(annotation)[0] if optional else annotation)
    return Setting(key, annotation, typing.get_origin(inner) or inner, optional, default, meta)


def _all_settings() -> dict[str, Setting]:
    defaults = Settings()
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {key: _setting(key, hints[key], getattr(defaults, key)) for key in Settings.__struct_fields__}


SETTINGS: dict[str, Setting] = _all_settings()
"""Every key, in the order of the tree."""
