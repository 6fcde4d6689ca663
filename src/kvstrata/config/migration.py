"""The guide for those who come from LMCache, in Markdown, made from what becomes of its settings."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata.config.lmcache import (
    FATES,
    LMCACHE_COMMANDS,
    LMCACHE_KEYS,
    LMCACHE_OPTIONS,
    LMCACHE_VERSION,
    LMCacheKey,
)
from kvstrata.config.markdown import table

_HEAD = f"""\
# Moving from LMCache

<!-- Made by `kvstrata config migration`. Edit src/kvstrata/config/migration.py and lmcache.py instead. -->

Manifests, files, variables and commands that were written for LMCache stay as they are. What is compared with
here is LMCache {LMCACHE_VERSION}. Tests run the configurations of its guides with a real vLLM
(`tests/compat`).

## What to install

| you have | install |
|---|---|
| `LMCACHE_*` variables, `lmcache_config.yaml`, `LMCacheConnectorV1`, `LMCacheMPConnector` | `kvstrata` |
| the commands `lmcache ...`, `lmcache_server`, `lmcache_experimental_server` | and `kvstrata-lmcache` |
| programs that import `lmcache`; `VLLM_PLUGINS` without `kvstrata` | and `kvstrata-lmcache` |

Neither is published yet: in a clone of the repository `kvstrata` is `.` and `kvstrata-lmcache` is
`./compat/lmcache`. The latter and LMCache have the same files: `import lmcache`, the commands and
`kvstrata doctor` say so in one line when both are installed.

## Switch

1. See what becomes of the configuration: `kvstrata config check lmcache_config.yaml`, or with the variables
   set `kvstrata config show`. What has no effect is named; a value that is not possible is an error that says
   what is.
2. In vLLM's image, instead of LMCache: `pip uninstall lmcache`, `pip install '.[http]' ./compat/lmcache`.
   The same for the image of the server. Images built from `deploy/container` have both.
3. Start the servers and vLLM as before. The cache is empty at first: nothing that LMCache stored is read.

## Check

1. `kvstrata doctor --config lmcache_config.yaml`: are machine, configuration and remote fit, which package
   provides `lmcache`?
2. `lmcache ping kvcache --url http://HOST:8080` (or `kvstrata ping`), for a server.
3. Send a prompt twice. vLLM's log says of the first `Stored ... tokens`, of the second
   `Retrieved ... tokens`, and `Reqid: ..., Total tokens ..., KVStrata hit tokens: ..., need to load: ...` of
   both. A warning that begins with "settings of LMCache without effect here" names what was read and is not
   used.
4. `kvstrata keys count --tier redis://HOST:6379`, `kvstrata status`, and `/metrics` of the server and of
   vLLM.

## Go back

`pip uninstall kvstrata kvstrata-lmcache`, `pip install lmcache`, start again. Both can use one Redis
meanwhile: their keys differ, and each ignores what the other wrote.
`kvstrata keys delete vllm@ --tier redis://HOST:6379` removes ours; `allkeys-lru` or a TTL does it in time.

## What differs

- **A file wins over variables.** In LMCache {LMCACHE_VERSION} it is the other way round.
- **Wrong values are errors at start.** LMCache takes some for false or for the default, with a warning.
- **In-process mode has a process.** `LMCacheConnectorV1` starts a private cache server that ends with vLLM;
  L1 is its shared memory.
- **The ends of prompts are stored**, so a prompt of 50 tokens hits 49 with chunks of 256. A chunk size that
  is no multiple of vLLM's block size is rounded up, and the log says so.
- **The HTTP API wants a token** when it can be reached from elsewhere: `lmcache server --http-host 0.0.0.0`
  needs `--http-token-file FILE` (or `KVSTRATA_HTTP_TOKEN_FILE`). Probes need none: `/health`, `/healthcheck`,
  `/ready`. The other paths are [ours](operations.md).
- **Memory is bounded.** `lmcache_server` keeps 5 GiB (`--max-size-gb`), least recently used out first;
  LMCache's grows.
- **Quotas**: `default` is every salt without a quota of its own; LMCache's `_default` is requests without a
  salt.
- **Metrics have our names**; rules for Prometheus record some of LMCache's ([metrics](metrics.md),
  `deploy/prometheus`).
- **No telemetry.**

Not there at all: reuse of text that is no prefix, disaggregated prefill, transfer between instances other
than through a shared tier, the controller and the coordinator. Their settings are named in the log and change
nothing; their commands end with one line. Hybrid, Mamba and sliding-window models are served without cache.
"""

_SETTINGS = """\
## Settings

Of the file and `kv_connector_extra_config` (there after `lmcache.`), and as variables: `LMCACHE_` and the key
in capitals.
"""

_OPTIONS = """\
## Options of `lmcache server`

`kvstrata server`'s own options may be given as well. Options without effect are named in one line; an option
that neither has ends with one.
"""

_ADAPTERS = """\
`--l2-adapter` may be given again, and makes one tier each; another `type`, or a `serde`, is refused (give
`tiers` in a file):

| `type` | tier |
|---|---|
| `resp` | `redis://`, with `LMCACHE_RESP_*` where the JSON says nothing |
| `valkey` | `valkey://`, with `cluster_mode` `valkey-cluster://`, with `tls_enable` `valkeys://` |
| `fs`, `fs_native` | a shared directory of `max_capacity_gb`, which must be given |
"""

_COMMANDS = """\
## Commands

Each takes the options of the command that it becomes; LMCache's `--url`, `--format json`, `--output` and `-q`
work for those that ask a server.
"""

_IMPORTS = """\
## Imports

`lmcache.__version__`, the connectors in `lmcache.integration.vllm.lmcache_connector_v1` and
`lmcache_mp_connector`, what vLLM's own modules import (`vllm_v1_adapter` and others), and `ENGINE_NAME` with
`LMCacheEngineBuilder.destroy`, which programs call when they end. Everything else raises an ImportError that
says so in one line.
"""


def migration_text() -> str:
    """The whole page."""
    parts = [_HEAD, _SETTINGS, _fates("key", LMCACHE_KEYS), _OPTIONS, _fates("option", LMCACHE_OPTIONS)]
    return "\n".join([*parts, _ADAPTERS, _COMMANDS, _commands(), _IMPORTS])


def _fates(what: str, keys: Mapping[str, LMCacheKey]) -> str:
    def row(name: str) -> tuple[str, ...]:
        key = keys[name]
        return f"`{name}`", key.fate, f"`{key.note}`" if key.fate == "mapped" else key.note

    names = sorted(keys, key=lambda name: (FATES.index(keys[name].fate), name))
    return table((what, "here", "key, difference or reason"), map(row, names))


def _commands() -> str:
    rows = (
        (f"`{name}`", key.fate, f"`{key.note}`" if key.fate == "mapped" else key.note)
        for name, key in LMCACHE_COMMANDS.items()
    )
    return table(("command", "here", "command, difference or reason"), rows)
