"""Handing the L1 pool to the processes of this host: its descriptor, over a unix socket.

A client connects and gets one message: ``<4sHHQ`` (magic, version, length of the pool's id, size of the pool
in bytes), then the pool's id in UTF-8, and with it the descriptor (``SCM_RIGHTS``). It sends one message: the
name of its session. The connection then stays open for as long as the client may write to the pool: the
kernel closes it when the last process that holds it ends, however that happens and in whatever PID namespace
it lives, so its end is the proof that a slot may be given to somebody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from kvstrata.errors import PoolError
from kvstrata.memory.region import SharedRegion

_log = logging.getLogger(__name__)

_MAGIC = b"KVSP"
_VERSION = 1
_HEADER = struct.Struct("<4sHHQ")
_MAX_MESSAGE_BYTES = 1024
_MAX_PATH_BYTES = 107  # of sun_path
_DESCRIPTOR = struct.Struct("i")
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


class PoolServer:
    """Listens on a unix socket and gives each client of our user, or of root, the pool's descriptor.

    Nothing here blocks: the message is small enough for the socket's buffer, and nothing is waited for.
    So the caller needs no thread: it polls ``fileno()`` for reading and then calls ``serve_one``.
    """

    def __init__(self, path: str | os.PathLike[str], region: SharedRegion, pool_id: str) -> None:
        """Listen at ``path``. Its directory is made (0700) where it is missing.

        Raises:
            PoolError: another server listens there, or the path cannot be used.
        """
        self.path = Path(path)
        self._fd = region.fd
        identity = pool_id.encode()
        self._message = _HEADER.pack(_MAGIC, _VERSION, len(identity), region.size_bytes) + identity
        if len(self._message) > _MAX_MESSAGE_BYTES:
            raise PoolError(f"a pool id of {len(identity)} bytes is too long")
        self._socket = _listen(self.path)
        self._inode = self.path.stat().st_ino

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._socket.fileno()

    def serve_one(self) -> socket.socket | None:
        """Answer one waiting client; the connection, if there was one that got the pool. Never blocks.

        The connection is non-blocking and the caller's to keep: it becomes readable when the client says its
        session's name (:func:`read_session`), and when it has ended.
        """
        try:
            client, _ = self._socket.accept()
        except OSError:  # it went away, or none is there
            return None
        client.setblocking(False)
        uid = _peer_uid(client)
        if _trusted(uid):
            try:
                socket.send_fds(client, [self._message], [self._fd])
            except OSError:  # it did not wait for the answer
                client.close()
                return None
            return client
        _log.warning("a process of user %d asked for the L1 pool and was refused", uid)
        client.close()
        return None

    def close(self) -> None:
        """Stop listening and remove the socket's file, if it still is ours. Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def read_session(connection: socket.socket) -> str | None:
    """What a readable connection of :meth:`PoolServer.serve_one` says; None when its client is gone."""
    try:
        message = connection.recv(_MAX_MESSAGE_BYTES)
    except BlockingIOError:
        return ""
    except OSError:
        return None
    return message.decode("utf-8", "replace") if message else None


class PoolHandle(NamedTuple):
    """What a client got: close ``connection`` only after the pool is unmapped."""

    fd: int
    size_bytes: int
    pool_id: str
    connection: socket.socket


def fetch_pool(path: str | os.PathLike[str], session: str, timeout_seconds: float) -> PoolHandle:
    """Ask the server at ``path`` for its pool, for the session of that name. The caller owns what it gets.

    Raises:
        PoolError: nobody answers there in time, the server is another user's, or speaks another version.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        fd, size_bytes, pool_id = _fetch(connection, path, session, timeout_seconds)
    except PoolError:
        connection.close()
        raise
    return PoolHandle(fd, size_bytes, pool_id, connection)


def _fetch(
    connection: socket.socket, path: str | os.PathLike[str], session: str, timeout_seconds: float
) -> tuple[int, int, str]:
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(str(path))
        uid = _peer_uid(connection)
        if not _trusted(uid):
            raise PoolError(f"the L1 pool at {path} belongs to user {uid}, neither ours nor root's")
        message, fds = _receive(connection)
    except OSError as error:
        raise PoolError(f"no L1 pool can be had at {path}: {error}") from error
    try:
        size_bytes, pool_id = _parse(message, len(fds))
        connection.send(session.encode())
    except (OSError, PoolError) as error:
        for fd in fds:
            os.close(fd)
        raise PoolError(f"no L1 pool can be had at {path}: {error}") from error
    return fds[0], size_bytes, pool_id


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    # Not socket.recv_fds: in Python 3.11 it drops the flags, and children would inherit the descriptor.
    room = socket.CMSG_SPACE(_DESCRIPTOR.size)
    message, ancillary, _, _ = connection.recvmsg(_MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = [
        fd
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (fd,) in _DESCRIPTOR.iter_unpack(data[: len(data) - len(data) % _DESCRIPTOR.size])
    ]
    return message, fds


def _parse(message: bytes, num_fds: int) -> tuple[int, str]:
    if not message:
        raise PoolError("the server refused to hand its L1 pool over")
    if len(message) < _HEADER.size or message[:4] != _MAGIC:
        raise PoolError("what answered is no server of an L1 pool")
    _, version, id_bytes, size_bytes = _HEADER.unpack_from(message)
    if version != _VERSION or num_fds != 1 or len(message) != _HEADER.size + id_bytes:
        raise PoolError(f"the server hands its L1 pool over by version {version}; this is {_VERSION}")
    return size_bytes, message[_HEADER.size :].decode("utf-8", "replace")


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise PoolError(f"the socket's path is longer than {_MAX_PATH_BYTES} bytes: {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        # Who connects in between is still checked by user in serve_one.
        path.chmod(0o600)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = f"{error.strerror or error}; set runtime_dir to a directory of this user"
        raise PoolError(f"cannot hand the L1 pool over at {path}: {reason}") from error
    except PoolError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that died; refuse to touch one that lives, or anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PoolError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # its backlog is full: it lives
            pass
    raise PoolError(
        f"another kvstrata server is running: it hands its L1 pool over at {path}; "
        "choose another port (--port) or another runtime_dir"
    )


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(credentials)[1]
    return uid


def _trusted(uid: int) -> bool:
    return uid in {0, os.geteuid()}
