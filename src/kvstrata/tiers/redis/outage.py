"""Whether a server is left alone: one that is lost must not cost every call its deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvstrata.errors import TierUnavailable

log = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
"""From a fault, or from a probe that failed, to the next probe."""
SAY_AGAIN_SECONDS = 60.0
"""A server that comes and goes is not written of more often."""


class Outage:
    """The outages of one server. Thread-safe.

    From a fault until a probe has reached it the server is not asked. A call that meets an outage starts the probe
    when it is time, in a thread that ends with it: calls do not wait for what may hang, and without calls nothing
    is probed.
    """

    def __init__(self, name: str, probe: Callable[[], None]) -> None:
        """``probe`` raises TierUnavailable while the server cannot be reached."""
        self._name = name
        self._probe = probe
        self._lock = threading.Lock()
        self._is_probing = False
        self._probe_at = 0.0
        self._said_at = -SAY_AGAIN_SECONDS
        self.reason = ""
        """Why the server is left alone; empty when it is not."""

    def begin(self, reason: str) -> None:
        """Leave the server alone from now on."""
        now = time.monotonic()
        with self._lock:
            is_news = not self.reason and now >= self._said_at + SAY_AGAIN_SECONDS
            self.reason = reason or "out of order"
            self._probe_at = now + PROBE_SECONDS
            if is_news:
                self._said_at = now
        if is_news:
            log.warning("%s is left alone until it answers again: %s", self._name, reason)

    def is_over(self) -> bool:
        """Whether the server may be asked (there may have been no outage)."""
        with self._lock:
            if not self.reason:
                return True
            if self._is_probing or time.monotonic() < self._probe_at:
                return False
            self._is_probing = True
        try:
            threading.Thread(target=self._run_probe, name="kvstrata-redis-probe", daemon=True).start()
        except RuntimeError:  # no thread can be had now
            self._probed(self.reason)
        return False

    def _run_probe(self) -> None:
        reason = "probing it failed"
        try:
            self._probe()
            reason = ""
        except TierUnavailable as error:
            reason = str(error)
        finally:
            self._probed(reason)
        if not reason:
            log.info("%s answers again", self._name)

    def _probed(self, reason: str) -> None:
        with self._lock:
            self.reason = reason
            self._is_probing = False
            self._probe_at = time.monotonic() + PROBE_SECONDS
