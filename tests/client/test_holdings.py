from __future__ import annotations

from kvstrata.client.holdings import Holdings
from kvstrata.protocol import messages as m
from kvstrata.types import NO_HIT, PENDING, Hit

HIT = Hit(num_tokens=16)


def greeted() -> Holdings:
    holdings = Holdings()
    assert holdings.greeted("pool") == []
    return holdings


def test_before_the_first_server_nothing_is_owed() -> None:
    holdings = Holdings()
    holdings.owe(m.Release("r"))
    holdings.lookup_lost("r", asked=True)
    holdings.reserve_lost(0, [b"h"])
    assert holdings.greeted("pool") == []


def test_what_is_owed_is_said_once_and_in_order() -> None:
    holdings = greeted()
    holdings.owe(m.Release("a"))
    holdings.owe(m.Abort(0, (b"h",)))
    assert holdings.greeted("pool") == [m.Release("a"), m.Abort(0, (b"h",))]
    assert holdings.greeted("pool") == []


def test_another_server_is_owed_nothing() -> None:
    holdings = greeted()
    holdings.looked_up("held", HIT)
    holdings.reserved(0, [b"h"])
    holdings.owe(m.Release("a"))
    assert holdings.greeted("another") == []
    holdings.lookup_lost("held", asked=True)
    holdings.reserve_lost(0, [b"h"])
    assert holdings.greeted("another") == [m.Release("held"), m.Abort(0, (b"h",))]


def test_a_lost_look_up_is_released_unless_its_answer_is_in_use() -> None:
    holdings = greeted()
    holdings.looked_up("held", HIT)
    holdings.looked_up("nothing", NO_HIT)
    holdings.looked_up("pending", PENDING)
    holdings.lookup_lost("held", asked=True)
    holdings.lookup_lost("nothing", asked=False)
    holdings.lookup_lost("pending", asked=False)
    holdings.lookup_lost("unknown", asked=False)
    holdings.lookup_lost("asked", asked=True)
    assert holdings.greeted("pool") == [m.Release("pending"), m.Release("asked")]
    holdings.released("held")
    holdings.lookup_lost("held", asked=True)
    assert holdings.greeted("pool") == [m.Release("held")]


def test_a_lost_reservation_is_given_back_without_what_is_in_use() -> None:
    holdings = greeted()
    holdings.reserved(0, [b"a", b"b"])
    holdings.reserve_lost(0, [b"a", b"c"])
    holdings.reserve_lost(1, [b"a"])
    holdings.reserve_lost(0, [b"a", b"b"])
    assert holdings.greeted("pool") == [m.Abort(0, (b"c",)), m.Abort(1, (b"a",))]
    holdings.ended(0, [b"a"])
    holdings.reserve_lost(0, [b"a", b"b"])
    assert holdings.greeted("pool") == [m.Abort(0, (b"a",))]
