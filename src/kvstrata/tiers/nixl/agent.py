"""One NIXL agent with one file backend: bytes between memory and open files.

Written against NIXL 1.5.1, on its Python API (``nixl_agent``).
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from kvstrata import plugins
from kvstrata.errors import ConfigError, TierUnavailable
from kvstrata.tiers.arena import Arena, TransferStuckError

_BUILDS = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
"""The builds of NIXL. The package ``nixl`` chooses one of them, and imports torch for that."""
_NAME = "kvstrata"
_POLL_SECONDS = 0.0002


def load() -> Any:
    """The module with ``nixl_agent``.

    Raises:
        PluginError: no build of NIXL is installed, or it cannot be loaded.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    installed = [name for name in _BUILDS if importlib.util.find_spec(name) is not None]
    return plugins.library(installed[0] if installed else "nixl", "nixl")


class Agent:
    """Thread-safe, by a lock around every call of the library, which by default locks nothing itself: four threads
    made it end the process. Transfers go on beside each other.
    """

    def __init__(
        self, backend: str, params: Mapping[str, str], buffer_bytes: int, timeout_seconds: float
    ) -> None:
        """Make the agent and its backend, and register the memory that transfers go through.

        Raises:
            ConfigError: there is no such backend, it does not move files, or does not start as configured.
            PluginError: NIXL is missing.
        """
        nixl = load()
        self._backend = backend
        self._timeout_seconds = timeout_seconds
        self._stuck: list[Any] = []
        self._lock = threading.Lock()
        self.arena = Arena(buffer_bytes, "buffer_bytes")
        try:
            self._agent = nixl.nixl_agent(
                _NAME, nixl.nixl_agent_config(enable_prog_thread=False, backends=[])
            )
            self._check_backend()
            self._agent.create_backend(backend, dict(params))
            self._memory = self._agent.register_memory(
                [(self.arena.address, buffer_bytes, 0, "")], "DRAM", backends=[backend]
            )
        except ConfigError:
            raise
        except Exception as error:  # its exceptions have no common base but this one
            raise ConfigError(
                f"NIXL's backend {backend!r} does not start with {dict(params)!r}: {error!r}"
            ) from error

    def _check_backend(self) -> None:
        fit = [
            name
            for name in self._agent.get_plugin_list()
            if {"DRAM_SEG", "FILE_SEG"} <= set(self._agent.get_plugin_mem_types(name))
        ]
        if self._backend not in fit:
            raise ConfigError(
                f"backend of the nixl tier is {self._backend!r}; this build of NIXL moves files with"
                f" {', '.join(sorted(fit))}"
            )

    def read(self, fd: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from the start of a file.

        Raises:
            TierUnavailable: NIXL reports an error, or did not end in time.
        """
        with self.arena.lend([len(buffer)], self._timeout_seconds) as [(address, memory)]:
            self._transfer("READ", fd, address, len(buffer))
            buffer[:] = memory

    def write(self, fd: int, frame: memoryview) -> None:
        """Write ``frame`` to the start of a file.

        Raises:
            TierUnavailable: NIXL reports an error, or did not end in time.
        """
        with self.arena.lend([len(frame)], self._timeout_seconds) as [(address, memory)]:
            memory[:] = frame
            self._transfer("WRITE", fd, address, len(frame))

    def _transfer(self, operation: Literal["READ", "WRITE"], fd: int, address: int, size: int) -> None:
        agent, backends = self._agent, [self._backend]
        file, handle = None, None
        # Of its own: a transfer that is stuck must not find another file under the number that its caller closed.
        own = os.dup(fd)
        try:
            with self._lock:
                file = agent.register_memory([(0, size, own, "")], "FILE", backends=backends)
                handle = agent.initialize_xfer(
                    operation,
                    agent.get_xfer_descs([(address, size, 0)], "DRAM"),
                    agent.get_xfer_descs([(0, size, own)], "FILE"),
                    _NAME,
                    backends=backends,
                )
                state = agent.transfer(handle)
            self._wait(handle, state, operation)
        except TransferStuckError:
            file, handle, own = None, None, -1  # all stay
            raise
        except TierUnavailable:
            raise
        except Exception as error:
            raise TierUnavailable(f"NIXL's {self._backend} {operation} failed: {error!r}") from error
        finally:
            with self._lock:
                if handle is not None:
                    agent.release_xfer_handle(handle)
                if file is not None:
                    agent.deregister_memory(file, backends=backends)
            if own >= 0:
                os.close(own)

    def _wait(self, handle: Any, state: str, operation: str) -> None:
        """Poll, which is what makes a transfer go on, until it has ended."""
        deadline = time.monotonic() + self._timeout_seconds
        while state == "PROC":
            if time.monotonic() > deadline:
                self._stuck.append(handle)  # releasing it would free what the backend still writes to
                raise TransferStuckError(
                    f"NIXL's {self._backend} {operation} did not end in {self._timeout_seconds:g} s"
                )
            time.sleep(_POLL_SECONDS)
            with self._lock:
                state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise TierUnavailable(f"NIXL's {self._backend} {operation} ended with {state}")

    def close(self) -> None:
        """Give the memory back. With a transfer that is stuck everything stays until the process ends."""
        if self._stuck:
            return
        memory, self._memory = self._memory, None
        if memory is not None:
            self._agent.deregister_memory(memory, backends=[self._backend])
