import itertools
import random

from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.lru import LRUPolicy
from kvstrata.policies.s3fifo import S3FIFOPolicy
from kvstrata.testing.policy import PolicyContract


class TestS3FIFOContract(PolicyContract):
    def make_policy(self) -> EvictionPolicy:
        return S3FIFOPolicy()


class Cache:
    """A cache of ``capacity`` bytes by a policy, to see what it keeps."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.sizes: dict[bytes, int] = {}
        self.hits = 0

    def use(self, key: bytes, size: int) -> None:
        if key in self.sizes:
            self.hits += 1
            self.policy.touched(key)
            return
        victims = self.policy.victims()
        while sum(self.sizes.values()) + size > self.capacity:
            victim = next(victims)
            self.policy.removed(victim, evicted=True)
            del self.sizes[victim]
        self.policy.added(key, size)
        self.sizes[key] = size


def test_a_scan_does_not_drive_out_what_is_used_often():
    cache = Cache(S3FIFOPolicy(), 100)
    hot = [b"hot %d" % number for number in range(20)]
    for _ in range(4):
        for key in hot:
            cache.use(key, 1)
    for number in range(1000):
        cache.use(b"scan %d" % number, 1)
    assert set(hot) <= set(cache.sizes)


def test_used_once_is_evicted_before_used_often_and_main_goes_by_uses():
    policy = S3FIFOPolicy()
    for key in (b"a", b"b", b"c", b"d"):
        policy.added(key, 10)
    for _ in range(2):
        policy.touched(b"a")
    assert list(itertools.islice(policy.victims(), 3)) == [b"b", b"c", b"d"]
    assert sorted(policy.victims()) == [b"a", b"b", b"c", b"d"]


def test_a_ghost_that_comes_back_is_kept_longer_than_new_keys():
    policy = S3FIFOPolicy()
    for number in range(10):
        policy.added(b"%d" % number, 10)
    policy.removed(b"0", evicted=True)
    policy.added(b"0", 10)
    assert list(policy.victims())[-1] == b"0"


def test_a_deleted_key_leaves_no_ghost():
    policy = S3FIFOPolicy()
    for number in range(10):
        policy.added(b"%d" % number, 10)
    policy.removed(b"0", evicted=False)
    policy.added(b"0", 10)
    policy.added(b"new", 10)
    assert list(policy.victims())[-2:] == [b"0", b"new"]


def test_the_small_queue_is_bounded_by_bytes_not_by_keys():
    policy = S3FIFOPolicy()
    for key, size in ((b"main", 1000), (b"other", 1000)):
        policy.added(key, size)
        policy.touched(key)
        policy.touched(key)
    assert next(policy.victims()) in {b"main", b"other"}  # both moved on to the main queue
    policy.added(b"little", 10)
    assert next(policy.victims()) in {b"main", b"other"}  # the small queue holds less than a tenth
    policy.added(b"large", 500)
    assert next(policy.victims()) == b"little"


def test_ghosts_are_bounded():
    cache = Cache(S3FIFOPolicy(), 1000)
    for number in range(20_000):
        cache.use(b"%d" % number, 10)
    assert len(cache.policy._ghosts) <= 100


def test_it_hits_more_often_than_lru_where_few_keys_are_popular():
    source = random.Random(7)
    keys = [b"%d" % min(int(source.paretovariate(0.8)), 5000) for _ in range(20_000)]
    hits = {}
    for policy in (S3FIFOPolicy(), LRUPolicy()):
        cache = Cache(policy, 100)
        for key in keys:
            cache.use(key, 1)
        hits[type(policy)] = cache.hits
    assert hits[S3FIFOPolicy] > hits[LRUPolicy]
