"""How much more memory this process could take."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The smallest of what the host has available and what each cgroup (v2) above us still allows.

    None when the system does not say. Memory that can be reclaimed without loss counts as available.
    """
    limits = [_host_bytes(proc / "meminfo"), *map(_cgroup_bytes, _cgroups(proc, cgroup))]
    return min((limit for limit in limits if limit is not None), default=None)


def _host_bytes(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroups(proc: Path, root: Path) -> list[Path]:
    """The cgroup of this process and all above it. Inside a container the root may be its own cgroup."""
    for line in _lines(proc / "self" / "cgroup"):
        if line.startswith("0::/"):
            own = root / line.removeprefix("0::/")
            return [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return []


def _cgroup_bytes(directory: Path) -> int | None:
    maximum, current = _lines(directory / "memory.max"), _lines(directory / "memory.current")
    if not maximum or not current or maximum[0] == "max":
        return None
    reclaimable = 0
    for line in _lines(directory / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            reclaimable = int(value)
    return max(0, int(maximum[0]) - int(current[0]) + reclaimable)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not there, or not ours to read: then it sets no limit that we know of
        return []
