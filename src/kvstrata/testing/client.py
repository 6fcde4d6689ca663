"""The client contract as tests: subclass :class:`ClientContract`, give it a way to start a cache, and run pytest.

    class TestMyClient(ClientContract):
        @pytest.fixture
        def start(self):
            with contextlib.ExitStack() as stack:
                yield lambda settings: stack.enter_context(MyClient(settings))

:class:`SharedClientContract` adds what holds when several clients use one cache.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvstrata.client.base import Client, Reservation
from kvstrata.config import Settings
from kvstrata.hashing import PrefixHasher, full_chunks, tail_pieces
from kvstrata.testing.faults import Faults, set_faults
from kvstrata.testing.waiting import PATIENCE_SECONDS, wait_until
from kvstrata.types import Hit, KVLayout, MissReason, Namespace, Piece, Prefix, parse_key

BLOCK_SIZE = 16
CHUNK_SIZE = 64
LAYOUT = KVLayout(block_size=BLOCK_SIZE, page_bytes=(1024, 3072), dtype="bfloat16", kernel_format="test")
CHUNK_BYTES = LAYOUT.payload_bytes(CHUNK_SIZE)
POOL_CHUNKS = 64
"""About so many full chunks fit into the pool of :func:`small_settings`."""
"""How long a test waits for what must happen, before it fails."""

Start = Callable[[Settings], Client]


def make_namespace(model_name: str = "org/model", *, world_size: int = 1) -> Namespace:
    """A namespace with :data:`LAYOUT` and :data:`CHUNK_SIZE`."""
    shape = f"tp{world_size}pp1"
    return Namespace("vllm", model_name, "fp", "auto", world_size, shape, CHUNK_SIZE, LAYOUT)


def small_settings(**changes: object) -> Settings:
    """Settings with a pool of :data:`POOL_CHUNKS` chunks, tight enough for evictions."""
    pool_bytes = POOL_CHUNKS * (CHUNK_BYTES + 4096)
    return Settings(**{"max_local_cpu_size": pool_bytes / 2**30, "chunk_size": CHUNK_SIZE, **changes})  # type: ignore[arg-type]


def make_tokens(count: int, seed: int) -> list[int]:
    """``count`` token ids."""
    rng = random.Random(seed)  # noqa: S311  test data
    return [rng.randrange(50_000) for _ in range(count)]


def payload_of(piece: Piece, shard: int, size: int) -> bytes:
    """What the tests store under a key: bytes that follow from the key alone."""
    return random.Random(piece.chunk_hash + bytes([shard])).randbytes(size)  # noqa: S311  test data


class Prompt:
    """A token sequence, hashed."""

    def __init__(self, tokens: Sequence[int], namespace: Namespace, salt: str = "") -> None:
        self.tokens = list(tokens)
        self.namespace = namespace
        hasher = PrefixHasher(namespace, salt)
        hasher.extend(self.tokens)
        self.prefix: Prefix = hasher.prefix(self.tokens)
        chunk_size = namespace.chunk_size
        self.chunks = full_chunks(hasher, chunk_size, 0, len(self.tokens) // chunk_size)
        self.pieces = self.chunks + tail_pieces(self.prefix, namespace.layout.block_size, chunk_size)

    def __len__(self) -> int:
        return len(self.tokens)


def prompt(count: int, seed: int, namespace: Namespace | None = None, salt: str = "") -> Prompt:
    """A prompt of ``count`` tokens."""
    return Prompt(make_tokens(count, seed), namespace or make_namespace(), salt)


def fill(reservation: Reservation) -> None:
    """Write each payload that was reserved."""
    for piece, buffer in zip(reservation.pieces, reservation.buffers, strict=True):
        if buffer is not None:
            buffer[:] = payload_of(piece, reservation.shard, len(buffer))


def store(client: Client, stored: Prompt, shards: Sequence[int] | None = None) -> int:
    """Store a prompt's pieces, all shards; the tokens that were copied. What it did is visible to ``client``."""
    copied = 0
    for shard in range(stored.namespace.world_size) if shards is None else shards:
        reservation = client.reserve(stored.namespace, shard, stored.pieces)
        fill(reservation)
        copied += reservation.num_tokens
        client.commit(reservation)
    return copied


def wait_lookup(client: Client, request_id: str, asked: Prompt) -> Hit:
    """Look up until the answer is final."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (hit := client.lookup(request_id, asked.namespace, asked.prefix)).pending:
        assert time.monotonic() < deadline, "the look-up is pending for ever"
        time.sleep(0.002)
    return hit


def check_payloads(client: Client, request_id: str, hit: Hit, namespace: Namespace) -> None:
    """Every payload of a hit is what was stored under its key, to the byte."""
    assert hit.num_tokens == sum(piece.num_tokens for piece in hit.pieces)
    for shard in range(namespace.world_size):
        payloads = client.payloads(request_id, shard, hit, namespace)
        assert payloads is not None
        for piece, payload in zip(hit.pieces, payloads, strict=True):
            size = namespace.layout.payload_bytes(piece.num_tokens)
            assert bytes(payload) == payload_of(piece, shard, size)


def look(client: Client, request_id: str, asked: Prompt) -> int:
    """Tokens that are held of a prompt; its payloads are checked, and the lease is given back."""
    hit = wait_lookup(client, request_id, asked)
    check_payloads(client, request_id, hit, asked.namespace)
    client.release(request_id)
    return hit.num_tokens


def written(client: Client, entries: int) -> bool:
    """Whether the first tier holds that many entries and nothing waits to be written."""
    (tier, *_) = client.stats()["tiers"]
    return bool(tier["entries"] == entries and tier["queued_bytes"] == 0)


class ClientContract:
    """What every client must do. The fixture ``start`` gives a function from settings to a client of a new cache.

    What it started ends with the test. A client must see its own commits in its own later look-ups.
    """

    @pytest.fixture
    def start(self) -> Start:
        raise NotImplementedError("a subclass gives the fixture `start`")

    @pytest.fixture
    def client(self, start: Start) -> Client:
        return start(small_settings())

    # Round trips

    def test_nothing_is_held_at_first(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        hit = client.lookup("r", asked.namespace, asked.prefix)
        assert (hit.pending, hit.num_tokens, hit.pieces) == (False, 0, ())
        assert hit.miss_reason == MissReason.ABSENT
        assert client.connected

    def test_an_exact_repeat_hits_everything(self, client: Client) -> None:
        for count in (1, 15, 16, 17, 31, 32, 63, 64, 65, 80, 128, 191, 325, 330):
            asked = prompt(count, seed=count)
            assert store(client, asked) == count
            hit = client.lookup(f"r{count}", asked.namespace, asked.prefix)
            assert (hit.num_tokens, hit.miss_reason, hit.tokens_by_tier) == (count, None, {"l1": count})
            check_payloads(client, f"r{count}", hit, asked.namespace)
            client.release(f"r{count}")

    def test_an_empty_prompt(self, client: Client) -> None:
        assert look(client, "r", prompt(0, seed=1)) == 0

    def test_a_longer_prompt_finds_the_tail_up_to_its_last_whole_block(self, client: Client) -> None:
        base = make_tokens(5 * CHUNK_SIZE + 2 * BLOCK_SIZE + 5, seed=1)
        store(client, Prompt(base, make_namespace()))
        longer = Prompt(base + make_tokens(100, seed=2), make_namespace())
        assert look(client, "r", longer) == 5 * CHUNK_SIZE + 2 * BLOCK_SIZE
        diverging = Prompt(base[: 5 * CHUNK_SIZE + 2 * BLOCK_SIZE] + [7] * 20, make_namespace())
        assert look(client, "r", diverging) == 5 * CHUNK_SIZE + 2 * BLOCK_SIZE

    def test_the_longest_tail_is_found(self, client: Client) -> None:
        tokens = make_tokens(2 * CHUNK_SIZE, seed=1)
        for end in (CHUNK_SIZE + BLOCK_SIZE, CHUNK_SIZE + 3 * BLOCK_SIZE, CHUNK_SIZE + 2 * BLOCK_SIZE):
            store(client, Prompt(tokens[:end], make_namespace()))
        assert look(client, "r", Prompt(tokens, make_namespace())) == CHUNK_SIZE + 3 * BLOCK_SIZE
        store(client, Prompt(tokens, make_namespace()))
        assert look(client, "r", Prompt(tokens, make_namespace())) == 2 * CHUNK_SIZE

    def test_divergence_inside_a_chunk_ends_at_the_chunk_before(self, client: Client) -> None:
        tokens = make_tokens(4 * CHUNK_SIZE, seed=1)
        store(client, Prompt(tokens, make_namespace()))
        for at, expected in ((0, 0), (70, 64), (127, 64), (128, 128), (200, 192), (255, 192)):
            other = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
            assert look(client, f"r{at}", Prompt(other, make_namespace())) == expected

    def test_a_shorter_prompt_ends_at_a_chunk(self, client: Client) -> None:
        tokens = make_tokens(4 * CHUNK_SIZE, seed=1)
        store(client, Prompt(tokens, make_namespace()))
        for count, expected in ((10, 0), (63, 0), (64, 64), (100, 64), (128, 128), (255, 192)):
            assert look(client, f"r{count}", Prompt(tokens[:count], make_namespace())) == expected

    def test_a_hole_ends_the_hit(self, client: Client) -> None:
        stored = prompt(4 * CHUNK_SIZE, seed=1)
        stored.pieces.pop(2)
        store(client, stored)
        assert look(client, "r", prompt(4 * CHUNK_SIZE, seed=1)) == 2 * CHUNK_SIZE

    def test_namespaces_and_salts_are_apart(self, client: Client) -> None:
        store(client, prompt(200, seed=1))
        assert look(client, "a", prompt(200, seed=1, namespace=make_namespace("org/other"))) == 0
        assert look(client, "b", prompt(200, seed=1, salt="tenant")) == 0
        store(client, prompt(200, seed=1, salt="tenant"))
        assert look(client, "c", prompt(200, seed=1, salt="tenant")) == 200
        assert look(client, "d", prompt(200, seed=1)) == 200

    def test_a_hit_needs_all_shards(self, client: Client) -> None:
        asked = prompt(200, seed=1, namespace=make_namespace(world_size=2))
        store(client, asked, shards=[0])
        assert look(client, "a", asked) == 0
        store(client, asked, shards=[1])
        hit = client.lookup("b", asked.namespace, asked.prefix)
        assert (hit.num_tokens, len(hit.offsets)) == (200, 2)
        check_payloads(client, "b", hit, asked.namespace)

    def test_a_shard_that_ends_earlier_ends_the_hit(self, client: Client) -> None:
        asked = prompt(4 * CHUNK_SIZE, seed=1, namespace=make_namespace(world_size=2))
        store(client, asked, shards=[0])
        asked.pieces = asked.pieces[:3]
        store(client, asked, shards=[1])
        assert look(client, "a", asked) == 3 * CHUNK_SIZE

    # Reservations

    def test_nothing_is_visible_before_commit(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        reservation = client.reserve(asked.namespace, 0, asked.pieces)
        assert reservation.num_tokens == 200
        assert look(client, "a", asked) == 0
        fill(reservation)
        assert look(client, "b", asked) == 0
        client.commit(reservation)
        assert look(client, "c", asked) == 200

    def test_abort_gives_the_slots_back(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        reservation = client.reserve(asked.namespace, 0, asked.pieces)
        fill(reservation)
        client.abort(reservation)
        assert look(client, "a", asked) == 0
        assert client.stats()["l1"]["used_bytes"] == 0
        client.commit(reservation)  # too late
        client.abort(reservation)
        assert look(client, "b", asked) == 0
        assert store(client, asked) == 200
        assert look(client, "c", asked) == 200

    def test_what_is_held_or_reserved_needs_no_buffer(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        first = client.reserve(asked.namespace, 0, asked.pieces[:2])
        second = client.reserve(asked.namespace, 0, asked.pieces)
        assert [buffer is None for buffer in second.buffers] == [True, True] + [False] * (
            len(asked.pieces) - 2
        )
        fill(second)
        client.commit(second)
        assert look(client, "a", asked) == 0
        fill(first)
        client.commit(first)
        assert look(client, "b", asked) == 200
        third = client.reserve(asked.namespace, 0, asked.pieces)
        assert third.buffers == [None] * len(asked.pieces)
        assert third.num_tokens == 0
        client.commit(third)
        assert look(client, "c", asked) == 200

    def test_more_pieces_than_fit_into_one_message(self, start: Start) -> None:
        """A message has a bounded number of parts, and inline each payload is one."""
        layout = KVLayout(block_size=1, page_bytes=(1,), dtype="uint8", kernel_format="test")
        space = Namespace("vllm", "org/tiny", "fp", "auto", 1, "tp1pp1", 1, layout)
        client = start(small_settings(max_local_cpu_size=0.03))
        asked = prompt(5000, seed=1, namespace=space)
        assert store(client, asked) == 5000
        assert client.stats()["l1"]["reservations"] == 0
        hit = client.lookup("r", space, asked.prefix)
        assert hit.num_tokens == 5000
        check_payloads(client, "r", hit, space)

    def test_no_pieces(self, client: Client) -> None:
        reservation = client.reserve(make_namespace(), 0, [])
        assert reservation.num_tokens == 0
        client.commit(reservation)
        client.abort(reservation)

    # Leases and eviction

    def test_a_lease_keeps_its_payloads_while_all_else_is_evicted(self, client: Client) -> None:
        kept = prompt(5 * CHUNK_SIZE + 20, seed=0)
        store(client, kept)
        hit = client.lookup("kept", kept.namespace, kept.prefix)
        for seed in range(1, 30):
            store(client, prompt(10 * CHUNK_SIZE, seed=seed))
        assert client.stats()["l1"]["evictions"] > 0
        check_payloads(client, "kept", hit, kept.namespace)
        assert client.lookup("kept", kept.namespace, kept.prefix) == hit
        client.release("kept")
        for seed in range(30, 60):
            store(client, prompt(10 * CHUNK_SIZE, seed=seed))
        hit = client.lookup("again", kept.namespace, kept.prefix)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.EVICTED)

    def test_ends_of_chains_are_evicted_first(self, client: Client) -> None:
        first = prompt((POOL_CHUNKS - 8) * CHUNK_SIZE, seed=0)
        store(client, first)
        store(client, prompt(20 * CHUNK_SIZE, seed=1))
        kept = look(client, "r", first)
        assert 0 < kept < len(first)
        assert client.stats()["l1"]["entries"] == 20 + kept // CHUNK_SIZE

    def test_a_pool_full_of_leases_takes_nothing(self, client: Client) -> None:
        held = [prompt(10 * CHUNK_SIZE, seed=seed) for seed in range(8)]
        for number, one in enumerate(held):
            store(client, one)
            client.lookup(str(number), one.namespace, one.prefix)
        more = prompt(10 * CHUNK_SIZE, seed=100)
        reservation = client.reserve(more.namespace, 0, more.pieces)
        assert reservation.buffers == [None] * len(more.pieces)
        client.commit(reservation)
        for number in range(8):
            client.release(str(number))
        assert store(client, more) == len(more)
        assert look(client, "more", more) == len(more)

    def test_an_answer_stays_until_released(self, client: Client) -> None:
        asked = prompt(4 * CHUNK_SIZE, seed=1)
        pieces = asked.pieces
        asked.pieces = pieces[:2]
        store(client, asked)
        before = client.lookup("r", asked.namespace, asked.prefix)
        asked.pieces = pieces
        store(client, asked)
        assert client.lookup("r", asked.namespace, asked.prefix) == before
        client.release("r")
        assert client.lookup("r", asked.namespace, asked.prefix).num_tokens == len(asked)

    def test_each_request_has_its_own_lease(self, client: Client) -> None:
        asked = prompt(4 * CHUNK_SIZE, seed=1)
        store(client, asked)
        client.lookup("a", asked.namespace, asked.prefix)
        hit = client.lookup("b", asked.namespace, asked.prefix)
        client.release("a")
        for seed in range(2, 30):
            store(client, prompt(10 * CHUNK_SIZE, seed=seed))
        check_payloads(client, "b", hit, asked.namespace)

    def test_a_request_that_is_reused_for_another_prompt_gets_nothing_of_the_first(
        self, client: Client
    ) -> None:
        first, second = prompt(200, seed=1), prompt(200, seed=2)
        store(client, first)
        client.lookup("r", first.namespace, first.prefix)
        assert client.lookup("r", second.namespace, second.prefix).num_tokens == 0

    def test_releasing_what_is_not_held_is_no_error(self, client: Client) -> None:
        client.release("never seen")
        client.release("never seen")
        assert client.stats()["l1"]["lookups"] == 0

    # Clear

    def test_clear_drops_everything(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        store(client, asked)
        assert client.clear() == len(asked.pieces)
        assert look(client, "a", asked) == 0
        assert client.stats()["l1"]["used_bytes"] == 0
        assert client.clear() == 0

    def test_clear_of_a_namespace_leaves_others(self, client: Client) -> None:
        mine, other = prompt(200, seed=1), prompt(100, seed=1, namespace=make_namespace("org/other"))
        store(client, mine)
        store(client, other)
        assert client.clear(mine.namespace) == len(mine.pieces)
        assert look(client, "a", mine) == 0
        assert look(client, "b", other) == 100

    def test_clear_leaves_leased_payloads_alone(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        store(client, asked)
        hit = client.lookup("r", asked.namespace, asked.prefix)
        client.clear()
        for seed in range(2, 20):
            store(client, prompt(10 * CHUNK_SIZE, seed=seed))
        check_payloads(client, "r", hit, asked.namespace)
        client.release("r")
        assert look(client, "again", asked) == 0

    def test_what_was_reserved_before_clear_never_becomes_visible(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        reservation = client.reserve(asked.namespace, 0, asked.pieces)
        client.clear()
        again = client.reserve(asked.namespace, 0, asked.pieces[:1])
        fill(reservation)
        client.commit(reservation)
        assert look(client, "a", asked) == 0
        client.abort(again)
        assert client.stats()["l1"]["used_bytes"] == 0
        assert store(client, asked) == 200

    # Looking at it

    def test_keys(self, client: Client) -> None:
        asked = prompt(300, seed=1, namespace=make_namespace("org/a b@c", world_size=2))
        store(client, asked)
        keys = client.keys()
        assert sorted(keys) == sorted(
            asked.namespace.key(piece.chunk_hash, shard) for piece in asked.pieces for shard in (0, 1)
        )
        assert {parse_key(key).model_name for key in keys} == {"org/a b@c"}
        assert client.keys(asked.namespace.key_prefix + "1@") == [k for k in keys if parse_key(k).worker_id]
        assert client.keys("vllm@org/other") == []
        assert len(client.keys(limit=3)) == 3
        assert client.keys(limit=0) == []
        reserved = prompt(100, seed=2)
        client.reserve(reserved.namespace, 0, reserved.pieces)
        assert sorted(client.keys()) == sorted(keys)

    def test_stats(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        store(client, asked)
        client.lookup("r", asked.namespace, asked.prefix)
        stats = client.stats()
        assert stats["l1"]["entries"] == len(asked.pieces)
        assert stats["l1"]["lookups"] == 1
        assert stats["l1"]["reservations"] == 0
        assert 0 < stats["l1"]["used_bytes"] <= stats["l1"]["budget_bytes"]
        assert stats["totals"]["stored_tokens"] == 200
        assert stats["totals"]["hit_tokens"]["l1"] == 200
        assert stats["tiers"] == []
        client.release("r")
        assert client.stats()["l1"]["lookups"] == 0

    def test_prefill_reports_are_taken(self, client: Client) -> None:
        store(client, prompt(200, seed=1))
        client.report_prefill(make_namespace(), 1000, 0.5)
        assert client.stats()["rates"]["prefill_tokens_per_second"] == pytest.approx(2000)

    def test_moves_are_counted(self, client: Client) -> None:
        store(client, prompt(200, seed=1))
        client.report_move(5000, 0.25, is_store=True)
        client.report_move(700, 0.5, is_store=False)
        totals = client.stats()["totals"]
        assert totals["device_bytes"] == {"store": 5000, "retrieve": 700}
        assert totals["device_seconds"] == {"store": pytest.approx(0.25), "retrieve": pytest.approx(0.5)}

    def test_chunk_size(self, client: Client) -> None:
        assert client.server_chunk_size in (CHUNK_SIZE, None)

    def test_no_other_pool_is_mapped(self, client: Client) -> None:
        assert client.mapped_pool("") is None
        assert client.mapped_pool("another") is None

    def test_close_is_idempotent_and_nothing_raises_afterwards(self, client: Client) -> None:
        asked = prompt(200, seed=1)
        store(client, asked)
        reservation = client.reserve(make_namespace(), 0, prompt(200, seed=2).pieces)
        assert client.server_id
        client.close()
        client.close()
        assert not client.connected
        assert not client.server_id
        assert client.lookup("r", asked.namespace, asked.prefix).num_tokens == 0
        assert client.reserve(asked.namespace, 0, asked.pieces).num_tokens == 0
        client.commit(reservation)
        client.abort(reservation)
        client.release("r")
        client.report_prefill(asked.namespace, 10, 1.0)
        assert (client.clear(), client.keys(), client.stats()) == (None, [], {})

    # Lower tiers

    @pytest.fixture
    def faulty(self, tmp_path: Path) -> Settings:
        """Settings with a tier that is as slow as the test says; its plug-in is known where caches start."""
        tier = {"kind": "faulty", "path": str(tmp_path / "tier"), "faults_file": str(tmp_path / "faults")}
        return small_settings(tiers=(tier,), gate="always")

    def _fill_tier(self, start: Start, settings: Settings, stored: Prompt) -> None:
        with start(settings) as client:
            store(client, stored)
            entries = len(stored.pieces) * stored.namespace.world_size
            wait_until(lambda: written(client, entries), "the tier holds all")

    def test_what_lower_tiers_hold_is_loaded(self, start: Start, tmp_path: Path) -> None:
        settings = small_settings(local_disk=str(tmp_path / "disk"))
        asked = prompt(325, seed=1, namespace=make_namespace(world_size=2))
        self._fill_tier(start, settings, asked)
        client = start(settings)
        assert client.lookup("r", asked.namespace, asked.prefix).pending
        hit = wait_lookup(client, "r", asked)
        assert (hit.num_tokens, hit.tokens_by_tier, hit.miss_reason) == (325, {"disk": 325}, None)
        check_payloads(client, "r", hit, asked.namespace)
        client.release("r")
        again = client.lookup("s", asked.namespace, asked.prefix)
        assert (again.num_tokens, again.tokens_by_tier) == (325, {"l1": 325})

    def test_tails_in_lower_tiers_are_found(self, start: Start, tmp_path: Path) -> None:
        settings = small_settings(local_disk=str(tmp_path / "disk"))
        tokens = make_tokens(3 * CHUNK_SIZE + 2 * BLOCK_SIZE + 3, seed=1)
        self._fill_tier(start, settings, Prompt(tokens, make_namespace()))
        client = start(settings)
        longer = Prompt(tokens + make_tokens(90, seed=2), make_namespace())
        assert look(client, "r", longer) == 3 * CHUNK_SIZE + 2 * BLOCK_SIZE

    def test_a_slow_tier_holds_up_nobody(self, start: Start, faulty: Settings, tmp_path: Path) -> None:
        slow, quick = prompt(325, seed=1), prompt(200, seed=2)
        self._fill_tier(start, faulty, slow)
        client = start(faulty)
        store(client, quick)
        set_faults(tmp_path / "faults", Faults(read_delay_seconds=0.3))
        assert client.lookup("slow", slow.namespace, slow.prefix).pending
        answers = [client.lookup(f"q{i}", quick.namespace, quick.prefix) for i in range(20)]
        assert [answer.num_tokens for answer in answers] == [200] * 20
        assert client.lookup("slow", slow.namespace, slow.prefix).pending
        hit = wait_lookup(client, "slow", slow)
        assert hit.num_tokens == 325
        check_payloads(client, "slow", hit, slow.namespace)

    @pytest.mark.parametrize("faults", [Faults(delay_seconds=0.6), Faults(read_delay_seconds=0.6)])
    def test_at_the_deadline_what_has_arrived_counts(
        self, start: Start, faulty: Settings, tmp_path: Path, faults: Faults
    ) -> None:
        asked = prompt(325, seed=1)
        self._fill_tier(start, faulty, asked)
        client = start(small_settings(tiers=faulty.tiers, gate="always", lookup_timeout_ms=150))
        beginning = Prompt(asked.tokens[: 2 * CHUNK_SIZE], asked.namespace)
        store(client, beginning)
        wait_until(lambda: client.stats()["tiers"][0]["queued_bytes"] == 0, "what is stored is written")
        set_faults(tmp_path / "faults", faults)
        hit = wait_lookup(client, "r", asked)
        assert (hit.num_tokens, hit.miss_reason) == (2 * CHUNK_SIZE, MissReason.DEADLINE)
        check_payloads(client, "r", hit, asked.namespace)
        client.release("r")
        set_faults(tmp_path / "faults", Faults())
        wait_until(lambda: look(client, "later", asked) == 325, "the tier is used again")

    def test_released_while_pending(self, start: Start, faulty: Settings, tmp_path: Path) -> None:
        asked = prompt(325, seed=1)
        self._fill_tier(start, faulty, asked)
        client = start(faulty)
        set_faults(tmp_path / "faults", Faults(read_delay_seconds=0.3))
        assert client.lookup("r", asked.namespace, asked.prefix).pending
        client.release("r")
        assert client.lookup("s", asked.namespace, asked.prefix).pending
        time.sleep(0.1)  # so that it is being read
        client.release("s")
        wait_until(lambda: client.clear() == 0, "what was being read is dropped")
        wait_until(lambda: client.stats()["l1"]["used_bytes"] == 0, "every slot is free")
        assert client.stats()["l1"]["lookups"] == 0

    def test_clear_reaches_lower_tiers(self, start: Start, tmp_path: Path) -> None:
        settings = small_settings(local_disk=str(tmp_path / "disk"))
        asked = prompt(325, seed=1)
        self._fill_tier(start, settings, asked)
        client = start(settings)
        client.clear()
        assert look(client, "r", asked) == 0
        wait_until(lambda: written(client, 0), "the tier is empty")
        assert look(client, "s", asked) == 0
        assert store(client, asked) == 325
        # The tier is empty a moment before the clear has ended, and it does not get what is stored until then.
        wait_until(
            lambda: store(client, asked) == 0 and written(client, len(asked.pieces)), "the tier is used again"
        )

    def test_host_memory_that_only_passes_through(self, start: Start, tmp_path: Path) -> None:
        settings = small_settings(local_disk=str(tmp_path / "disk"), local_cpu=False)
        asked = prompt(325, seed=1)
        client = start(settings)
        assert store(client, asked) == 325
        wait_until(lambda: written(client, len(asked.pieces)), "the tier holds all")
        wait_until(lambda: client.stats()["l1"]["used_bytes"] == 0, "nothing stays in L1")
        hit = wait_lookup(client, "r", asked)
        assert hit.tokens_by_tier == {"disk": 325}
        check_payloads(client, "r", hit, asked.namespace)
        client.release("r")
        assert client.stats()["l1"]["used_bytes"] == 0


Join = Callable[[], Client]


class SharedClientContract(ClientContract):
    """What holds when several clients use one cache.

    The fixture ``join`` gives a function that makes another client of the cache that ``start`` started last.
    """

    @pytest.fixture
    def join(self) -> Join:
        raise NotImplementedError("a subclass gives the fixture `join`")

    def _settle(self, client: Client) -> None:
        """What ``client`` said before has been carried out when this returns."""
        client.keys(limit=0)

    def test_clients_see_what_others_committed(self, client: Client, join: Join) -> None:
        asked = prompt(325, seed=1)
        other = join()
        store(client, asked)
        self._settle(client)
        assert look(other, "r", asked) == 325
        assert other.reserve(asked.namespace, 0, asked.pieces).num_tokens == 0

    def test_one_client_looks_up_and_another_copies(self, client: Client, join: Join) -> None:
        """As a scheduler and a worker do."""
        worker = join()
        asked = prompt(325, seed=1)
        store(worker, asked)
        self._settle(worker)
        hit = client.lookup("r", asked.namespace, asked.prefix)
        assert hit.num_tokens == 325
        check_payloads(worker, "r", hit, asked.namespace)
        client.release("r")

    def test_requests_of_the_same_name_are_apart(self, client: Client, join: Join) -> None:
        first, second = prompt(200, seed=1), prompt(100, seed=2)
        other = join()
        store(client, first)
        store(client, second)
        self._settle(client)
        hit = client.lookup("r", first.namespace, first.prefix)
        other_hit = other.lookup("r", second.namespace, second.prefix)
        assert (hit.num_tokens, other_hit.num_tokens) == (200, 100)
        other.release("r")
        self._settle(other)
        assert client.stats()["l1"]["lookups"] == 1
        check_payloads(client, "r", hit, first.namespace)

    def test_what_a_client_leaves_behind_is_taken_back(self, client: Client, join: Join) -> None:
        held, reserved = prompt(200, seed=1), prompt(325, seed=2)
        store(client, held)
        self._settle(client)
        other = join()
        other.lookup("r", held.namespace, held.prefix)
        other.reserve(reserved.namespace, 0, reserved.pieces)
        l1 = client.stats()["l1"]
        assert (l1["lookups"], l1["reservations"]) == (1, len(reserved.pieces))
        other.close()
        wait_until(lambda: client.stats()["l1"]["lookups"] == 0, "its lease has ended")
        wait_until(lambda: client.stats()["l1"]["reservations"] == 0, "its reservation is given back")
        assert store(client, reserved) == 325
        client.clear()
        assert client.stats()["l1"]["used_bytes"] == 0

    def test_a_commit_right_before_close_counts(self, client: Client, join: Join) -> None:
        for seed in range(10):
            asked = prompt(200, seed=seed)
            with join() as other:
                store(other, asked)
            wait_until(lambda: client.stats()["sessions"] == 1, "it is gone")
            assert look(client, "r", asked) == 200

    def test_many_at_once(self, client: Client, join: Join) -> None:
        """Threads with a client each store and look up the same prompts in a pool that is too small."""
        failures: list[BaseException] = []
        prompts = [prompt(8 * CHUNK_SIZE + seed, seed=seed) for seed in range(12)]

        def work(seed: int, mine: Client) -> None:
            rng = random.Random(seed)  # noqa: S311  test data
            try:
                for number in range(60):
                    one = rng.choice(prompts)
                    if look(mine, str(number), one) < len(one):
                        store(mine, one)
            except BaseException as error:  # noqa: BLE001  the test's own thread reports it
                failures.append(error)

        others = [join() for _ in range(3)]
        threads = [threading.Thread(target=work, args=(i, one)) for i, one in enumerate(others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        for other in others:
            other.close()
        wait_until(lambda: client.stats()["l1"]["lookups"] == 0, "no lease is left")
        client.clear()
        wait_until(lambda: client.stats()["l1"]["used_bytes"] == 0, "no slot is left")
