"""Quotas of salts in the disk tier: files tell whose they are, also after a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstrata.frame import HEADER_BYTES, FrameHeader
from kvstrata.hashing import salt_id
from kvstrata.quotas import Quota
from kvstrata.testing.tier import make_keys
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.disk.index import Index

SIZE = HEADER_BYTES + 1000
BUDGET = 10 * SIZE
ACME, NOISY = salt_id("acme"), salt_id("noisy")


def frame(salt: bytes) -> memoryview:
    buffer = memoryview(bytearray(SIZE))
    FrameHeader(
        shard=0, first_token=0, num_tokens=1, block_size=1, payload_bytes=1000, encoded_bytes=1000,
        layout_fingerprint=bytes(16), chunk_hash=bytes(32), tokens_hash=bytes(32), payload_checksum=bytes(16),
        created_at=1, codec="naive", dtype="uint8", salt_id=salt,
    ).pack_into(buffer)  # fmt: skip
    return buffer


def test_a_header_tells_whose_it_is() -> None:
    assert FrameHeader.unpack(frame(ACME)).salt_id == ACME
    assert FrameHeader.unpack(frame(b"")).salt_id == b""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "kv")


def opened(path: str) -> DiskTier:
    return DiskTier(DiskOptions(path=path, max_bytes=BUDGET))


def write(tier: DiskTier, salt: bytes, keys: list[str]) -> None:
    for key in keys:
        tier.write([key], [frame(salt)])


def test_a_limit_takes_the_salts_own_oldest(path: str) -> None:
    tier = opened(path)
    tier.set_quotas({ACME: Quota(limit_bytes=3 * SIZE)}, None)
    others, own = make_keys(4), make_keys(9)[4:]
    write(tier, NOISY, others)
    write(tier, ACME, own[:3])
    assert isinstance(tier.read(own[:1], [memoryview(bytearray(SIZE))])[0], int)
    write(tier, ACME, own[3:])
    assert tier.contains(own) == [True, False, False, True, True]
    assert all(tier.contains(others))
    usage = tier.usage(ACME)
    assert (usage.num_entries, usage.used_bytes, usage.num_evicted) == (3, 3 * SIZE, 2)
    tier.set_quotas({ACME: Quota(limit_bytes=SIZE)}, None)
    assert tier.contains(own) == [False, False, False, False, True]
    assert sorted(tier.scan()) == sorted([*others, own[4]])
    tier.close()


def test_a_reserve_outlives_others_load_and_a_restart(path: str) -> None:
    tier = opened(path)
    own = make_keys(3)
    write(tier, ACME, own)
    tier.close()
    tier = opened(path)
    tier.set_quotas({ACME: Quota(reserved_bytes=2 * SIZE)}, None)
    assert tier.usage(ACME).used_bytes == 3 * SIZE
    write(tier, NOISY, make_keys(43)[3:])
    assert sum(tier.contains(own)) == 2
    assert tier.usage(ACME).used_bytes == 2 * SIZE
    assert tier.stats().used_bytes == BUDGET
    assert len(list(tier.scan())) == 10
    tier.set_quotas({}, None)
    write(tier, NOISY, make_keys(45)[43:])
    assert tier.contains(own) == [False, False, False], "they were the oldest"
    tier.close()


def test_what_quotas_have_no_room_for_is_not_written(path: str) -> None:
    tier = opened(path)
    tier.set_quotas({ACME: Quota(reserved_bytes=BUDGET), NOISY: Quota(limit_bytes=SIZE - 1)}, None)
    own = make_keys(10)
    write(tier, ACME, own)
    other, small = make_keys(12)[10:]
    write(tier, b"", [other])
    write(tier, NOISY, [small])
    assert tier.contains([*own, other, small]) == [True] * 10 + [False, False]
    assert tier.usage(NOISY).num_refused == 1
    write(tier, ACME, [small])
    assert tier.contains(own) == [False] + [True] * 9, "its own make room for its own"
    tier.close()


def test_a_default_is_for_each_other_salt(path: str) -> None:
    tier = opened(path)
    tier.set_quotas({ACME: Quota()}, Quota(limit_bytes=2 * SIZE))
    keys = make_keys(10)
    write(tier, ACME, keys[:3])
    write(tier, NOISY, keys[3:6])
    write(tier, salt_id("third"), keys[6:9])
    assert tier.contains(keys[:9]) == [True, True, True, False, True, True, False, True, True]
    assert tier.usage(None).num_entries == 4
    tier.close()


SALTS = [name * 16 for name in (b"a", b"b", b"c")] + [b""]
quotas = st.builds(
    lambda reserved, limit: Quota(reserved, None if limit is None else max(reserved, limit)),
    st.integers(0, 4),
    st.none() | st.integers(0, 6),
)


class DiskIndex(RuleBasedStateMachine):
    """The index against what it must never allow; sizes are 1 or 2 of a budget of 10."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(10)
        self.model: dict[str, tuple[int, bytes]] = {}
        self.quotas: dict[bytes, Quota] = {}
        self.under_way: list[tuple[str, int, bytes]] = []
        self.names = iter(range(1 << 30))

    def held(self, salt: bytes) -> int:
        return sum(size for size, owner in self.model.values() if owner == salt)

    def pending(self, salt: bytes) -> int:
        return sum(size for _, size, owner in self.under_way if owner == salt)

    def gone(self, victims: list[str], salt: bytes | None) -> None:
        for key in victims:
            _, owner = self.model.pop(key)
            if owner != salt and owner in self.quotas:
                assert self.held(owner) + self.pending(owner) >= self.quotas[owner].reserved_bytes

    @rule(salt=st.sampled_from(SALTS), size=st.integers(1, 2))
    def begin(self, salt: bytes, size: int) -> None:
        victims, fits = self.index.reserve(size, salt)
        self.gone(victims, salt)
        if fits:
            self.under_way.append((f"key{next(self.names)}", size, salt))
        limit = self.quotas[salt].limit_bytes if salt in self.quotas else None
        assert limit is None or not fits or self.held(salt) + self.pending(salt) <= limit

    @rule(pick=st.integers(0, 100), fails=st.booleans())
    def end(self, pick: int, fails: bool) -> None:
        if not self.under_way:
            return
        key, size, salt = self.under_way.pop(pick % len(self.under_way))
        if fails:
            self.index.unreserve(size, salt)
        else:
            self.index.written(key, size, salt, 1.0)
            self.model[key] = size, salt
        self.gone(self.index.trim(), None)

    @rule(pick=st.integers(0, 100), drop=st.booleans())
    def use(self, pick: int, drop: bool) -> None:
        if not self.model:
            return
        key = sorted(self.model)[pick % len(self.model)]
        if drop:
            assert self.index.removed(key)
            del self.model[key]
        else:
            self.index.used(key, self.model[key][0], 2.0)

    @rule(salt=st.sampled_from(SALTS), quota=st.none() | quotas)
    def set_quota(self, salt: bytes, quota: Quota | None) -> None:
        changed = {name: each for name, each in self.quotas.items() if name != salt}
        changed |= {} if quota is None else {salt: quota}
        if sum(each.reserved_bytes for each in changed.values()) <= 10:
            self.quotas = changed
            for victims in self.index.change_quotas(changed, None):
                self.gone(victims, salt)

    @invariant()
    def adds_up(self) -> None:
        assert sorted(self.index.keys()) == sorted(self.model)
        assert self.index.totals() == (len(self.model), sum(size for size, _ in self.model.values()))
        assert self.index.totals()[1] + sum(size for _, size, _ in self.under_way) <= 10
        for salt in self.quotas:
            assert self.index.usage(salt).used_bytes == self.held(salt) + self.pending(salt)


TestDiskIndex = DiskIndex.TestCase
TestDiskIndex.settings = settings(
    max_examples=int(os.environ.get("KVSTRATA_TEST_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
