"""The configuration reference in Markdown, made from the settings tree."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import typing
from typing import Any

import msgspec

from kvstrata import plugins
from kvstrata.config.markdown import table
from kvstrata.config.settings import ALIASES, SETTINGS, Setting
from kvstrata.config.values import SCHEME_KINDS

_HEAD = """\
# Configuration

<!-- Made by `kvstrata config docs`. Edit src/kvstrata/config/ instead. -->

Every setting is one flat key. Its value comes from the last of these that sets it:

1. the default;
2. the environment: `KVSTRATA_` or `LMCACHE_` and the key in capitals (`KVSTRATA_CHUNK_SIZE`); where both are
   set and differ, `KVSTRATA_` is used and the log says so. An empty variable counts as not set. `LMCACHE_`
   works for the keys that LMCache has;
3. the YAML file that `KVSTRATA_CONFIG_FILE` or `LMCACHE_CONFIG_FILE` names;
4. the connector's `kv_connector_extra_config`, with keys as they are or after `kvstrata.` or `lmcache.`;
5. arguments of the command line (`--config FILE` takes the place of 3).

A wrong value is an error at start that names key, value, source and what is allowed. So is an unknown key,
except in an `LMCACHE_` variable, which is named in the log. `kvstrata config show` prints every value and
where it comes from; `kvstrata config check FILE` checks a file. Passwords are never shown.

Booleans are true, false, 1, 0, yes, no, on or off. Sizes are numbers of GiB (2^30 bytes).
"""

_TIERS = """\
## Tiers

`local_disk` and `remote_url` make one tier each, `tiers` makes any number, asked after those, in order:

```yaml
tiers:
  - url: redis://127.0.0.1:6379
    name: near
    ttl_seconds: 86400
  - url: redis://far.example.net:6379
    name: far
    write_policy: second_use
  - kind: disk
    path: /mnt/nfs/kv
    max_bytes: 1000000000000
    write_policy: none
```

Every item has `kind` or `url`, and may have `name` (of logs and metrics; its kind by default), `codec`
(`naive`) and `write_policy`: `all` (it gets what is stored), `second_use` (what is used a second time: stored
again, or hit) or `none` (it is only read from). The other keys are options of its kind.
See [tiers.md](tiers.md) for several tiers at once.
"""

_LMCACHE = """\
## Coming from LMCache

`LMCACHE_*` variables, `lmcache_config.yaml` and `lmcache.*` keys are read as they are. What has no effect
here is named in one message at start. In LMCache the environment wins over a file; here the file wins.
What becomes of each key: [Moving from LMCache](migrate-from-lmcache.md).
"""


def reference_text() -> str:
    """The whole page."""
    return "\n".join([_HEAD, _settings(), _TIERS, *_options(), _LMCACHE])


def _settings() -> str:
    def row(setting: Setting) -> tuple[str, ...]:
        aliases = "".join(f"<br>also `{alias}`" for alias, key in ALIASES.items() if key == setting.key)
        return (
            f"`{setting.key}`{aliases}",
            setting.allowed,
            _value(setting.default),
            setting.meta.description or "",
        )

    return "## Settings\n\n" + table(("key", "allowed", "default", "meaning"), map(row, SETTINGS.values()))


def _value(value: Any) -> str:
    if value in (None, (), ""):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _options() -> list[str]:
    """One table for each installed kind of tier, from its Options."""
    sections = []
    for kind in plugins.names("tiers"):
        options: type[msgspec.Struct] = plugins.load("tiers", kind).Options
        schemes = [scheme for scheme, target in SCHEME_KINDS.items() if target == kind]
        urls = ", ".join(f"`{scheme}://`" for scheme in [kind, *schemes])
        docs = _field_docs(options)
        rows = [
            (f"`{field.name}`", _type_name(field.type), _default(field), docs.get(field.name, ""))
            for field in msgspec.structs.fields(options)
            if field.name != "name"
        ]
        options_table = table(("option", "type", "default", "meaning"), rows)
        sections.append(f"### `{kind}`\n\nURLs: {urls}\n\n{options_table}")
    return sections


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "must be given"
    return _value(field.default if field.default is not msgspec.NODEFAULT else ())


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _field_docs(struct: type) -> dict[str, str]:
    """The strings that stand below the fields of a class and of its bases, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if not base.__module__.startswith("msgspec") and issubclass(base, msgspec.Struct):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            docs |= _docs_in(typing.cast("ast.ClassDef", definition).body)
    return docs


def _docs_in(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match below:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.replace("``", "`").split())
                case _:
                    pass
    return docs
