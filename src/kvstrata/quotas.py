"""Who holds how much of one tier, and whose entries may go to make room for whom. Pure state without a lock; the
tier's own guards it.

Each ``cache_salt`` that holds something has an **account**, with a quota or without, so that nothing has to be
counted when a quota is set. Only the order of uses that a limit wants is kept from then on; the tier tells of what
it holds already, a part at a time (``prepare``, ``place``, ``change``). Salts appear as their ids
(``hashing.salt_id``) only.

What another account's load would evict, and is reserved, is **parked**: taken out of the tier's order of eviction,
so that nobody comes across it again before it is used, or its account holds more than is reserved. So each use
of an entry costs at most one parking, however many entries are reserved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Annotated, Any, Generic, TypeVar

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


NO_QUOTA = Quota()
"""Of salts for which nobody has set one."""
_NONE_PARKED: OrderedDict[Any, int] = OrderedDict()
"""What accounts have parked that never parked anything: there may be as many as entries."""


class Account(Generic[K]):
    """What one salt holds."""

    __slots__ = (
        "held_bytes",
        "is_named",
        "num_entries",
        "num_evicted",
        "num_refused",
        "order",
        "parked",
        "quota",
        "salt_id",
        "used_bytes",
    )

    def __init__(self, salt_id: bytes, quota: Quota, *, is_ordered: bool) -> None:
        self.salt_id = salt_id
        self.quota = quota
        self.is_named = False
        """Whether there is a quota for this salt by itself; other accounts are forgotten when they are empty."""
        self.held_bytes = 0
        """Of entries that are held."""
        self.used_bytes = 0
        """With room that is set aside or not given back yet."""
        self.num_entries = 0
        self.num_evicted = 0
        self.num_refused = 0
        self.parked: OrderedDict[K, int] = _NONE_PARKED
        """Reserved entries with their sizes, the one to evict first in front."""
        self.order: OrderedDict[K, None] | None = OrderedDict() if is_ordered else None
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
        self.default: Quota | None = None
        """What each salt without a quota of its own may hold, if that is limited; not for what has no salt."""
        self._accounts: dict[bytes, Account[K]] = {}
        self._releasing: dict[Account[K], None] = {}
        self.num_parked = 0
        self._has_quotas = False
        self._orders_others = False
        """Whether salts without a quota of their own have a limit, or are about to."""

    @property
    def is_empty(self) -> bool:
        """Whether no quota was ever set, or nothing is left of one, so that uses need not be reported."""
        return not self._has_quotas and not self.num_parked

    def of(self, salt_id: bytes) -> Account[K]:
        """The account that entries of a salt belong to."""
        account = self._accounts.get(salt_id)
        if account is None:  # kept as soon as it holds something
            quota = self.default if salt_id else None
            account = Account(salt_id, quota or NO_QUOTA, is_ordered=self._orders_others and bool(salt_id))
        return account

    def all(self) -> Iterator[Account[K]]:
        """Every account."""
        return iter(self._accounts.values())

    @property
    def reserved_bytes(self) -> int:
        """What is reserved in all."""
        return sum(account.quota.reserved_bytes for account in self._accounts.values())

    def usage(self, salt_id: bytes | None) -> Usage:
        """What a salt with a quota holds; None: all that the default quota is for, together."""
        accounts = (a for a in self._accounts.values() if not a.is_named and a.salt_id)
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
        if account.order is not None:
            account.order[key] = None
        self._changed(account)

    def take(self, salt_id: bytes, size: int) -> None:
        """Room was set aside for an entry."""
        account = self.of(salt_id)
        account.used_bytes += size
        self._accounts[salt_id] = account

    def give_back(self, salt_id: bytes, size: int) -> None:
        """That room is free again."""
        account = self.of(salt_id)
        account.used_bytes -= size
        if not account.is_named and account.used_bytes == 0:
            del self._accounts[salt_id]

    def touched(self, salt_id: bytes, key: K) -> bool:
        """An entry was used; whether it had been parked, and is to take part in the tier's order again."""
        account = self.of(salt_id)
        if account.order is not None:
            account.order[key] = None  # also one that has not been placed yet
            account.order.move_to_end(key)
        return self.unpark(account, key)

    def removed(self, salt_id: bytes, key: K, size: int) -> bool:
        """An entry is no longer held; whether it was parked, and so in no order of the tier's."""
        account = self.of(salt_id)
        account.held_bytes -= size
        account.num_entries -= 1
        if account.order is not None:
            account.order.pop(key, None)
        was_parked = self.unpark(account, key)
        self._changed(account)
        return was_parked

    def park(self, account: Account[K], key: K, size: int) -> None:
        """The tier came across an entry that it is not to evict, and has taken it out of its own order."""
        if account.parked is _NONE_PARKED:
            account.parked = OrderedDict()
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

    # What an operator sets: first ``prepare``; then, if that asks for it, ``place`` for each entry; then ``change``

    def prepare(self, quotas: Mapping[bytes, Quota], default: Quota | None) -> bool:
        """Keep the order of uses of what is about to get its first limit; whether entries are to be placed in it.

        Like ``change``, takes as long as a look at each salt.
        """
        self._has_quotas = True
        self._orders_others |= _is_limit(default)
        for salt_id in quotas:
            self._accounts.setdefault(salt_id, self.of(salt_id)).is_named = True
        is_new = False
        for account in self._accounts.values():
            if account.order is None and _is_limit(_quota_of(account, quotas, default)):
                account.order = OrderedDict()
                is_new |= account.num_entries > 0
        return is_new

    def place(self, salt_id: bytes, key: K) -> None:
        """An entry that is held: it goes in front of its account's order, if it has no place there. So the caller
        begins with the one that was stored last."""
        order = self.of(salt_id).order
        if order is not None and key not in order:
            order[key] = None
            order.move_to_end(key, last=False)

    def change(self, quotas: Mapping[bytes, Quota], default: Quota | None) -> None:
        """Have these quotas from now on; what has a limit has been placed."""
        self.default = default
        self._has_quotas = bool(quotas) or default is not None
        self._orders_others = _is_limit(default)
        for account in list(self._accounts.values()):
            quota = _quota_of(account, quotas, default)
            if account.quota is NO_QUOTA:
                account.num_evicted = account.num_refused = 0
            account.quota = quota
            account.is_named = account.salt_id in quotas
            if quota.limit_bytes is None:
                account.order = None
            self._changed(account)
            if not account.is_named and account.used_bytes == 0:
                del self._accounts[account.salt_id]


def _quota_of(account: Account[K], quotas: Mapping[bytes, Quota], default: Quota | None) -> Quota:
    return quotas.get(account.salt_id) or (default if account.salt_id else None) or NO_QUOTA


def _is_limit(quota: Quota | None) -> bool:
    return quota is not None and quota.limit_bytes is not None
