"""The kit's cluster and sentinels, looked at by an independent client."""

from __future__ import annotations

import redis

from kvstrata.testing.redis_cluster import RedisCluster, slot_of
from kvstrata.testing.redis_sentinel import RedisSentinel
from kvstrata.testing.waiting import wait_until


def test_a_cluster_serves_all_slots_and_moves_one() -> None:
    with RedisCluster(password="pass word") as cluster:
        first = cluster.nodes[0]
        with redis.RedisCluster(host="127.0.0.1", port=first.port, password="pass word") as client:
            for number in range(20):
                client.set(f"name{number}", number)
            assert client.keyslot("name0") == slot_of("name0")
            source = cluster.owner("name0")
            target = next(node for node in cluster.nodes if node is not source)
            cluster.migrate(slot_of("name0"), source, target)
            assert cluster.owner("name0") is target
            assert [int(client.get(f"name{number}")) for number in range(20)] == list(range(20))
        source.kill()
        assert target.ask("GET", "name0") == b"0"


def test_sentinels_name_the_master() -> None:
    """How they fail over is tested with the tier."""
    with RedisSentinel(password="data", sentinel_password="watch") as group:
        addresses = [("127.0.0.1", sentinel.port) for sentinel in group.sentinels]
        finder = redis.Sentinel(addresses, sentinel_kwargs={"password": "watch"}, password="data")
        assert finder.discover_master("mymaster") == ("127.0.0.1", group.master.port)
        assert finder.discover_slaves("mymaster") == [("127.0.0.1", group.replica.port)]
        group.master.ask("SET", "name", "value")
        wait_until(lambda: group.replica.ask("GET", "name") == b"value", "the replica has it", 5)
        for sentinel in finder.sentinels:
            sentinel.close()
