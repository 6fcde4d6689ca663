"""Hostile, slow and many clients; and how a remote server ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from raw_client import EXIST, KEY, LIST, PUT, RawClient

from kvstrata.remote.server import raise_descriptor_limit
from kvstrata.remote.service import InFlight
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.lm import LmOptions, LmTier, wire
from kvstrata.types import Miss

MESSAGE_SECONDS = 1.0


@pytest.fixture(scope="module")
def strict_server() -> Iterator[RemoteServerThread]:
    """Little memory, little patience."""
    options = {"max_bytes": 8 << 20, "max_frame_bytes": 2 << 20, "message_seconds": MESSAGE_SECONDS}
    with RemoteServerThread(**options) as server:
        yield server


def greet(client: RawClient) -> None:
    client.sock.sendall(wire.hello_request(bytes(16)))
    assert client.reply()[0] == 200
    client.take(wire.HELLO_BYTES)


def settled(server: RemoteServerThread, num_connections: int = 0) -> bool:
    """Whether all clients but those are gone, and their memory is given back, within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        store = server.service.store
        held = sum(-(-(entry.size + 128) // 4096) * 4096 for entry in store.entries)
        if server.service.counters.connections == num_connections and store.used_bytes == held:
            return server.service.in_flight._free == server.service.in_flight.max_bytes
        time.sleep(0.01)
    return False


CALL = struct.Struct("<BBHIIIQQ")
MALFORMED_CALLS = {
    "no such verb": CALL.pack(99, 0, 0, 0, 0, 0, 0, 0),
    "flags": CALL.pack(17, 1, 0, 0, 0, 0, 0, 0),
    "too many keys": CALL.pack(17, 0, 0, 2**32 - 1, 0, 0, 0, 0),
    "too many bytes of keys": CALL.pack(17, 0, 0, 1, 2**32 - 1, 0, 0, 0),
    "a key longer than its list": CALL.pack(17, 0, 0, 1, 6, 0, 0, 0) + struct.pack("<IH", 0, 65535),
    "a list that ends within a key": CALL.pack(17, 0, 0, 1, 3, 0, 0, 0) + b"abc",
    "another number of keys": CALL.pack(20, 0, 0, 2, 7, 0, 0, 0) + struct.pack("<IH", 0, 1) + b"k",
    "no key to write": CALL.pack(19, 0, 0, 0, 0, 0, 10, 0),
    "a payload to look up": CALL.pack(17, 0, 0, 0, 0, 0, 2**63, 0),
    "a proof that nobody wants": CALL.pack(16, 0, 0, 0, 0, 0, 32, 0) + bytes(32),
    "a long proof": CALL.pack(16, 0, 0, 0, 0, 0, 2**40, 0),
}


@pytest.mark.parametrize("name", MALFORMED_CALLS)
def test_malformed_calls_are_refused_with_a_reason(strict_server: RemoteServerThread, name: str) -> None:
    with RawClient(strict_server.port) as client:
        greet(client)
        client.sock.sendall(MALFORMED_CALLS[name])
        answer = wire.Answer.unpack(client.take(wire.ANSWER_BYTES))
        assert answer.status == wire.Status.REFUSED
        assert client.take(answer.body_bytes).decode()
        assert client.is_hung_up_on()
    assert settled(strict_server)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n" * 20, os.urandom(1000), b"\0" * 200, b"\xff" * 200]
)
def test_garbage_is_hung_up_on(strict_server: RemoteServerThread, garbage: bytes) -> None:
    with RawClient(strict_server.port) as client:
        client.sock.sendall(garbage)
        assert client.is_hung_up_on()
    assert settled(strict_server)


def test_a_write_of_any_announced_length_allocates_nothing_above_the_limit(
    strict_server: RemoteServerThread,
) -> None:
    before = strict_server.service.store.used_bytes
    with RawClient(strict_server.port) as plain, RawClient(strict_server.port) as extended:
        plain.request(PUT, KEY, 2**31 - 1)
        greet(extended)
        key = struct.pack("<IH", 0, 1) + b"k"
        extended.sock.sendall(CALL.pack(19, 0, 0, 1, len(key), 0, 2**62, 0) + key)
        for client in (plain, extended):
            client.sock.sendall(bytes(100_000))
        assert strict_server.service.store.used_bytes == before
    assert settled(strict_server)


def test_half_messages_and_endless_slowness_are_hung_up_on(strict_server: RemoteServerThread) -> None:
    """A byte now and then does not buy more time."""
    head = struct.pack("iiiiiiiii150s", PUT, 1_000_000, 1, 2, 0, 0, 0, 0, 0, KEY.encode())
    call = CALL.pack(19, 0, 0, 1, 7, 0, 1_000_000, 0) + struct.pack("<IH", 0, 1) + b"k"
    greeting = wire.hello_request(bytes(16))
    starts = [head[:1], head[:185], head + b"x", greeting + call[:20], greeting + call + b"x"]
    clients = [RawClient(strict_server.port) for _ in starts]
    with contextlib.ExitStack() as stack:
        for client, start in zip(clients, starts, strict=True):
            stack.enter_context(client)
            client.sock.sendall(start)
        gone: set[int] = set()
        deadline = time.monotonic() + 20
        while len(gone) < len(clients) and time.monotonic() < deadline:
            time.sleep(0.05)
            for number, client in enumerate(clients):
                try:
                    client.sock.sendall(b"x" if number not in gone else b"")
                    client.sock.settimeout(0.001)
                    while client.sock.recv(1000):
                        pass
                    gone.add(number)
                except TimeoutError:
                    continue
                except OSError:
                    gone.add(number)
        assert len(gone) == len(clients)
    assert settled(strict_server)


def test_a_client_that_does_not_read_is_hung_up_on_and_holds_no_memory(
    strict_server: RemoteServerThread,
) -> None:
    with RawClient(strict_server.port) as writer, RawClient(strict_server.port) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.put(KEY, bytes(2_000_000))
        assert writer.healthy()
        for _ in range(8):
            client.request(2)
        assert settled(strict_server, 1)
        assert writer.exists(KEY)


def test_many_slow_writers_leave_room_for_readers_and_the_entries_that_are_there() -> None:
    """What is being received is bounded: it cannot evict the rest."""
    options = {"max_frame_bytes": 4 << 20, "message_seconds": 2.0, "min_bytes_per_second": 1 << 40}
    with RemoteServerThread(max_bytes=64 << 20, **options) as server:
        keys = make_keys(30)
        with contextlib.closing(LmTier(LmOptions(url=server.url))) as tier, contextlib.ExitStack() as stack:
            tier.write(keys, [make_frame(1_000_000, seed) for seed in range(30)])
            slow = [stack.enter_context(RawClient(server.port)) for _ in range(40)]
            for number, client in enumerate(slow):
                client.request(PUT, f"m@1@0@{number:x}@half", 4 << 20)
                client.sock.sendall(b"x")
            time.sleep(0.1)
            assert server.service.store.used_bytes <= 30 * 1_003_520 + (16 << 20) + 4 * 4096
            assert all(tier.contains(keys))
            assert not any(isinstance(result, Miss) for result in read_frames(tier, keys))
            for client in slow[4:]:
                client.sock.close()
            tier.write(keys[:1], [make_frame(2_000_000)])  # it waits for its turn
            assert read_frames(tier, keys[:1]) == [bytes(make_frame(2_000_000))]


def test_lists_of_keys_of_all_calls_together_are_bounded_and_short_ones_do_not_wait() -> None:
    keys = make_keys(30_000)
    body = wire.pack_keys([key.encode() for key in keys])
    long_list = CALL.pack(17, 0, 0, 1, wire.MAX_KEYS_BYTES, 0, 0, 0)
    with RemoteServerThread(message_seconds=5.0) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(RawClient(server.port)) for _ in range(8)]
        for client in slow:
            greet(client)
            client.sock.sendall(long_list + b"x")
        room = server.service.keys_in_flight
        wait_until(lambda: len(room._waiting) == 5, "three are being received, the others wait")
        assert 0 <= room._free < wire.MAX_KEYS_BYTES
        with contextlib.closing(LmTier(LmOptions(url=server.url))) as tier:
            tier.write(keys[:1], [make_frame(1000)])
            assert tier.contains(keys[:2]) == [True, False]
        last = stack.enter_context(RawClient(server.port))
        greet(last)
        last.sock.sendall(CALL.pack(17, 0, 0, len(keys), len(body), 0, 0, 0) + body)
        for client in slow:
            client.sock.close()
        answer = wire.Answer.unpack(last.take(wire.ANSWER_BYTES))
        assert last.take(answer.body_bytes) == b"\x01" + bytes(len(keys) - 1)
        wait_until(lambda: room._free == room.max_bytes, "all of it is given back")


def test_a_list_of_keys_that_finds_no_room_in_time_is_refused() -> None:
    with RemoteServerThread(message_seconds=0.2, min_bytes_per_second=1 << 20) as server:
        room = server.service.keys_in_flight
        with contextlib.ExitStack() as stack:
            for number in range(4):
                client = stack.enter_context(RawClient(server.port))
                greet(client)
                client.sock.sendall(CALL.pack(17, 0, 0, 1, wire.MAX_KEYS_BYTES, 0, 0, 0))
                taken = min(number + 1, 3) * wire.MAX_KEYS_BYTES
                wait_until(lambda taken=taken: room.max_bytes - room._free > taken, "it has its room")
            answer = wire.Answer.unpack(client.take(wire.ANSWER_BYTES))
            assert answer.status == wire.Status.REFUSED
            assert b"fewer at once" in client.take(answer.body_bytes)
            assert client.is_hung_up_on()
        assert settled(server)
        assert room._free == room.max_bytes


def test_lists_of_all_keys_count_as_well() -> None:
    """A client that asks for all of them and does not read holds them in memory meanwhile."""
    keys = make_keys(1000, "m" * 5000)
    with RemoteServerThread() as server, contextlib.closing(LmTier(LmOptions(url=server.url))) as tier:
        tier.write(keys, [make_frame(10)] * 1000)
        room = server.service.keys_in_flight
        with RawClient(server.port) as slow:
            slow.request(LIST)
            wait_until(lambda: room.max_bytes - room._free > 5_000_000, "it has its room")
            head = slow.reply()
            assert sorted(slow.take(head[1]).split(b"\n")) == sorted(key.encode() for key in keys)
        wait_until(lambda: room._free == room.max_bytes, "it is given back")


@pytest.mark.parametrize("token", [b"", b"secret"])
def test_two_thousand_connections(token: bytes) -> None:
    raise_descriptor_limit()
    with RemoteServerThread(token=token) as server, contextlib.ExitStack() as stack:
        threads = threading.active_count()
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(2000)]
        if token:
            with contextlib.closing(LmTier(LmOptions(url=server.url))) as tier:
                tier.write(make_keys(2), [make_frame(1000)] * 2)
                assert tier.contains(make_keys(3)) == [True, True, False]
            return
        assert threading.active_count() == threads
        for number, client in enumerate(clients):
            client.request(PUT, f"m@1@0@{number:x}@half", 5)
            client.sock.sendall(b"%5d" % number)
        for number, client in enumerate(clients):
            head, value = client.get(f"m@1@0@{number:x}@half")
            assert (head[0], value) == (200, b"%5d" % number)
        assert server.service.counters.connections == 2000


def test_connections_beyond_the_limit_are_refused() -> None:
    with RemoteServerThread(max_connections=3) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(3)]
        assert all(client.healthy() for client in clients)
        assert stack.enter_context(RawClient(server.port)).is_hung_up_on()
        clients[0].sock.close()
        assert settled(server, 2)
        assert stack.enter_context(RawClient(server.port)).healthy()


def test_who_does_not_show_the_token_in_time_is_hung_up_on() -> None:
    with RemoteServerThread(token=b"secret", message_seconds=0.3) as server:
        with RawClient(server.port) as silent, RawClient(server.port) as greeting:
            greet(greeting)
            assert silent.is_hung_up_on()
            assert greeting.is_hung_up_on()
        assert settled(server)


def test_the_token_does_not_go_over_the_wire_and_answers_cannot_be_replayed() -> None:
    with (
        RemoteServerThread(token=b"the-secret-token") as server,
        socket.create_server(("127.0.0.1", 0)) as front,
    ):
        seen = bytearray()

        def relay() -> None:
            client, _ = front.accept()
            with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:
                for size_up, size_down in ((186, 64), (64, 56), (32, 24 + 24)):
                    seen.extend(part := client.recv(size_up, socket.MSG_WAITALL))
                    upstream.sendall(part)
                    client.sendall(upstream.recv(size_down, socket.MSG_WAITALL))

        thread = threading.Thread(target=relay)
        thread.start()
        url = f"lm://:the-secret-token@127.0.0.1:{front.getsockname()[1]}"
        with contextlib.closing(LmTier(LmOptions(url=url))) as tier:
            assert tier.stats().entries == 0
        thread.join()
        assert b"secret" not in seen
        with RawClient(server.port) as client:
            client.sock.sendall(seen)
            client.take(64)
            assert wire.Answer.unpack(client.take(wire.ANSWER_BYTES)).status == wire.Status.REFUSED


# -- the end


def test_draining_completes_what_is_in_flight_and_hangs_up_on_the_rest() -> None:
    with (
        RemoteServerThread() as server,
        RawClient(server.port) as writer,
        RawClient(server.port) as reader,
        RawClient(server.port) as idle,
    ):
        data = os.urandom(5_000_000)
        reader.put(KEY, data)
        assert reader.healthy()
        assert idle.healthy()
        writer.request(PUT, "late@1@0@1@half", 1000)
        reader.request(2)
        writer.sock.sendall(b"a" * 500)
        room = server.service.in_flight
        wait_until(lambda: room._free < room.max_bytes, "the server receives what is written")
        assert select.select([reader.sock], [], [], 20)[0], "it sends what is read"
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert idle.is_hung_up_on()
        writer.sock.sendall(b"b" * 500)
        assert writer.is_hung_up_on()
        head = reader.reply()
        assert reader.take(head[1]) == data
        stopping.join()


def test_draining_is_bounded() -> None:
    with RemoteServerThread(drain_seconds=0.2) as server, RawClient(server.port) as client:
        client.request(PUT, KEY, 1000)
        client.sock.sendall(b"half")
        time.sleep(0.1)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 8
        assert client.is_hung_up_on()


def test_a_turn_that_was_given_up_is_passed_over_before_its_task_has_run() -> None:
    async def run() -> None:
        room = InFlight(10)
        assert await room.take(10, 1.0)
        late, next_one = (asyncio.create_task(room.take(6, 5.0)) for _ in range(2))
        await asyncio.sleep(0)
        late.cancel()
        room.give_back(10)  # in the same turn of the loop
        assert await next_one
        with contextlib.suppress(asyncio.CancelledError):
            await late
        room.give_back(6)
        assert await room.take(10, 0.1), "nothing of the bound is lost"

    asyncio.run(run())


def test_exist_after_a_hung_up_put_is_false(strict_server: RemoteServerThread) -> None:
    with RawClient(strict_server.port) as client:
        client.request(PUT, "half@1@0@1@half", 1000)
        client.sock.sendall(bytes(999))
    assert settled(strict_server)
    with RawClient(strict_server.port) as client:
        client.request(EXIST, "half@1@0@1@half")
        assert client.reply()[0] == 400
