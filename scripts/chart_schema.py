"""Puts the settings into the Helm chart's values.schema.json (make chart)."""

from __future__ import annotations

import json
from pathlib import Path

from kvstrata.config.schema import settings_schema

SCHEMA = Path(__file__).parents[1] / "deploy" / "helm" / "kvstrata" / "values.schema.json"


def main() -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["server"]["properties"]["settings"] = settings_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
