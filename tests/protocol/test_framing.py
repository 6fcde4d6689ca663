"""Nothing that arrives makes the decoder do anything but decode or refuse."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstrata.errors import ProtocolError
from kvstrata.protocol import messages as m
from kvstrata.protocol.framing import MAX_MESSAGE_BYTES, MAX_PARTS, decode_reply, decode_request, encode
from kvstrata.types import Hit, KVLayout, MissReason, Namespace, Piece, Prefix, Slot

LAYOUT = KVLayout(16, (100, 200), "bfloat16", "amx")
SPACE = Namespace("vllm", "org/model", "fp", "auto", 2, "tp2", 256, LAYOUT)
PIECE = Piece(b"h" * 32, b"p" * 32, 256, 256, b"t" * 32)
HIT = Hit(
    num_tokens=256,
    pieces=(PIECE,),
    offsets=((4096,), (8192,)),
    pool_id="pool",
    tokens_by_tier={"l1": 256},
    miss_reason=MissReason.EVICTED,
)
MESSAGES: list[m.Message] = [
    m.Hello(m.PROTOCOL_VERSION, "session", "vllm worker 0"),
    m.Register(SPACE),
    m.Lookup("r", b"f" * 32, Prefix(b"h" * 64, b"r" * 32, 35, b"0" * 32)),
    m.Lookup("r", b"f" * 32, Prefix(b"h" * 64, b"r" * 32, 35, b"0" * 32), traceparent="00-a-b-01"),
    m.Release("r"),
    m.Reserve(b"f" * 32, 1, (PIECE,)),
    m.Reserve(b"f" * 32, 1, (PIECE,), ("00-a-b-01",)),
    m.Commit(0, (b"h" * 32,)),
    m.Abort(0, (b"h" * 32,)),
    m.Fetch("r", 0, b"f" * 32, (b"h" * 32,)),
    m.ReportPrefill(b"f" * 32, 1000, 0.5),
    m.ReportMove(True, 1 << 20, 0.01),
    m.Clear(),
    m.Clear(b"f" * 32, tiers=False),
    m.ListKeys("vllm@", 10),
    m.GetStats(),
    m.Ping(),
    m.Goodbye(),
    m.Welcome("1.0", "pool", "/run/pool.sock", 256),
    m.LookupReply(HIT),
    m.LookupReply(Hit(pending=True)),
    m.Reserved((Slot(4096, 100), None), "pool"),
    m.Fetched(True),
    m.Cleared(3),
    m.Keys(("a", "b")),
    m.Stats({"l1": {"entries": 1}, "tiers": []}),
    m.Done(),
    m.UnknownSession(),
    m.Refused("because"),
]
REQUESTS, REPLIES = get_args(m.Request), get_args(m.Reply)


def parts_of(message: m.Message, sequence: int = 7) -> list[memoryview]:
    return [memoryview(part) for part in encode(sequence, message, [b"payload"])]


def test_every_message_has_an_example() -> None:
    assert {type(message) for message in MESSAGES} == {*REQUESTS, *REPLIES}
    assert set(m.ANSWERED) <= set(REQUESTS)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_sent(message: m.Message) -> None:
    decode = decode_request if isinstance(message, REQUESTS) else decode_reply
    sequence, decoded, payloads = decode(parts_of(message))
    assert (sequence, decoded, [bytes(p) for p in payloads]) == (7, message, [b"payload"])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_request_is_no_reply_and_the_other_way_round(message: m.Message) -> None:
    decode = decode_reply if isinstance(message, REQUESTS) else decode_request
    with pytest.raises(ProtocolError):
        decode(parts_of(message))


def attempt(parts: list[bytes]) -> None:
    """Decoding ends in a message or in a ProtocolError."""
    views = [memoryview(part) for part in parts]
    for decode in (decode_request, decode_reply):
        try:
            sequence, message, payloads = decode(views)
        except ProtocolError:
            continue
        assert 0 <= sequence < 2**64
        assert isinstance(message, m.Message)
        assert len(payloads) == len(parts) - 2


@given(st.lists(st.binary(max_size=64), max_size=5))
@example([])
@example([b""])
@example([b"\0" * 8])
@example([b"\0" * 8, b""])
@example([b"\0" * 8, b"\x82\xa4type\xa8ListKeys\xa6prefix\xa2\xff\xfe"])  # not UTF-8
@example([b"\0" * 8, b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 200_000 + b"\x01"])  # deep
@example([b"\0" * 8, b"\x82\xa4type\xa4Ping\xa1x" + b"\xdd\xff\xff\xff\xff"])  # announces 4 Gi items
@example([b"\0" * 8, b"\xc9\xff\xff\xff\xff\x01"])
def test_arbitrary_parts(parts: list[bytes]) -> None:
    attempt(parts)


@given(st.binary(max_size=200))
def test_an_arbitrary_message_part(data: bytes) -> None:
    attempt([b"\0" * 8, data])


json_like = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)


@given(
    st.sampled_from([type(message).__name__ for message in MESSAGES] + ["Nothing"]),
    st.dictionaries(
        st.sampled_from(
            ["version", "namespace", "prefix", "shard", "pieces", "hit", "slots", "request_id", "x"]
        ),
        json_like,
    ),
)
def test_messages_with_arbitrary_fields(tag: str, fields: dict[str, object]) -> None:
    attempt([b"\0" * 8, msgspec.msgpack.encode({"type": tag, **fields})])


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages(message: m.Message, data: st.DataObject) -> None:
    part = bytearray(encode(0, message)[1])
    for _ in range(data.draw(st.integers(1, 4))):
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    attempt([b"\0" * 8, bytes(part[: data.draw(st.integers(0, len(part)))])])
    attempt([b"\0" * 8, bytes(part)])


def test_limits() -> None:
    ping = encode(0, m.Ping())
    with pytest.raises(ProtocolError, match="limit"):
        decode_request([memoryview(b"\0" * 8), memoryview(bytes(MAX_MESSAGE_BYTES + 1))])
    with pytest.raises(ProtocolError, match="parts"):
        decode_request([memoryview(part) for part in [*ping, *[b""] * MAX_PARTS]])
    decode_request([memoryview(part) for part in [*ping, *[b""] * (MAX_PARTS - 2)]])


def test_fields_of_a_later_version_are_passed_over() -> None:
    later = msgspec.msgpack.encode({"type": "Ping", "colour": "green", "more": {"a": [1, 2]}})
    assert decode_request([memoryview(b"\0" * 8), memoryview(later)])[1] == m.Ping()


class _OldLookup(msgspec.Struct, frozen=True, tag="Lookup", omit_defaults=True):
    """As it was before requests could be traced."""

    request_id: str
    namespace: bytes
    prefix: Prefix
    first_token: int = 0


def test_a_peer_that_knows_no_traces_is_understood_and_understands() -> None:
    prefix = Prefix(b"h" * 64, b"", 32, b"0" * 32)
    new = m.Lookup("r", b"f" * 32, prefix, 16, "00-a-b-01")
    old = _OldLookup("r", b"f" * 32, prefix, 16)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=_OldLookup) == old
    parts = [memoryview(b"\0" * 8), memoryview(msgspec.msgpack.encode(old))]
    assert decode_request(parts)[1] == m.Lookup("r", b"f" * 32, prefix, 16)
    untraced = m.Lookup("r", b"f" * 32, prefix, 16)
    assert msgspec.msgpack.encode(untraced) == msgspec.msgpack.encode(old), "nothing more goes over the wire"
