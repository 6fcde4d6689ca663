"""The machine: kernel, limits, clock, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import time
from pathlib import Path

from kvstrata.doctor.finding import Finding, Level
from kvstrata.memory.headroom import available_memory_bytes

_MIN_KERNEL = (5, 3)
_POPULATE_KERNEL = (5, 14)
_MIN_FILES = 4096
_ENOUGH_SHM_BYTES = 1 << 30
_UNSYNCHRONISED = 5
_OLDEST = 1_735_689_600
"""2025-01-01: a clock before that is wrong."""


def check_kernel(release: str | None = None) -> Finding:
    """pidfd (Linux 5.3) is needed to know when a client has ended; 5.14 can fault memory in ahead of its use."""
    release = platform.release() if release is None else release
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if platform.system() != "Linux" or version < _MIN_KERNEL:
        return Finding("kernel", Level.ERROR, f"{platform.system()} {release}", "use Linux 5.3 or newer")
    if version < _POPULATE_KERNEL:
        return Finding(
            "kernel",
            Level.NOTE,
            f"Linux {release}: the first copies into L1 are slower",
            "Linux 5.14 is better",
        )
    return Finding("kernel", Level.OK, f"Linux {release}")


def check_files() -> Finding:
    """Clients, tiers and HTTP take a descriptor each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MIN_FILES:
        return Finding("open files", Level.OK, f"up to {soft} (ulimit -n)")
    return Finding(
        "open files",
        Level.WARNING,
        f"a process may open {soft} files",
        f"ulimit -n {min(hard, 65536)}, or LimitNOFILE= of the systemd unit, or the container's --ulimit nofile=",
    )


def check_clock() -> Finding:
    """Deadlines do not depend on the clock; the time of creation that entries carry, and TLS, do."""
    if time.time() < _OLDEST:
        return Finding("clock", Level.ERROR, time.strftime("it is %Y-%m-%d here"), "set the clock; start NTP")
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(512)) if hasattr(libc, "adjtimex") else -1
    if state == _UNSYNCHRONISED:
        return Finding(
            "clock", Level.NOTE, "the kernel says that the clock is not synchronised", "start NTP (chrony)"
        )
    return Finding("clock", Level.OK, "synchronised" if state >= 0 else "its state cannot be read here")


def check_memory(l1_bytes: int, available: int | None = None) -> Finding:
    """L1 must fit what host and container allow, with room for the rest."""
    available = available_memory_bytes() if available is None else available
    if available is None:
        return Finding("memory", Level.NOTE, "the system does not say how much is available")
    text = (
        f"L1 takes {_gib(l1_bytes)}; {_gib(available)} are available to this process (host, container limit)"
    )
    if l1_bytes > available:
        return Finding(
            "memory", Level.ERROR, text, "lower max_local_cpu_size (--l1-size-gb), or raise the limit"
        )
    if l1_bytes > 0.8 * available:
        return Finding(
            "memory",
            Level.WARNING,
            text,
            "leave a fifth free: the engine's and tiers' buffers live there too",
        )
    return Finding("memory", Level.OK, text)


def check_shm(shm_dir: str | None, l1_bytes: int, default: Path = Path("/dev/shm")) -> Finding:  # noqa: S108
    """L1 is anonymous memory unless ``shm_dir`` says otherwise; engines with several workers use /dev/shm."""
    directory = Path(shm_dir) if shm_dir else default
    try:
        space = os.statvfs(directory)
    except OSError as error:
        level = Level.ERROR if shm_dir else Level.NOTE
        return Finding("shared memory", level, f"{directory}: {error.strerror}", "mount a tmpfs there")
    free = space.f_bavail * space.f_frsize
    if shm_dir is not None and free < l1_bytes:
        return Finding(
            "shared memory",
            Level.ERROR,
            f"{directory} has {_gib(free)} free, L1 takes {_gib(l1_bytes)}",
            "enlarge it (docker --shm-size, an emptyDir with medium: Memory), or leave shm_dir out",
        )
    if shm_dir is None and free < _ENOUGH_SHM_BYTES:
        return Finding(
            "shared memory",
            Level.WARNING,
            f"{directory} has {_gib(free)} free; L1 does not use it, an engine with several workers does",
            "docker --shm-size=2g, or an emptyDir with medium: Memory",
        )
    return Finding("shared memory", Level.OK, f"{directory} has {_gib(free)} free")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
