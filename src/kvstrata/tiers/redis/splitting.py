"""Reading, writing and finding the parts of frames that were split (:mod:`kvstrata.tiers.redis.parts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.tiers.redis.batch import Commands, Count, Get, set_command
from kvstrata.tiers.redis.entry import Entry
from kvstrata.tiers.redis.exchange import Down, Outcome, Refused, exchange
from kvstrata.tiers.redis.parts import MANIFEST_BYTES, Manifest
from kvstrata.tiers.redis.resp import command
from kvstrata.tiers.redis.topology import Topology
from kvstrata.types import Buffer, Miss, MissReason


def find_manifests(topology: Topology, names: Sequence[bytes]) -> dict[bytes, Manifest]:
    """Which frames are stored in parts, by name, without reading the others. Who cannot be asked is left out."""
    if not names:
        return {}
    commands = [[command(b"GETRANGE", name, b"0", b"%d" % MANIFEST_BYTES)] for name in names]
    outcomes = exchange(topology, Commands(names, commands, is_write=True))
    found = {}
    for name, outcome in zip(names, outcomes, strict=True):
        manifest = Manifest.unpack(outcome) if isinstance(outcome, bytes) else None
        if manifest is not None:
            found[name] = manifest
    return found


def read_parts(
    topology: Topology,
    names: Sequence[bytes],
    buffers: Sequence[memoryview],
    manifests: Mapping[int, Manifest],
) -> dict[int, int | Miss]:
    """Read the frames that ``manifests`` describe, by position, to their buffers; all of a frame or a miss."""
    results: dict[int, int | Miss] = {}
    spans: dict[int, slice] = {}
    part_names: list[bytes] = []
    rooms: list[memoryview] = []
    for at, manifest in manifests.items():
        if manifest.frame_bytes > len(buffers[at]):
            detail = f"frame of {manifest.frame_bytes} bytes for a buffer of {len(buffers[at])}"
            results[at] = Miss(MissReason.CORRUPT, detail)
            continue
        spans[at] = slice(len(rooms), len(rooms) + manifest.num_parts)
        part_names += manifest.names(names[at])
        rooms += manifest.split(buffers[at])
    if rooms:
        outcomes = exchange(topology, Get(part_names, rooms))
        for at, span in spans.items():
            results[at] = _joined(manifests[at], buffers[at], outcomes[span])
    return results


def _joined(manifest: Manifest, buffer: memoryview, outcomes: Sequence[Outcome]) -> int | Miss:
    if manifest.is_whole(buffer, outcomes):
        return manifest.frame_bytes
    for outcome in outcomes:
        if outcome is None:
            return Miss(MissReason.ABSENT, "a part of the frame is gone")
        if isinstance(outcome, Down):
            return Miss(MissReason.TIER_DOWN, outcome.reason)
        if isinstance(outcome, Refused) and outcome.reply.code != "WRONGTYPE":
            return Miss(MissReason.TIER_DOWN, "a part of the frame was refused")
    return Miss(MissReason.CORRUPT, "the parts are not those of the frame")


def write_parts(
    topology: Topology, entries: Sequence[Entry], ttl_seconds: int | None
) -> dict[bytes, Outcome]:
    """Write the parts of the entries that have a manifest; by name, those that could not be written whole."""
    names: list[bytes] = []
    commands: list[Sequence[Buffer]] = []
    owners: list[bytes] = []
    for entry in entries:
        if entry.manifest is None:
            continue
        own = entry.manifest.names(entry.value_name)
        names += own
        owners += [entry.value_name] * len(own)
        parts = entry.manifest.split(entry.frame)
        commands += [set_command(name, part, ttl_seconds) for name, part in zip(own, parts, strict=True)]
    if not names:
        return {}
    outcomes = exchange(topology, Commands(names, commands))
    failed = {owner: outcome for owner, outcome in zip(owners, outcomes, strict=True) if outcome != b"OK"}
    unlink(topology, [name for name, owner in zip(names, owners, strict=True) if owner in failed])
    return failed


def unlink(topology: Topology, names: Sequence[bytes]) -> None:
    """Drop what nobody refers to any more; what cannot be reached expires or is evicted."""
    if names:
        exchange(topology, Count(b"UNLINK", names))
