"""Long operations: they run in the background, say how far they are, and can be cancelled."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvstrata.cache.workers import Workers
from kvstrata.errors import BusyError, ConflictError, KVStrataError, NotFoundError
from kvstrata.operations.report import Report

logger = logging.getLogger(__name__)

MAX_WAITING = 16
_CLOSE_SECONDS = 1.0
MAX_ENDED = 100
"""Ended jobs that are remembered."""


class JobCancelled(Exception):
    """Ends the work of a cancelled job. Raised by ``Job.advance``, ``Job.check`` and ``Job.wait``."""


@dataclass(frozen=True)
class JobReport(Report):
    """What is known of a job."""

    id: str
    kind: str
    """What it does: "clear", "delete", "verify" or "warm"."""
    state: str
    """"waiting", "running", "done", "failed" or "cancelled"."""
    num_done: int
    """Entries dealt with so far."""
    num_total: int | None
    """Entries in all; null while that is not known."""
    created_at: float
    """Unix seconds."""
    seconds: float
    """How long it has run."""
    result: dict[str, Any]
    """Figures of the kind; those of a job that did not get to its end are of the part that was done."""
    error: str | None
    """Why it failed."""


class Job:
    """One long operation. Its work calls ``advance`` after each step; anybody may read and cancel it."""

    def __init__(self, kind: str) -> None:
        self.id = secrets.token_hex(8)
        self.kind = kind
        self.state = "waiting"
        self.num_done = 0
        self.num_total: int | None = None
        self.created_at = time.time()
        self.result: dict[str, Any] = {}
        self.error: str | None = None
        self.cancelled = threading.Event()
        self._started_at = self._ended_at = 0.0

    @property
    def is_over(self) -> bool:
        return self.state in {"done", "failed", "cancelled"}

    def advance(self, count: int = 1) -> None:
        """So much more is done.

        Raises:
            JobCancelled: stop here.
        """
        self.num_done += count
        self.check()

    def check(self) -> None:
        """Raises JobCancelled when the job was cancelled."""
        if self.cancelled.is_set():
            raise JobCancelled

    def wait(self, event: threading.Event) -> None:
        """Wait for ``event``, or until the job is cancelled, which raises JobCancelled."""
        while not event.wait(0.05):
            self.check()

    def run(self, work: Callable[[Job], None]) -> None:
        """Do ``work`` to its end, whatever that is."""
        self._started_at = time.monotonic()
        try:
            self.check()
            self.state = "running"
            work(self)
        except JobCancelled:
            outcome = "cancelled"
        except KVStrataError as error:
            outcome, self.error = "failed", str(error)
        except Exception:  # a job's fault must not end the thread of the others
            logger.exception("job %s (%s) failed", self.id, self.kind)
            outcome, self.error = "failed", "internal error; see the server's log"
        else:
            outcome = "done"
        self._ended_at = time.monotonic()
        self.state = outcome
        logger.info("job %s (%s): %s, %d entries", self.id, self.kind, outcome, self.num_done)

    def report(self) -> JobReport:
        """As of now."""
        seconds = (self._ended_at or time.monotonic()) - self._started_at if self._started_at else 0.0
        return JobReport(
            id=self.id,
            kind=self.kind,
            state=self.state,
            num_done=self.num_done,
            num_total=self.num_total,
            created_at=self.created_at,
            seconds=seconds,
            result=dict(self.result),
            error=self.error,
        )


class Jobs:
    """All jobs of a server. One runs at a time, so that operations never take more than one thread of a tier."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._workers: Workers | None = None

    def start(self, kind: str, work: Callable[[Job], None]) -> JobReport:
        """Let ``work`` be done, after the jobs that wait.

        Raises:
            BusyError: as many wait as may.
        """
        job = Job(kind)
        with self._lock:
            if sum(not known.is_over for known in self._jobs.values()) > MAX_WAITING:
                raise BusyError(f"{MAX_WAITING} jobs are waiting already; cancel some, or try again later")
            self._jobs[job.id] = job
            ended = [known.id for known in self._jobs.values() if known.is_over]
            for job_id in ended[: max(0, len(ended) - MAX_ENDED)]:
                del self._jobs[job_id]
            if self._workers is None:
                self._workers = Workers("jobs", 1)
            self._workers.submit(lambda: job.run(work))
        return job.report()

    def get(self, job_id: str) -> JobReport:
        """Raises NotFoundError."""
        return self._find(job_id).report()

    def cancel(self, job_id: str) -> JobReport:
        """Let a job stop at its next step.

        Raises:
            NotFoundError: there is no such job.
            ConflictError: it is over.
        """
        job = self._find(job_id)
        if job.is_over:
            raise ConflictError(f"job {job_id} is over: {job.state}")
        job.cancelled.set()
        return job.report()

    def _find(self, job_id: str) -> Job:
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(f"there is no job {job_id!r}; the last {MAX_ENDED} are remembered")
        return job

    def close(self) -> None:
        """Cancel all jobs and end their thread; a step that hangs in a tier is given up."""
        with self._lock:
            for job in self._jobs.values():
                job.cancelled.set()
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.close(_CLOSE_SECONDS)

    def list(self) -> list[JobReport]:
        """The latest first."""
        with self._lock:
            return [job.report() for job in reversed(self._jobs.values())]
