"""The settings as a JSON schema, for tools that check a configuration before it gets here (the Helm chart)."""

from __future__ import annotations

from typing import Any

import msgspec

from kvstrata.config.settings import Settings


def settings_schema() -> dict[str, Any]:
    """Names, types and bounds of all settings, without the other names that some have."""
    definition = msgspec.json.schema(Settings)["$defs"]["Settings"]
    properties = {name: _bare(schema) for name, schema in definition["properties"].items()}
    properties["gate"] = {"type": ["string", "boolean"]}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    """Without descriptions and defaults."""
    kept = {key: value for key, value in schema.items() if key not in {"description", "default"}}
    if "anyOf" in kept:
        kept["anyOf"] = [_bare(each) for each in kept["anyOf"]]
    return kept
