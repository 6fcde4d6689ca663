"""Who holds how much of one tier, and whose entries may go to make room for whom. Pure state without a lock; the
tier's own guards it.

What a ``cache_salt`` holds has an **account** when there is a quota for it. Salts without one share an account, or,
with a default quota, have one each. Salts appear as their ids (``hashing.salt_id``) only.

What another account's load would evict, and is reserved, is **parked**: taken out of the tier's order of eviction,
so that nobody comes across it again before it is used, or its account holds more than is reserved. So each use
of an entry costs at most one parking, however many entries are reserved.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Annotated, Generic, TypeVar

import msgspec

K = TypeVar("K", bound=Hashable)
"""How a tier knows its entries."""
MAX_BYTES = 2**62
Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one salt may hold of one tier, in bytes as the tier counts them."""

    reserved_bytes: Bytes = 0
    """Loads of other salts never evict it below this."""
    limit_bytes: Bytes | None = None
    """It never holds more; its own oldest entries go first. None: as much as there is."""


class Usage(msgspec.Struct, frozen=True):
    """What a salt holds of one tier, and what its quota has done since it was set."""

    num_entries: int = 0
    used_bytes: int = 0
    num_evicted: int = 0
    """Entries that went for its limit."""
    num_refused: int = 0
    """Entries for which its limit, or what is reserved for others, left no room."""


class Account(Generic[K]):
    """What one salt holds, or several together."""

    def __init__(self, quota: Quota = Quota(), salt_id: bytes = b"", *, is_named: bool = True) -> None:  # noqa: B008  it is frozen
        self.quota = quota
        self.salt_id = salt_id
        self.is_named = is_named
        """False: made for the default quota, and forgotten when it is empty."""
        self.held_bytes = 0
        """Of entries that are held."""
        self.used_bytes = 0
        """With room that is set aside or not given back yet."""
        self.num_entries = 0
        self.num_evicted = 0
        self.num_refused = 0
        self.parked: OrderedDict[K, int] = OrderedDict()
        """Reserved entries with their sizes, the one to evict first in front."""
        self.order: OrderedDict[K, None] = OrderedDict()
        """With a limit: all its entries, the one used longest ago in front."""

    def excess_bytes(self, more_bytes: int = 0) -> int:
        """How much is to go before ``more_bytes`` fit in the limit; not positive when they do."""
        limit = self.quota.limit_bytes
        return -1 if limit is None else self.used_bytes + more_bytes - limit

    def protects(self, size: int) -> bool:
        """Whether an entry of that size is reserved: without it the account would hold less than that."""
        return self.held_bytes - size < self.quota.reserved_bytes


class Accounts(Generic[K]):
    """The accounts of one tier."""

    def __init__(self) -> None:
        self.others: Account[K] = Account()
        """All salts without a quota."""
        self.default: Quota | None = None
        """What each of those may hold, if it is limited; then each has its account."""
        self._accounts: dict[bytes, Account[K]] = {}
        self._releasing: dict[Account[K], None] = {}
        self.num_parked = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no quota, so that uses need not be reported."""
        return not self._accounts and self.default is None

    def of(self, salt_id: bytes) -> Account[K]:
        """The account that entries of a salt belong to."""
        account = self._accounts.get(salt_id)
        if account is not None:
            return account
        if self.default is None or not salt_id:
            return self.others
        return Account(self.default, salt_id, is_named=False)  # kept as soon as it holds something

    def all(self) -> Iterator[Account[K]]:
        """Every account, that of the others included."""
        return iter((self.others, *self._accounts.values()))

    @property
    def reserved_bytes(self) -> int:
        """What is reserved in all."""
        return sum(account.quota.reserved_bytes for account in self._accounts.values())

    def usage(self, salt_id: bytes | None) -> Usage:
        """What a salt with a quota holds; None: all that the default quota is for, together."""
        accounts = (a for a in self._accounts.values() if not a.is_named)
        if salt_id is not None:
            accounts = (self._accounts[salt_id] for _ in range(salt_id in self._accounts))
        usage = Usage()
        for each in accounts:
            usage = Usage(
                usage.num_entries + each.num_entries,
                usage.used_bytes + each.used_bytes,
                usage.num_evicted + each.num_evicted,
                usage.num_refused + each.num_refused,
            )
        return usage

    # What the tier reports

    def added(self, salt_id: bytes, key: K, size: int) -> None:
        """An entry is held now, in room that was taken with ``take``."""
        account = self.of(salt_id)
        account.held_bytes += size
        account.num_entries += 1
        if account.quota.limit_bytes is not None:
            account.order[key] = None
        self._changed(account)

    def take(self, salt_id: bytes, size: int) -> None:
        """Room was set aside for an entry."""
        account = self.of(salt_id)
        account.used_bytes += size
        if not account.is_named:
            self._accounts[salt_id] = account

    def give_back(self, salt_id: bytes, size: int) -> None:
        """That room is free again."""
        account = self.of(salt_id)
        account.used_bytes -= size
        if not account.is_named and account.used_bytes == 0:
            self._accounts.pop(salt_id, None)

    def touched(self, salt_id: bytes, key: K) -> bool:
        """An entry was used; whether it had been parked, and is to take part in the tier's order again."""
        account = self.of(salt_id)
        if key in account.order:
            account.order.move_to_end(key)
        return self.unpark(account, key)

    def removed(self, salt_id: bytes, key: K, size: int) -> bool:
        """An entry is no longer held; whether it was parked, and so in no order of the tier's."""
        account = self.of(salt_id)
        account.held_bytes -= size
        account.num_entries -= 1
        account.order.pop(key, None)
        was_parked = self.unpark(account, key)
        self._changed(account)
        return was_parked

    def park(self, account: Account[K], key: K, size: int) -> None:
        """The tier came across an entry that it is not to evict, and has taken it out of its own order."""
        account.parked[key] = size
        self.num_parked += 1
        self._changed(account)

    def unpark(self, account: Account[K], key: K) -> bool:
        """The tier puts an entry back in its own order, if it was parked."""
        if account.parked.pop(key, None) is None:
            return False
        self.num_parked -= 1
        self._changed(account)
        return True

    def releasing(self) -> Iterator[tuple[Account[K], K]]:
        """Parked entries that are no longer reserved: they were in front of all others once, and go before them.

        The caller evicts or unparks each before it asks for the next.
        """
        while self._releasing:
            account = next(iter(self._releasing))
            yield account, next(iter(account.parked))

    def _changed(self, account: Account[K]) -> None:
        """Keep in mind whether the account's first parked entry may go."""
        if account.parked and not account.protects(next(iter(account.parked.values()))):
            self._releasing[account] = None
        else:
            self._releasing.pop(account, None)

    # What an operator sets

    def change(self, salt_id: bytes, quota: Quota) -> bool:
        """Set the amounts of an account, if that is all that there is to do."""
        account = self._accounts.get(salt_id)
        if account is None or not account.is_named:
            return False
        if (account.quota.limit_bytes is None) != (quota.limit_bytes is None):
            return False
        account.quota = quota
        self._changed(account)
        return True

    def rebuild(
        self,
        quotas: Mapping[bytes, Quota],
        default: Quota | None,
        held: Iterable[tuple[K, bytes, int]],
        leaving: Iterable[tuple[bytes, int]],
    ) -> None:
        """Have these quotas from now on. ``held`` are the key, salt and size of each entry; ``leaving`` salt and
        size of room that is not given back yet.

        Walks over all entries. Those of an account that had no limit are ordered by when they were stored.
        """
        old = list(self.all())
        self.default = default
        self._accounts = {salt_id: Account(quota, salt_id) for salt_id, quota in quotas.items()}
        self._releasing.clear()
        for before in old:
            after = self._accounts.get(before.salt_id) if before is not self.others else None
            if after is not None:
                after.num_evicted, after.num_refused = before.num_evicted, before.num_refused
        self.others = Account()
        used = {key: None for before in old for key in before.order}
        parked = {key: size for before in old for key, size in before.parked.items()}
        owners: dict[bytes, Account[K]] = {}
        kept: dict[K, Account[K]] = {}
        """The entries that have a place in their account."""
        for key, salt_id, size in held:
            account = owners.get(salt_id)
            if account is None:
                self.take(salt_id, 0)
                account = owners[salt_id] = self.of(salt_id)
            account.held_bytes += size
            account.used_bytes += size
            account.num_entries += 1
            if account.quota.limit_bytes is not None or key in parked:
                kept[key] = account
        for salt_id, size in leaving:
            self.take(salt_id, size)
        self._order(used, parked, kept)
        for account in self.all():
            self._changed(account)

    @staticmethod
    def _order(used: Mapping[K, None], parked: Mapping[K, int], kept: Mapping[K, Account[K]]) -> None:
        """Give entries their places: those that had one before come first, in the same order."""
        for key in itertools.chain(used, (key for key in kept if key not in used)):
            account = kept.get(key)
            if account is not None and account.quota.limit_bytes is not None:
                account.order[key] = None
        for key, size in parked.items():
            if key in kept:
                kept[key].parked[key] = size
