"""Conditions of a Model's status."""

from __future__ import annotations

import datetime as dt
from typing import Any

from msgspec import Struct

Status = dict[str, Any]


class Condition(Struct, frozen=True):
    """``met`` None: it is not known."""

    type: str
    met: bool | None
    reason: str
    message: str = ""


def merged(before: Status, conditions: list[Condition], generation: int, fields: Status) -> Status:
    """The status with these conditions; a condition keeps the time since when it is as it is."""
    known = {each.get("type"): each for each in before.get("conditions", [])}
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    listed: list[Status] = []
    for each in conditions:
        value = "Unknown" if each.met is None else str(each.met)
        old = known.get(each.type, {})
        since = old["lastTransitionTime"] if old.get("status") == value else now
        listed.append(
            {
                "type": each.type,
                "status": value,
                "reason": each.reason,
                "message": each.message,
                "observedGeneration": generation,
                "lastTransitionTime": since,
            }
        )
    return {"observedGeneration": generation, **fields, "conditions": listed}
