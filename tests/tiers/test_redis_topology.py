"""What other servers say of the topology is checked before it is believed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import TierUnavailable
from kvstrata.testing.process import free_port
from kvstrata.tiers import sockets
from kvstrata.tiers.redis import cluster, outage, sentinel
from kvstrata.tiers.redis.cluster import MAX_NODES, ClusterTopology
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.resp import ErrorReply
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.slots import NUM_SLOTS, route_by_slot
from kvstrata.tiers.redis.topology import Again, Ask
from kvstrata.tiers.redis.url import parse_url

LIMITS = Limits(num_connections=1, connect_timeout_seconds=0.2, timeout_seconds=0.2)
REPLIES = st.recursive(
    st.none() | st.integers() | st.binary(max_size=20) | st.text(max_size=20).map(ErrorReply),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def topology() -> Iterator[ClusterTopology]:
    """Of nodes of which none answers."""
    found = ClusterTopology(parse_url(f"redis-cluster://127.0.0.1:{free_port()}"), LIMITS, None)
    found._table = [None] * NUM_SLOTS
    found._refresh_at = float("inf")
    with contextlib.closing(found):
        yield found


@pytest.fixture(scope="module")
def node() -> Server:
    return Server(Endpoint(host="10.0.0.1"), LIMITS, None)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("MOVED 7 10.0.0.2:7000", "10.0.0.2", 7000),
        ("MOVED 7 :7000", "10.0.0.1", 7000),
        ("MOVED 7 ::1:7000", "::1", 7000),
        ("MOVED 7 node.example:7000", "node.example", 7000),
    ],
)
def test_moved(topology: ClusterTopology, node: Server, text: str, host: str, port: int) -> None:
    assert topology.refused(node, ErrorReply(text)) == Again()
    owner = topology._table[7]
    assert owner is not None
    assert (owner.endpoint.host, owner.endpoint.port) == (host, port)


def test_ask_leaves_the_shares_as_they_are(topology: ClusterTopology, node: Server) -> None:
    before = list(topology._table)
    advice = topology.refused(node, ErrorReply("ASK 8 10.0.0.3:7000"))
    assert isinstance(advice, Ask)
    assert advice.server.endpoint.host == "10.0.0.3"
    assert topology._table == before


@given(st.sampled_from(["MOVED", "ASK", "MOVED 1", "ASK 99999"]), st.text(max_size=30))
def test_redirections_of_any_form(topology: ClusterTopology, node: Server, code: str, rest: str) -> None:
    advice = topology.refused(node, ErrorReply(f"{code} {rest}"))
    assert advice is None or isinstance(advice, Again | Ask)
    assert len(topology._table) == NUM_SLOTS


def test_no_more_nodes_than_a_cluster_may_have(node: Server) -> None:
    found = ClusterTopology(parse_url("redis-cluster://127.0.0.1:1"), LIMITS, None)
    found._table = [None] * NUM_SLOTS
    found._refresh_at = float("inf")
    for number in range(MAX_NODES + 10):
        found.refused(node, ErrorReply(f"MOVED 1 10.1.{number // 250}.{number % 250}:7000"))
    assert len(found._nodes) == MAX_NODES
    found.close()


@given(REPLIES)
def test_shares_of_any_form(reply: object) -> None:
    found = cluster._range(reply, "h")
    if found is not None:
        first, last, (host, port) = found
        assert 0 <= first <= last < NUM_SLOTS
        assert host
        assert 0 < port < 65536


@given(REPLIES)
def test_replicas_of_any_form(reply: object) -> None:
    assert sentinel._replica(reply) is None


def test_replicas() -> None:
    fields = [b"ip", b"10.0.0.2", b"port", b"6379", b"flags", b"slave", b"master-link-status", b"ok"]
    assert sentinel._replica(fields) == ("10.0.0.2", 6379)
    for name, value in (
        (b"flags", b"s_down,slave"),
        (b"master-link-status", b"err"),
        (b"port", b"x"),
        (b"port", b"99999"),
    ):
        at = fields.index(name) + 1
        assert sentinel._replica([*fields[:at], value, *fields[at + 1 :]]) is None


def test_nobody_to_tell_the_shares() -> None:
    found = ClusterTopology(parse_url(f"redis-cluster://:secret@127.0.0.1:{free_port()}"), LIMITS, None)
    for _ in range(2):
        with pytest.raises(TierUnavailable, match="no node tells") as raised:
            found.route([b"a"], is_write=False)
        assert "secret" not in str(raised.value)
    found.close()


def test_a_probe_that_cannot_be_made_or_breaks_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[str] = []

    def probe() -> None:
        probes.append("made")
        if len(probes) == 1:
            raise RuntimeError("broken")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(outage, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    found = outage.Outage("server", probe)
    found.begin("lost")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert not found.is_over()
        with pytest.raises(OSError, match="no thread"):
            sockets.resolve("cache.example", 1, 0.0)
    assert not sockets._lookups, "the next one asks anew"
    deadline = time.monotonic() + 5
    while not found.is_over() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert found.is_over()
    assert len(probes) == 2


def test_names_without_a_server_are_left_out(node: Server) -> None:
    table = [None if slot % 2 else node for slot in range(NUM_SLOTS)]
    names = [b"name%d" % number for number in range(50)]
    routes = route_by_slot(names, table)
    assert sorted(position for route in routes for position in route.positions) == list(range(50))
    assert {route.server for route in routes} == {None, node}
