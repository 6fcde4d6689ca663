"""From an endpoint to a connection that is logged in."""

from __future__ import annotations

import ssl
import time

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, command
from kvstrata.tiers.sockets import connecting


def log_in(
    endpoint: Endpoint, context: ssl.SSLContext | None, timeout_seconds: float, *, role: str = ""
) -> Connection:
    """A connection on which AUTH, SELECT and PING went well, all within ``timeout_seconds``.

    With ``role`` ("master", "slave") the server must have it, where the user may ask it with ROLE.

    Raises:
        TierUnavailable: there is nobody, it is not trusted, refuses, or is late.
    """
    name = endpoint.describe()
    deadline = time.monotonic() + timeout_seconds
    with connecting(name):
        sock = endpoint.connect(context, timeout_seconds)
    connection = Connection(sock, name)
    try:
        connection.start(deadline - time.monotonic())
        _greet(connection, endpoint, role)
    except BaseException:
        connection.close()
        raise
    return connection


def _greet(connection: Connection, endpoint: Endpoint, role: str) -> None:
    commands = []
    if endpoint.password or endpoint.username:
        user = [endpoint.username.encode()] if endpoint.username else []
        commands.append(command(b"AUTH", *user, endpoint.password.encode()))
    if endpoint.db:
        commands.append(command(b"SELECT", b"%d" % endpoint.db))
    commands.append(command(b"PING"))
    connection.send([*commands, *([command(b"ROLE")] if role else [])])
    for reply in [connection.reply() for _ in commands]:
        if isinstance(reply, ErrorReply):
            raise TierUnavailable(f"{endpoint.describe()}: refused: {masked(endpoint, reply.text)}")
    if role:
        _check_role(endpoint, connection.reply(), role)


def _check_role(endpoint: Endpoint, reply: Reply, role: str) -> None:
    match reply:
        case ErrorReply():
            return  # the user may not ask; a master that is none any more answers READONLY to writes
        case [bytes() as found, *_] if found.decode("ascii", "replace") == role:
            return
        case [bytes() as found, *_]:
            is_now = found.decode("ascii", "replace")[:20]
            raise TierUnavailable(f"{endpoint.describe()}: its role is {is_now}, {role} was expected")
        case _:
            raise TierUnavailable(f"{endpoint.describe()}: the server broke the protocol: ROLE gave no role")


def masked(endpoint: Endpoint, text: str) -> str:
    """``text`` of the server without the password, which some servers and proxies repeat."""
    return text.replace(endpoint.password, "***") if endpoint.password else text
