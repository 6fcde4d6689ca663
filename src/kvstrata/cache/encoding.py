"""Frames of writes that wait for their turn, encoded side by side before it comes."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from functools import partial

from kvstrata.cache.frames import Transfer, encode_frame
from kvstrata.cache.workers import Workers, attempt
from kvstrata.codecs.base import Codec


class Encoding:
    """The frame of one write, made once, by whoever comes first."""

    def __init__(self, transfer: Transfer, codec: Codec) -> None:
        self.error: Exception | None = None
        self.seconds = 0.0
        """How long it took."""
        self._frame: memoryview | None = None
        self._transfer = transfer
        self._codec = codec
        self._claim = threading.Lock()
        """Taken by who makes it, and never given back."""
        self._made = threading.Event()

    def make(self) -> None:
        """Encode, unless that has begun."""
        if not self._claim.acquire(blocking=False):
            return
        started = time.monotonic()
        self._frame, self.error = attempt(partial(encode_frame, self._transfer, self._codec))
        self.seconds = time.monotonic() - started
        self._made.set()

    def result(self) -> memoryview | None:
        """The frame, once it is made, by this call if nobody has begun; None when that failed with ``error``."""
        self.make()
        self._made.wait()
        return self._frame

    def call_off(self) -> None:
        """Nobody begins any more. One that has begun goes on, and reads a slot that may be another's by then: its
        frame is nobody's."""
        self._claim.acquire(blocking=False)


class Encodings:
    """Encodes for one tier what is queued to be written, in the order of the queue.

    At most ``num_threads`` frames are being made, or held until they are written. A codec that encodes nothing has
    no threads: its frames are the slots.
    """

    def __init__(self, name: str, codec: Codec, num_threads: int) -> None:
        self._codec = codec
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[Encoding, Callable[[], bool]]] = collections.deque()
        self._num_ahead = 0
        self._max_ahead = 0 if codec.passthrough else num_threads
        self.workers = Workers(f"{name}-encode", self._max_ahead)

    def now(self, transfer: Transfer) -> Encoding:
        """One that is made when its turn has come."""
        return Encoding(transfer, self._codec)

    def ahead(self, transfer: Transfer, is_wanted: Callable[[], bool]) -> Encoding:
        """One that is made ahead if ``is_wanted`` then. It is queued next, and ``passed`` after its turn."""
        encoding = self.now(transfer)
        if self._max_ahead:
            with self._lock:
                self._waiting.append((encoding, is_wanted))
                self._begin()
        return encoding

    def passed(self, encoding: Encoding) -> None:
        """Its turn is over, made ahead or not. Turns come in order."""
        encoding.call_off()
        if self._max_ahead:
            with self._lock:
                self._num_ahead -= 1
                self._begin()

    def _begin(self) -> None:
        while self._waiting and self._num_ahead < self._max_ahead:
            self._num_ahead += 1
            self.workers.submit(partial(_make_if_wanted, *self._waiting.popleft()))


def _make_if_wanted(encoding: Encoding, is_wanted: Callable[[], bool]) -> None:
    if is_wanted():
        encoding.make()
