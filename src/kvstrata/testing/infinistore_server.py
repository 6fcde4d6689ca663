"""The real InfiniStore server without an RDMA device, for tests: its TCP side with a stand-in for libibverbs.

Wants the package infinistore 0.2.35, a C compiler, and uvloop 0.21 (a newer one has another libuv than InfiniStore
is built with, and ends the server), whose directory the variable INFINISTORE_PYTHONPATH names.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstrata.testing.process import ServerProcess, free_port

PYTHONPATH_VARIABLE = "INFINISTORE_PYTHONPATH"

_VERBS = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
/* One device with one active port and memory that can be registered; nothing can be sent over it. */
static char device[4096], context[65536], domain[64];
static void *devices[2] = {device, 0};
void **ibv_get_device_list(int *count) { if (count) *count = 1; return devices; }
void ibv_free_device_list(void **list) {}
const char *ibv_get_device_name(void *d) { return "none0"; }
void *ibv_open_device(void *d) { return context; }
int ibv_close_device(void *c) { return 0; }
int ibv_query_port(void *c, uint8_t port, void *attributes) {
    char *b = attributes;
    memset(b, 0, 48);
    *(int *)b = 4;              /* state: active */
    *(int *)(b + 4) = 5;        /* max_mtu */
    *(int *)(b + 8) = 5;        /* active_mtu */
    *(uint16_t *)(b + 34) = 1;  /* lid */
    b[46] = 1;                  /* link_layer: InfiniBand */
    return 0;
}
int ibv_query_gid(void *c, uint8_t port, int index, void *gid) { memset(gid, 0, 16); return 0; }
void *ibv_alloc_pd(void *c) { return domain; }
int ibv_dealloc_pd(void *p) { return 0; }
void *ibv_reg_mr(void *pd, void *address, size_t size, int access) { return calloc(1, 128); }
int ibv_dereg_mr(void *region) { free(region); return 0; }
"""

_SERVER = """
import asyncio, sys, uvloop
from infinistore import ServerConfig, register_server
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
loop = asyncio.new_event_loop()
register_server(loop, ServerConfig(manage_port=1, service_port=int(sys.argv[1]), dev_name="none0", prealloc_size=1))
loop.run_forever()
"""


class InfiniStoreServer:
    """A server with a pool of 1 GB, on all interfaces (it cannot be told otherwise). A context manager."""

    def __init__(self) -> None:
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-infinistore-"))
        source, library, log = (self._directory / name for name in ("verbs.c", "libverbs.so", "log"))
        source.write_text(_VERBS)
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler is not None, "no C compiler"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)  # noqa: S603
        self._process = ServerProcess(
            "infinistore",
            [sys.executable, "-c", _SERVER, str(self.port)],
            log_path=log,
            env={"LD_PRELOAD": str(library), "PYTHONPATH": os.environ.get(PYTHONPATH_VARIABLE, "")},
            ready=self._answers,
            grace_seconds=0.1,
        )

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    @property
    def url(self) -> str:
        """For the tier."""
        return f"infinistore://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, or start it anew, empty."""
        self._process.start()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.stop()

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process.running

    def signal(self, number: int) -> None:
        """Send a signal to it (SIGSTOP, SIGCONT)."""
        self._process.kill(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
