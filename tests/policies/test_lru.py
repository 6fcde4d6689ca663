from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.lru import LRUPolicy
from kvstrata.testing.policy import PolicyContract


class TestLRUContract(PolicyContract):
    def make_policy(self) -> EvictionPolicy:
        return LRUPolicy()


def test_the_least_recently_used_goes_first():
    policy = LRUPolicy()
    for key in (b"a", b"b", b"c"):
        policy.added(key, 4096)
    policy.touched(b"a")
    assert list(policy.victims()) == [b"b", b"c", b"a"]


def test_order_is_exact_across_batches_and_passed_over_keys_stay_in_front():
    policy = LRUPolicy()
    keys = [b"%05d" % number for number in range(1000)]
    for key in keys:
        policy.added(key, 1)
    assert list(policy.victims()) == keys
    for key in policy.victims():
        if int(key) % 2:
            policy.removed(key, evicted=True)
    assert list(policy.victims()) == keys[::2]
    for key in policy.victims():
        if int(key) < 500:
            policy.touched(key)
    assert list(policy.victims()) == keys[500::2] + keys[:500:2]
