"""``kvstrata status`` and ``kvstrata tiers``: what a server holds and how it does."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from kvstrata.cli.api import ApiClient, TokenFile, Url, connect
from kvstrata.cli.output import FAULT, AsJson, print_json, table_lines
from kvstrata.errors import ServerUnavailable

EXAMPLE = "Example: kvstrata status --watch 2"
TIERS_EXAMPLE = "Example: kvstrata tiers --url http://127.0.0.1:8080 --json"

_HOME, _TO_END = "\x1b[H", "\x1b[J"


def status(
    url: Url = None,
    token_file: TokenFile = None,
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", min=0.2, help="Show it again and again, until Ctrl-C."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print what a server holds, what it found, and what goes on.

    Exit status 1 when a tier is down.
    """
    api = connect(url, token_file)
    if watch is None:
        found = _gather(api)
        if as_json:
            print_json(found)
        else:
            print("\n".join(_lines(api.url, found, None)))
        return FAULT if any(tier["state"] == "down" for tier in found["tiers"]) else 0
    _watch(api, watch, as_json=as_json)
    return 0


def _watch(api: ApiClient, seconds: float, *, as_json: bool) -> None:
    before: dict[str, Any] | None = None
    while True:
        try:
            found = _gather(api)
            lines = _lines(api.url, found, before)
            before = found
        except ServerUnavailable as error:
            found, lines, before = {"error": str(error)}, [str(error)], None
        if as_json:
            print_json(found)
        elif sys.stdout.isatty():
            shown = "".join(f"{line}\x1b[K\n" for line in lines)
            print(_HOME + shown + _TO_END, end="", flush=True)
        else:
            print("\n".join(lines), end="\n\n", flush=True)
        time.sleep(seconds)


def tiers(url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> int:
    """Print of every tier what it holds, its speed, and its faults.

    Exit status 1 when one is down.
    """
    api = connect(url, token_file)
    found = api.ask("GET", "/tiers")
    if as_json:
        print_json({"tiers": found})
    else:
        for tier in found:
            print(f"{tier['name']}: {tier['where']}" + (f", codec {tier['codec']}" if tier["codec"] else ""))
        print()
        print("\n".join(_tier_lines(found)))
        rows = [
            (
                tier["name"],
                figures["operation"],
                f"{figures['count']:,}",
                size(figures["bytes"]),
                *(milliseconds(figures[f"p{share}_seconds"]) for share in (50, 90, 99)),
            )
            for tier in found
            for figures in tier["operations"]
            if figures["count"]
        ]
        if rows:
            print()
            print("\n".join(table_lines(("tier", "operation", "count", "bytes", "p50", "p90", "p99"), rows)))
    return FAULT if any(tier["state"] == "down" for tier in found) else 0


def _gather(api: ApiClient) -> dict[str, Any]:
    return {
        "health": api.ask("GET", "/health"),
        "stats": api.ask("GET", "/stats"),
        "tiers": api.ask("GET", "/tiers"),
        "runtime": api.ask("GET", "/runtime"),
        "pins": api.ask("GET", "/pins"),
        "jobs": api.ask("GET", "/jobs"),
        "at": time.time(),
    }


def _lines(url: str, found: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    stats, runtime = found["stats"], found["runtime"]
    headline = (
        f"kvstrata {found['health']['version']} at {url}: {found['health']['status']}, "
        f"up {duration(stats['uptime_seconds'])}, {stats['sessions']} clients"
    )
    lines = [
        headline,
        "",
        *_traffic_lines(stats["totals"], found, before),
        "",
        *_tier_lines(found["tiers"]),
    ]
    notes = []
    if runtime["stores_frozen"]:
        notes.append("stores are frozen")
    if runtime["bypassed_tiers"]:
        notes.append(f"bypassed: {', '.join(runtime['bypassed_tiers'])}")
    if found["pins"]:
        notes.append(
            f"{len(found['pins'])} pins ({size(sum(pin['payload_bytes'] for pin in found['pins']))})"
        )
    going_on = [job for job in found["jobs"] if job["state"] in {"waiting", "running"}]
    notes += [f"job {job['id']}: {job['kind']} {job['state']}, {job['num_done']:,} done" for job in going_on]
    return [*lines, "", *notes] if notes else lines


def _traffic_lines(totals: dict[str, Any], found: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    asked = totals["lookup_tokens"]
    hits = {tier: count for tier, count in totals["hit_tokens"].items() if count}
    by_tier = ", ".join(f"{tier} {share(count, asked)}" for tier, count in hits.items())
    lines = [
        f"{totals['lookups']:,} look-ups of {asked:,} tokens: {share(sum(hits.values()), asked)} found"
        + (f" ({by_tier})" if by_tier else "")
    ]
    reasons = [f"{reason} {count:,}" for reason, count in totals["miss_tokens"].items() if count]
    if reasons:
        lines.append(f"missing tokens: {', '.join(reasons)}")
    if before is not None:
        then, seconds = before["stats"]["totals"], max(1e-3, found["at"] - before["at"])
        new_tokens = asked - then["lookup_tokens"]
        new_hits = sum(totals["hit_tokens"].values()) - sum(then["hit_tokens"].values())
        stored = totals["stored_bytes"] - then["stored_bytes"]
        lines.append(
            f"now: {new_tokens / seconds:,.0f} tokens/s looked up, {share(new_hits, new_tokens)} found, "
            f"{size(stored / seconds)}/s stored"
        )
    return lines


def _tier_lines(found: list[dict[str, Any]]) -> list[str]:
    header = (
        "tier",
        "state",
        "entries",
        "used",
        "budget",
        "hit tokens",
        "errors",
        "dropped writes",
        "queued",
    )
    rows = [
        (
            tier["name"],
            tier["state"],
            "-" if tier["entries"] is None else f"{tier['entries']:,}",
            size(tier["used_bytes"]),
            size(tier["budget_bytes"]),
            f"{tier['hit_tokens']:,}",
            f"{tier['errors']:,}",
            f"{tier['dropped_writes']:,}",
            size(tier["queued_bytes"]),
        )
        for tier in found
    ]
    return table_lines(header, rows)


def size(num_bytes: float | None) -> str:
    """Bytes for people, in binary units."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def share(part: float, whole: float) -> str:
    """A percentage; "-" of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f} ms"


def duration(seconds: float) -> str:
    """Time for people: the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d"] * bool(days) + [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes)
    return " ".join([*parts, f"{rest} s"][:2] if rest or not parts else parts[:2])
