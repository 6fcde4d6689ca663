"""The contract of eviction policies, as tests. Subclass it and say how to make one.

class TestMyPolicy(PolicyContract):
    def make_policy(self) -> EvictionPolicy:
        return MyPolicy()
"""

from __future__ import annotations

import itertools
import random

import pytest

from kvstrata.policies.base import EvictionPolicy


class PolicyContract:
    """What the cache relies on, whatever order a policy prefers."""

    def make_policy(self) -> EvictionPolicy:
        """A new, empty policy."""
        raise NotImplementedError

    def make_filled(self, count: int) -> tuple[EvictionPolicy, list[bytes]]:
        policy = self.make_policy()
        keys = [b"key %d" % number for number in range(count)]
        for number, key in enumerate(keys):
            policy.added(key, 4096 * (1 + number % 7))
        return policy, keys

    def test_empty_policy_has_no_victims(self) -> None:
        assert list(self.make_policy().victims()) == []

    def test_victims_are_all_held_keys_once(self) -> None:
        policy, keys = self.make_filled(500)
        for key in random.Random(1).choices(keys, k=900):  # noqa: S311 - reproducible, no secret
            policy.touched(key)
        offered = list(policy.victims())
        assert sorted(offered) == sorted(keys)
        assert sorted(policy.victims()) == sorted(keys)

    def test_evicting_every_victim_empties_it(self) -> None:
        policy, keys = self.make_filled(300)
        evicted = []
        for key in policy.victims():
            policy.removed(key, evicted=True)
            evicted.append(key)
        assert sorted(evicted) == sorted(keys)
        assert list(policy.victims()) == []

    def test_victims_tolerates_touches_and_ends(self) -> None:
        policy, keys = self.make_filled(300)
        offered = []
        for key in policy.victims():
            policy.touched(key)
            offered.append(key)
        assert sorted(offered) == sorted(keys)

    def test_victims_may_be_left_early(self) -> None:
        policy, keys = self.make_filled(50)
        first = list(itertools.islice(policy.victims(), 3))
        for key in first:
            policy.removed(key, evicted=True)
        assert sorted(policy.victims()) == sorted(set(keys) - set(first))

    def test_a_key_deleted_meanwhile_is_not_offered(self) -> None:
        policy, keys = self.make_filled(200)
        held = set(keys)
        offered = set()
        for key in policy.victims():
            assert key in held
            offered.add(key)
            for gone in sorted(held)[-2:]:
                policy.removed(gone, evicted=gone == key)
                held.discard(gone)
        assert held <= offered

    def test_an_evicted_key_may_come_back(self) -> None:
        policy, keys = self.make_filled(20)
        for _ in range(5):
            key = next(iter(policy.victims()))
            policy.removed(key, evicted=True)
            policy.added(key, 8192)
            assert sorted(policy.victims()) == sorted(keys)

    @pytest.mark.parametrize("seed", range(8))
    def test_it_agrees_with_a_set(self, seed: int) -> None:
        """Random histories, evictions in which some victims are passed over included."""
        source = random.Random(seed)  # noqa: S311 - a reproducible history, no secret
        policy = self.make_policy()
        held: set[bytes] = set()
        for number in range(2000):
            action = source.random()
            if action < 0.5 or not held:
                key = b"key %d" % (number if source.random() < 0.7 else source.randrange(number + 1))
                if key not in held:
                    policy.added(key, source.randrange(1, 1 << 20))
                    held.add(key)
            elif action < 0.75:
                policy.touched(source.choice(sorted(held)))
            elif action < 0.8:
                key = source.choice(sorted(held))
                policy.removed(key, evicted=False)
                held.remove(key)
            elif action < 0.82:
                self._evict_some(policy, held, source)
        assert sorted(policy.victims()) == sorted(held)

    def _evict_some(self, policy: EvictionPolicy, held: set[bytes], source: random.Random) -> None:
        offered: set[bytes] = set()
        for key in policy.victims():
            assert key in held
            assert key not in offered
            offered.add(key)
            outcome = source.random()
            if outcome < 0.5:
                policy.removed(key, evicted=True)
                held.remove(key)
            elif outcome < 0.7:
                policy.touched(key)
            elif outcome < 0.75:
                return
        assert held <= offered
