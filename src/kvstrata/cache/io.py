"""Moves between L1 and the tiers: the only place that makes threads, and the only one where faults of backends
become misses.

Per tier: one thread for look-ups, so that they never wait behind transfers; some for reads; one for writes, and
with a codec some that encode ahead of it.
Callbacks run on those threads, without any lock held.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from kvstrata.cache.breaker import Breaker
from kvstrata.cache.encoding import Encoding, Encodings
from kvstrata.cache.frames import Transfer, accept_frame, read_buffer
from kvstrata.cache.reading import Measured, Reading
from kvstrata.cache.spans import read_batch
from kvstrata.cache.steps import contains_in_steps
from kvstrata.cache.walk import Candidates
from kvstrata.cache.workers import Workers, attempt
from kvstrata.codecs.base import Codec
from kvstrata.codecs.open import Decoders
from kvstrata.config import WritePolicy
from kvstrata.errors import TierError, TierFull, TierPartlyUnavailable, TierUnavailable
from kvstrata.metrics import Metrics
from kvstrata.tiers.base import PROBE_KEY, Tier
from kvstrata.tracing import Span
from kvstrata.types import FOR_OTHERS, Miss, MissReason, TierStats

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
"""Bytes of one read or write call to a tier: large enough to pipeline, small enough to share among threads."""

_STAND_BACK_SECONDS = 1.0
"""After a write was dropped, how long none is taken that nobody waits for."""
_SIZE_SECONDS = 0.25
"""How long statistics wait for a backend; then they show what it said the last time."""

_DELETES_AT_ONCE = 256
_MAX_SAID = 16
"""Different reasons why entries cannot be read that a tier's log names."""

T = TypeVar("T")
ContainsDone = Callable[[bytes | None, float], None]
ReadDone = Callable[[Sequence[Transfer], Sequence[Miss | None]], None]
WriteDone = Callable[[bool, float], None]
"""Whether it is written, and how many seconds the tier took (0: nothing had to be written)."""


class TierIO:
    """One tier with its threads, its bounds and its circuit breaker."""

    def __init__(
        self,
        tier: Tier,
        name: str,
        codec: Codec,
        decoders: Decoders,
        metrics: Metrics,
        *,
        num_workers: int,
        write_queue_bytes: int,
        write_policy: WritePolicy = "all",
        breaker: Breaker | None = None,
        probe_seconds: float = 1.0,
    ) -> None:
        self.tier = tier
        self.name = name
        self.codec = codec
        self.write_policy = write_policy
        self.breaker = breaker or Breaker()
        self.queued_bytes = 0
        self.num_dropped = 0
        self._decoders = decoders
        self._said_codecs: set[str] = set()
        self._metrics = metrics
        self._write_queue_bytes = write_queue_bytes
        self._probe_seconds = probe_seconds
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._said_full = False
        self._spare_from = 0.0
        """When writes that nobody waits for are taken again."""
        self._size: TierStats | None = None
        self._asking_size: threading.Event | None = None
        self._answered_at = 0.0
        """When a look-up was last answered."""
        self._lookups = Workers(f"{name}-lookup", 1)
        self._num_read_threads = max(1, num_workers - 2)
        self._reads = Workers(f"{name}-read", self._num_read_threads)
        self._writes = Workers(f"{name}-write", 1)
        self._encodings = Encodings(name, codec, self._num_read_threads)
        self._workers = (self._lookups, self._reads, self._writes, self._encodings.workers)
        metrics.tier_added(name)

    # Look-ups

    def contains(self, candidates: Candidates, expires_at: float, done: ContainsDone) -> None:
        """Ask which candidates are held, shard by shard, and how many seconds that took; None when the tier is
        down, or when its turn came too late to matter."""
        if self.breaker.is_open:
            done(None, 0.0)
            return

        def job() -> None:
            held = None
            started = time.monotonic()
            if not self.breaker.is_open and started < expires_at:
                held = self._call("contains", 0, lambda: contains_in_steps(self._contains, candidates))
            if held is not None:
                self._answered_at = time.monotonic()
            done(held, time.monotonic() - started)

        self._lookups.submit(job)

    def _contains(self, keys: Sequence[str]) -> list[bool]:
        held = self.tier.contains(keys)
        if len(held) != len(keys):
            raise TierUnavailable(f"{self.tier.describe()} answered for {len(held)} keys of {len(keys)}")
        return held

    def stalled(self, waited_seconds: float = 0.0) -> None:
        """A look-up gave up waiting for this tier. Unless others were answered meanwhile, the tier hangs; if they
        were, there are more look-ups than it keeps up with, and it is as useful as it was."""
        if time.monotonic() - self._answered_at < waited_seconds:
            return
        if self.breaker.stalled():
            self._opened("an operation outlived its deadline")

    # Reads

    def read(
        self, transfers: Sequence[Transfer], done: ReadDone, measured: Measured, span: Span | None = None
    ) -> None:
        """Read frames into their slots, in batches.

        ``done`` is called once per batch, ``measured`` once at the end with the payload bytes that arrived and
        the seconds that all of it took. Each batch is a span below ``span``.
        """
        batches = self._batches(transfers)
        reading = Reading(len(batches), measured, span)
        for batch in batches:
            self._reads.submit(partial(self._read_batch, batch, reading, done))

    def _batches(self, transfers: Sequence[Transfer]) -> list[list[Transfer]]:
        total = sum(len(t.slot) for t in transfers)
        limit = min(BATCH_BYTES, -(-total // self._num_read_threads))
        batches: list[list[Transfer]] = []
        size = limit
        for transfer in transfers:
            if size >= limit:
                batches.append([])
                size = 0
            batches[-1].append(transfer)
            size += len(transfer.slot)
        return batches

    def _read_batch(self, batch: Sequence[Transfer], reading: Reading, done: ReadDone) -> None:
        started = time.monotonic()
        outcome = self._fetch(batch)
        bad = []
        for transfer, miss in zip(batch, outcome, strict=True):
            if miss is not None:
                self._metrics.frame_missed(self.name, miss.reason)
                if miss.reason == MissReason.CORRUPT:
                    logger.warning("tier %s: entry %s is unusable: %s", self.name, transfer.key, miss.detail)
                    bad.append(transfer.key)
                elif miss.reason in FOR_OTHERS:
                    self._say_once(transfer.key, miss.detail)
        if reading.span is not None:
            read_batch(reading.span, self.name, outcome, time.monotonic() - started)
        done(batch, outcome)
        reading.add(sum(len(t.payload) for t, miss in zip(batch, outcome, strict=True) if miss is None))
        if bad:
            self.delete(bad)

    def _fetch(self, batch: Sequence[Transfer]) -> list[Miss | None]:
        """Read frames into their slots; what became of each."""
        buffers, error = attempt(lambda: [read_buffer(transfer, self.codec) for transfer in batch])
        if buffers is None:
            logger.error("tier %s: %d entries cannot be read: %r", self.name, len(batch), error)
            return [Miss(MissReason.NO_SPACE)] * len(batch)
        keys = [transfer.key for transfer in batch]
        read, size = partial(self.tier.read, keys, buffers), sum(len(t.payload) for t in batch)
        results = None if self.breaker.is_open else self._call("read", size, read)
        if results is None or len(results) != len(batch):
            return [Miss(MissReason.TIER_DOWN)] * len(batch)
        return [self._accept(*each) for each in zip(batch, buffers, results, strict=True)]

    def _say_once(self, key: str, detail: str) -> None:
        """An entry that others can read: it stays, and one line in the log is enough for all of its kind."""
        if detail not in self._said_codecs and len(self._said_codecs) < _MAX_SAID:
            self._said_codecs.add(detail)
            logger.warning("tier %s: entry %s cannot be read here: %s", self.name, key, detail)

    def _accept(self, transfer: Transfer, buffer: memoryview, result: int | Miss) -> Miss | None:
        """Check one frame that was read; also what a tier or a codec breaks its contract with ends as a miss."""
        if isinstance(result, Miss):
            return result
        if not 0 <= result <= len(buffer):
            return Miss(MissReason.CORRUPT, f"{result} bytes in a buffer of {len(buffer)}")
        miss, error = attempt(lambda: accept_frame(transfer, buffer[:result], self._decoders))
        if isinstance(error, MemoryError):  # nothing is wrong with the frame: it is not to be deleted
            logger.error("tier %s: no memory to decode entry %s", self.name, transfer.key)
            return Miss(MissReason.NO_SPACE)
        if error is not None:
            logger.error("tier %s: a codec broke its contract", self.name, exc_info=error)
            return Miss(MissReason.UNKNOWN_CODEC, f"decoding failed: {type(error).__name__}")
        return miss

    # Writes

    def write(
        self, transfer: Transfer, done: WriteDone, is_wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Queue a write; False (and counted) when the tier is down or its queue is full: the write is dropped.

        ``is_wanted`` is asked when its turn has come; it is left out when no longer wanted.
        """
        with self._lock:
            taken = not self.breaker.is_open and self._take(transfer, self._write_queue_bytes)
            if not taken:
                self._dropped()
            if taken:  # queued in the order in which they are encoded
                encoding = self._encodings.ahead(transfer, lambda: is_wanted() and not self.breaker.is_open)
                self._writes.submit(partial(self._write_one, transfer, encoding, done, is_wanted))
        return taken

    def fill(self, transfer: Transfer, done: WriteDone, is_wanted: Callable[[], bool]) -> bool:
        """Queue a write that nobody waits for: False, and not counted, unless there is room to spare. When the
        tier turns out to hold the key, nothing is written, and it counts as written."""
        with self._lock:
            taken = self._is_spare() and self._take(transfer, self._write_queue_bytes // 2)
        if taken:
            self._writes.submit(partial(self._write_one, transfer, None, done, is_wanted))
        return taken

    def has_spare_room(self) -> bool:
        """Whether ``fill`` may take anything now."""
        with self._lock:
            return self._is_spare() and self.queued_bytes < self._write_queue_bytes // 2

    def _is_spare(self) -> bool:
        return not self.breaker.is_open and time.monotonic() >= self._spare_from

    def _take(self, transfer: Transfer, limit_bytes: int) -> bool:
        size = len(transfer.slot)
        if self.queued_bytes + size > limit_bytes:
            return False
        self.queued_bytes += size
        return True

    def _dropped(self) -> None:
        """A write was lost. Those that nobody waits for stand back for a while: the tier has enough to do."""
        self.num_dropped += 1
        self._spare_from = time.monotonic() + _STAND_BACK_SECONDS
        self._metrics.write_dropped(self.name)

    def _write_one(
        self,
        transfer: Transfer,
        encoding: Encoding | None,
        done: WriteDone,
        is_wanted: Callable[[], bool],
    ) -> None:
        wanted = is_wanted()
        seconds = None
        if wanted and not self.breaker.is_open:
            seconds = self._encode_and_write(transfer, encoding)
        if encoding is not None:
            self._encodings.passed(encoding)
        with self._lock:
            self.queued_bytes -= len(transfer.slot)
            if wanted and seconds is None:
                self._dropped()
        done(seconds is not None, seconds or 0.0)

    def _encode_and_write(self, transfer: Transfer, encoding: Encoding | None) -> float | None:
        """The seconds that it took; None when it failed."""
        if encoding is None:
            if self._call("contains", 0, lambda: self.tier.contains([transfer.key])) == [True]:
                return 0.0
            encoding = self._encodings.now(transfer)
        frame = encoding.result()
        if frame is None:
            error = encoding.error
            logger.error("tier %s: codec %s broke its contract", self.name, self.codec.name, exc_info=error)
            return None

        def job() -> bool:
            self.tier.write([transfer.key], [frame])
            return True

        started = time.monotonic()
        written = self._call("write", len(transfer.slot), job)
        return encoding.seconds + time.monotonic() - started if written else None

    # Deletes

    def delete(self, keys: Sequence[str]) -> None:
        """Delete in the background, after the writes that are queued."""
        self._writes.submit(lambda: self._delete_now(keys))

    def _delete_now(self, keys: Sequence[str]) -> None:
        self._call("delete", 0, lambda: self.tier.delete(keys))

    def clear(
        self,
        prefix: str,
        done: Callable[[], None],
        *,
        matches: Callable[[str], bool] = lambda _: True,
        deleted: Callable[[int], None] | None = None,
    ) -> None:
        """Delete all keys with a prefix in the background, after the writes that are queued.

        It is tried until it succeeds; then ``done`` is called, and before that ``deleted`` with the number of each
        part that was deleted. Keys that do not match stay.
        """

        def clear() -> int:
            keys = filter(matches, self.tier.scan(prefix))
            num_deleted = 0
            while batch := list(itertools.islice(keys, _DELETES_AT_ONCE)):
                count = self.tier.delete(batch)
                num_deleted += count
                if deleted is not None:
                    deleted(count)
            return num_deleted

        def cleared(num_deleted: int) -> None:
            logger.info("tier %s: cleared %s (%d entries)", self.name, prefix or "everything", num_deleted)
            done()

        self.until_done("clear", clear, cleared)

    def until_done(self, operation: str, call: Callable[[], int], done: Callable[[int], None]) -> None:
        """Let ``call`` delete something in the background, after the writes that are queued.

        It is tried until it succeeds; then ``done`` is told how many entries it deleted.
        """

        def job() -> None:
            deleted = None if self.breaker.is_open else self._call(operation, 0, call)
            if deleted is None:
                threading.Thread(target=again, name=f"kvstrata-{self.name}-clear", daemon=True).start()
                return
            done(deleted)

        def again() -> None:
            if not self._closing.wait(self._probe_seconds):
                self._writes.submit(job)

        self._writes.submit(job)

    # Operations

    def run(self, call: Callable[[Tier], T], timeout_seconds: float) -> T:
        """Carry out ``call`` on a read thread, between the reads of requests, and wait for it. A fault is the
        caller's to know, and no reason to leave the tier alone. Not for threads that must not wait.

        Raises:
            TierUnavailable: the tier is left alone, failed, or took longer.
        """
        if self.breaker.is_open:
            raise TierUnavailable(f"tier {self.name} is down or bypassed")
        answered = threading.Event()
        answer: list[tuple[T | None, Exception | None]] = []

        def job() -> None:
            if not abandoned.is_set():
                answer.append(attempt(lambda: call(self.tier)))
            answered.set()

        abandoned = threading.Event()
        self._reads.submit(job)
        if not answered.wait(timeout_seconds):
            abandoned.set()
            raise TierUnavailable(f"tier {self.name} did not answer within {timeout_seconds:g} s")
        result, error = answer[0]
        if error is not None:
            raise TierUnavailable(f"tier {self.name}: {error}") from None
        return cast("T", result)

    @property
    def state(self) -> str:
        """ "up", "down" (its breaker is open) or "bypassed" (an operator's wish)."""
        if self.breaker.bypassed:
            return "bypassed"
        return "down" if self.breaker.is_open else "up"

    # The border: faults of backends end here

    def _call(self, operation: str, num_bytes: int, call: Callable[[], T]) -> T | None:
        """Run one operation of the tier; None when it failed, which is counted here and nowhere else."""
        started = time.monotonic()
        result, error = attempt(call)
        if error is not None:
            self._failed(operation, error)
            return None
        if not self.breaker.is_open:  # then this one comes late, and only a probe may close it
            self.breaker.succeeded()
        self._metrics.tier_operation(self.name, operation, num_bytes, time.monotonic() - started)
        return result

    def _failed(self, operation: str, error: Exception) -> None:
        self._metrics.tier_failed(self.name)
        if isinstance(error, TierFull):
            # Full is no reason to stop reading.
            if not self._said_full:
                # As text: a log record that keeps the exception keeps its frames, and with them the pool mapped.
                logger.warning("tier %s is full and does not evict: %s", self.name, str(error))
                self._said_full = True
            return
        if isinstance(error, TierPartlyUnavailable):
            # Nor is one server of many; the tier says itself which one it lost.
            return
        if not isinstance(error, TierError):
            logger.error("tier %s broke the tier contract in %s", self.name, operation, exc_info=error)
        if self.breaker.failed():
            self._opened(f"{operation}: {error}")

    def _opened(self, reason: str) -> None:
        logger.warning(
            "tier %s (%s) is down, going on without it: %s", self.name, self.tier.describe(), reason
        )
        self._metrics.breaker_changed(self.name, is_open=True)
        threading.Thread(target=self._probe, name=f"kvstrata-{self.name}-probe", daemon=True).start()

    def _probe(self) -> None:
        """Ask in the background until the tier answers again. Requests never serve as probes."""
        while not self._closing.wait(self._probe_seconds):
            _, error = attempt(lambda: self.tier.contains([PROBE_KEY]))
            if error is None:
                self.breaker.succeeded()
                self._said_full = False
                self._spare_from = 0.0
                self._metrics.breaker_changed(self.name, is_open=False)
                logger.info("tier %s is back", self.name)
                return

    def stats(self) -> dict[str, Any]:
        """What the API shows of this tier. Asks the backend, but waits for it a moment only."""
        held = None if self.breaker.is_open else self._ask_size()
        return {
            "name": self.name,
            "kind": self.tier.kind,
            "where": self.tier.describe(),
            "codec": self.codec.name,
            "up": not self.breaker.is_open,
            "state": self.state,
            "entries": held.entries if held else None,
            "used_bytes": held.used_bytes if held else None,
            "budget_bytes": held.budget_bytes if held else None,
            "queued_bytes": self.queued_bytes,
            "dropped_writes": self.num_dropped,
        }

    def _ask_size(self) -> TierStats | None:
        """What the backend last said it holds. The server's one thread calls this: a backend that hangs costs it
        ``_SIZE_SECONDS`` once, not its deadline with every call."""
        with self._lock:
            if self._asking_size is not None:
                return self._size
            answered = self._asking_size = threading.Event()
        self._lookups.submit(partial(self._take_size, answered))
        answered.wait(_SIZE_SECONDS)
        return self._size

    def _take_size(self, answered: threading.Event) -> None:
        self._size, _ = attempt(self.tier.stats)
        with self._lock:
            self._asking_size = None
        answered.set()

    def end(self) -> None:
        """Let queued work end, then the threads. Does not wait."""
        self._closing.set()
        for workers in self._workers:
            workers.end()

    def close(self, deadline: float) -> None:
        """After ``end``: wait for the threads until ``deadline`` (monotonic), then close the tier."""
        for workers in self._workers:
            workers.join(deadline)
        self.tier.close()
