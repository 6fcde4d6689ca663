"""Pins: entries that an operator keeps in L1, under a name and for a time."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import Entry, State
from kvstrata.errors import ConflictError, NotFoundError
from kvstrata.operations.report import Report

MAX_PINS = 1000
MAX_SHARE = 0.5
"""Share of L1's budget that pins may hold: the rest must stay for requests."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class PinReport(Report):
    """Entries of L1 that are not evicted."""

    id: str
    owner: str
    """Who asked for it."""
    num_entries: int
    payload_bytes: int
    created_at: float
    """Unix seconds."""
    seconds_left: float
    """Then it ends by itself."""
    num_not_held: int = 0
    """What was asked for and is not in L1, when it was pinned; warm it first."""


class _Pin:
    def __init__(self, owner: str, entries: Sequence[Entry], seconds: float, num_not_held: int) -> None:
        self.id = secrets.token_hex(8)
        self.owner = owner
        self.entries = list(entries)
        self.num_not_held = num_not_held
        self.created_at = time.time()
        self.ends_at = time.monotonic() + seconds

    def report(self) -> PinReport:
        return PinReport(
            id=self.id,
            owner=self.owner,
            num_entries=len(self.entries),
            payload_bytes=sum(entry.payload_bytes for entry in self.entries),
            created_at=self.created_at,
            seconds_left=max(0.0, self.ends_at - time.monotonic()),
            num_not_held=self.num_not_held,
        )


class Pins:
    """All pins of a server. A pin is a lease without a request: deleting and clearing go through it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._pins: dict[str, _Pin] = {}
        self._lock = threading.Lock()
        """Around ``_pins``; taken before the core's."""
        self._look_at = 0.0
        """When ``expire`` looks again."""

    def pin(self, owner: str, entries: Iterable[Entry], seconds: float, num_not_held: int = 0) -> PinReport:
        """Keep ``entries``, those of them that are held and complete.

        Raises:
            NotFoundError: none of them is.
            ConflictError: there would be too many pins, or too much pinned.
        """
        unique = {entry.key: entry for entry in entries}.values()
        with self._lock, self._cache.guarded() as index:
            if len(self._pins) >= MAX_PINS:
                raise ConflictError(f"there are {MAX_PINS} pins already; unpin some")
            held = [e for e in unique if index.entries.get(e.key) is e and e.state is State.READY]
            if not held:
                raise NotFoundError("L1 holds nothing of that; warm it first, or check key, model and salt")
            self._check_size(held, int(MAX_SHARE * index.allocator.budget_bytes))
            for entry in held:
                entry.leases += 1
            pin = _Pin(owner, held, seconds, num_not_held + len(unique) - len(held))
            self._pins[pin.id] = pin
        return pin.report()

    def _check_size(self, more: Sequence[Entry], allowed_bytes: int) -> None:
        pinned = {entry.key: entry for pin in self._pins.values() for entry in pin.entries}
        pinned |= {entry.key: entry for entry in more}
        size = sum(entry.payload_bytes for entry in pinned.values())
        if size > allowed_bytes:
            raise ConflictError(
                f"{size:,} bytes would be pinned in all; {allowed_bytes:,} may be, half of L1's budget"
            )

    def unpin(self, pin_id: str) -> PinReport:
        """End a pin.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            pin = self._pins.get(pin_id)
            if pin is None:
                raise NotFoundError(f"there is no pin {pin_id!r}")
            return self._end(pin)

    def unpin_owner(self, owner: str) -> list[PinReport]:
        """End all pins of an owner."""
        return self._end_all(lambda pin: pin.owner == owner)

    def expire(self) -> None:
        """End what is over, and give back what was deleted meanwhile. May be called at any time; it looks at what
        is pinned once a second, as that may be a million entries."""
        now = time.monotonic()
        if not self._pins or now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        self._end_all(lambda pin: now >= pin.ends_at)
        with self._lock, self._cache.guarded() as index:
            for pin in self._pins.values():
                for entry in pin.entries:
                    if entry.state is State.DROPPED:
                        index.unlease(entry)
                pin.entries = [entry for entry in pin.entries if entry.state is not State.DROPPED]

    def _end_all(self, matches: Callable[[_Pin], bool]) -> list[PinReport]:
        with self._lock:
            return [self._end(pin) for pin in [pin for pin in self._pins.values() if matches(pin)]]

    def _end(self, pin: _Pin) -> PinReport:
        report = pin.report()
        del self._pins[pin.id]
        with self._cache.guarded() as index:
            for entry in pin.entries:
                index.unlease(entry)
        return report

    def list(self) -> list[PinReport]:
        """The oldest first."""
        with self._lock:
            return [pin.report() for pin in self._pins.values()]
