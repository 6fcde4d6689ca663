"""A client's side of the socket: requests with deadlines, and a view of whether the server is there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvstrata.errors import ProtocolError
from kvstrata.protocol.framing import Part, decode_reply, encode
from kvstrata.protocol.messages import Message, Reply

logger = logging.getLogger(__name__)

_LINGER_MS = 200

Answer = tuple[Reply, Sequence[memoryview]]


class Channel:
    """One DEALER socket. One thread at a time.

    ZMQ reconnects by itself; a monitor socket tells at once when the connection is lost, so that a request in
    flight to a server that died does not wait for its deadline.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # For addresses only: with it ZMQ takes a name's IPv6 address alone, where a server may listen on the other.
        self._socket.setsockopt(zmq.IPV6, "[" in endpoint)
        # Without a connection nothing is queued: a send is refused at once, and told as such.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        # Often: the first request after a server's return is to find the connection made.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 250)
        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        self._monitor = self._socket.get_monitor_socket(events)
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._sequence = 0
        self._num_connections = 0
        self._is_up = False

    @property
    def connections(self) -> int:
        """How often a connection was made and lost: odd while there is one. Does not wait."""
        while self._monitor.poll(0):
            self._take_event()
        return 2 * self._num_connections - self._is_up

    def _take_event(self) -> None:
        event = recv_monitor_message(self._monitor)["event"]
        self._is_up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        self._num_connections += self._is_up

    def tell(self, message: Message, payloads: Sequence[Part] = ()) -> int:
        """Send without waiting; the message's sequence number, or 0 when there is nobody to send to."""
        self._sequence += 1
        try:
            self._socket.send_multipart(encode(self._sequence, message, payloads), zmq.NOBLOCK)
        except zmq.Again:
            return 0
        return self._sequence

    def answer_to(self, sequence: int) -> Answer | None:
        """The reply to an earlier message if it is here. Does not wait."""
        while self._socket.poll(0):
            answer = self._receive(sequence)
            if answer is not None:
                return answer
        return None

    def ask(self, message: Message, timeout_seconds: float) -> Answer | None:
        """Send and wait for the reply; None when none came in time, or the connection was lost."""
        deadline = time.monotonic() + timeout_seconds
        before = self.connections
        sequence = self.tell(message)
        if not sequence:
            return None
        while (left := deadline - time.monotonic()) > 0:
            ready = dict(self._poller.poll(math.ceil(left * 1000)))
            if self._socket in ready:
                answer = self._receive(sequence)
                if answer is not None:
                    return answer
            elif self._monitor in ready and self.connections != before:
                return None
        return None

    def _receive(self, sequence: int) -> Answer | None:
        """The next reply if it answers ``sequence``; replies to requests that were given up are dropped."""
        frames = self._socket.recv_multipart(copy=False)
        try:
            number, reply, payloads = decode_reply([frame.buffer for frame in frames])
        except ProtocolError as error:
            logger.warning("%s sent something else than a reply: %s", self.endpoint, error)
            return None
        return (reply, payloads) if number == sequence else None

    def close(self) -> None:
        """End the connection; what was said last still goes out, if that takes a moment only."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=_LINGER_MS)
