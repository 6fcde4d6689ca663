"""Reading, writing and finding the parts of frames that were split (:mod:`kvstrata.tiers.redis.parts`).

``until`` is the deadline of the batch that a call is a part of (:meth:`Limits.deadline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.tiers.redis.batch import Commands, Count, Get, set_command
from kvstrata.tiers.redis.entry import Entry
from kvstrata.tiers.redis.exchange import Down, Outcome, Refused, attempt, exchange
from kvstrata.tiers.redis.parts import MANIFEST_BYTES, Manifest
from kvstrata.tiers.redis.resp import command
from kvstrata.tiers.redis.topology import Topology
from kvstrata.types import Buffer, Miss, MissReason

_DROP_BROKEN = b"""
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1]) ~= ARGV[1] then return 0 end
for at = 2, #KEYS do
  if redis.call('EXISTS', KEYS[at]) == 0 then return redis.call('UNLINK', unpack(KEYS)) end
end
return 0
"""
"""Drops a frame, by its name and those of its parts, if its manifest is still this one and a part is missing."""


def peek(name: bytes) -> bytes:
    """The command whose reply :func:`manifest_in` understands; of a frame that is not split it gives little."""
    return command(b"GETRANGE", name, b"0", b"%d" % MANIFEST_BYTES)


def manifest_in(outcome: Outcome) -> Manifest | None:
    """What ``peek`` found, when it is a manifest."""
    return Manifest.unpack(outcome) if isinstance(outcome, bytes) else None


def find_manifests(topology: Topology, names: Sequence[bytes], until: float) -> dict[bytes, Manifest]:
    """Which frames are stored in parts, by name, without reading the others. Who cannot be asked is left out."""
    outcomes = exchange(topology, Commands(names, [[peek(name)] for name in names]), until)
    found = {name: manifest_in(outcome) for name, outcome in zip(names, outcomes, strict=True)}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def read_parts(
    topology: Topology,
    names: Sequence[bytes],
    buffers: Sequence[memoryview],
    manifests: Mapping[int, Manifest],
    until: float,
) -> tuple[dict[int, int | Miss], list[Outcome]]:
    """Read the frames that ``manifests`` describe, by position, to their buffers; all of a frame or a miss.

    A frame with a part missing is dropped. Returns also what became of each part that was asked for.
    """
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
    if not rooms:
        return results, []
    outcomes = exchange(topology, Get(part_names, rooms), until)
    for at, span in spans.items():
        results[at] = _joined(manifests[at], outcomes[span])
    broken = {names[at]: manifests[at] for at, span in spans.items() if None in outcomes[span]}
    if broken:
        _drop_broken(topology, broken, until)
    return results, outcomes


def _joined(manifest: Manifest, outcomes: Sequence[Outcome]) -> int | Miss:
    if manifest.is_whole(outcomes):
        return manifest.frame_bytes
    for outcome in outcomes:
        if outcome is None:
            return Miss(MissReason.ABSENT, "a part of the frame is gone")
        if isinstance(outcome, Down):
            return Miss(MissReason.TIER_DOWN, outcome.reason)
        if isinstance(outcome, Refused) and outcome.reply.code != "WRONGTYPE":
            return Miss(MissReason.TIER_DOWN, "a part of the frame was refused")
    return Miss(MissReason.CORRUPT, "the parts are not those of the frame")


def _drop_broken(topology: Topology, broken: Mapping[bytes, Manifest], until: float) -> None:
    """Drop frames that can never be read again, so that no look-up promises them.

    A writer may be storing such a frame anew, and a replica that was read from may lag: the master compares and
    drops in one step. Where it may not (no EVAL) the frame stays until it is stored again.
    """
    commands = []
    for name, manifest in broken.items():
        keys = [name, *manifest.names(name)]
        commands.append([command(b"EVAL", _DROP_BROKEN, b"%d" % len(keys), *keys, manifest.pack())])
    attempt(topology, Commands(list(broken), commands), until)


def write_parts(
    topology: Topology, entries: Sequence[Entry], ttl_seconds: int | None, until: float
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
    outcomes = exchange(topology, Commands(names, commands), until)
    failed = {owner: outcome for owner, outcome in zip(owners, outcomes, strict=True) if outcome != b"OK"}
    unlink(topology, [name for name, owner in zip(names, owners, strict=True) if owner in failed], until)
    return failed


def unlink(topology: Topology, names: Sequence[bytes], until: float) -> None:
    """Drop what nobody refers to any more; what cannot be reached expires or is evicted."""
    if names:
        attempt(topology, Count(b"UNLINK", names), until)
