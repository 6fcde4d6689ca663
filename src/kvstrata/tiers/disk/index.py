"""What the disk tier knows of its files."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from kvstrata.quotas import Account, Accounts, Quota, Usage

TOUCH_SECONDS = 60.0
"""Times of use are written to a file at most this often; they order evictions after a restart."""

FILES_AT_ONCE = 1000
"""In one step of a change of quotas: a millisecond or two."""


class _File(msgspec.Struct, frozen=True, gc=False):
    size: int
    noted: float
    """The time of use that was last written to it."""
    salt_id: bytes | None
    """Whose it is; None: nobody has looked yet."""


class Index:
    """Sizes and owners of the files known, in the order of their last use. State only: no I/O. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._parked: dict[str, _File] = {}
        """Those that quotas keep out of that order."""
        self._accounts: Accounts[str] = Accounts()
        self._used = 0
        self._reserved: dict[bytes, int] = {}
        """Room for files that are being written, by their salts."""

    def reserve(self, size: int, salt_id: bytes = b"") -> tuple[list[str], bool]:
        """Set ``size`` bytes aside for a file.

        Returns the keys to delete for it, which are no longer in the index, and whether there is room. There is
        none, and nothing is set aside, where quotas are in the way, or files that are being written at this moment.
        """
        with self._lock:
            account = self._accounts.of(salt_id)
            victims, fits = self._keep_limit(account, size)
            if fits:
                more, fits = self._take(self._excess() + size, account)
                victims += more
            if fits:
                self._reserved[salt_id] = self._reserved.get(salt_id, 0) + size
                self._accounts.take(salt_id, size)
            else:
                account.num_refused += 1
            return victims, fits

    def unreserve(self, size: int, salt_id: bytes = b"") -> None:
        """Give back what ``reserve`` set aside."""
        with self._lock:
            self._unreserve(size, salt_id)

    def _unreserve(self, size: int, salt_id: bytes) -> None:
        self._reserved[salt_id] -= size
        if not self._reserved[salt_id]:
            del self._reserved[salt_id]
        self._accounts.give_back(salt_id, size)

    def _excess(self) -> int:
        """How much the budget is exceeded by; usually negative."""
        return self._used + sum(self._reserved.values()) - self.max_bytes

    def trim(self) -> list[str]:
        """Take what exceeds the budget out: files of other processes come to light one by one."""
        with self._lock:
            return self._take(self._excess(), None)[0]

    def evict(self, size: int, salt_id: bytes = b"") -> list[str]:
        """Take keys of at least ``size`` bytes out for a salt's file, the least recently used first."""
        with self._lock:
            return self._take(size, self._accounts.of(salt_id))[0]

    def _keep_limit(
        self, account: Account[str], size: int, max_victims: int = sys.maxsize
    ) -> tuple[list[str], bool]:
        """Take out what an account used longest ago until ``size`` bytes more are within its limit."""
        victims: list[str] = []
        limit = account.quota.limit_bytes
        if limit is not None and size > limit:
            return victims, False
        while account.excess_bytes(size) > 0 and account.order and len(victims) < max_victims:
            victims.append(next(iter(account.order)))
            self._drop(victims[-1])
            account.num_evicted += 1
        return victims, account.excess_bytes(size) <= 0

    def _take(self, size: int, account: Account[str] | None) -> tuple[list[str], bool]:
        """Take out keys of at least ``size`` bytes; whether there are as many that quotas allow to go."""
        victims: list[str] = []
        while size > 0:
            key = self._next_victim(account)
            if key is None:
                return victims, False
            size -= self._drop(key)
            victims.append(key)
        return victims, True

    def _next_victim(self, account: Account[str] | None) -> str | None:
        for _, key in self._accounts.releasing():
            return key
        while self._files:
            key, file = next(iter(self._files.items()))
            owner = self._accounts.of(file.salt_id or b"")
            if not owner.protects(file.size):
                return key
            self._parked[key] = self._files.pop(key)
            self._accounts.park(owner, key, file.size)
        return next(iter(account.parked), None) if account is not None else None

    def _drop(self, key: str) -> int:
        """Forget a file that is known; its size."""
        file = self._files.pop(key, None) or self._parked.pop(key)
        owner = file.salt_id or b""
        self._used -= file.size
        self._accounts.removed(owner, key, file.size)
        self._accounts.give_back(owner, file.size)
        return file.size

    def written(self, key: str, size: int, salt_id: bytes, now: float) -> None:
        """A file has its name, in room that was set aside."""
        with self._lock:
            self._unreserve(size, salt_id)
            self._put(key, size, salt_id, now)

    def used(self, key: str, size: int, now: float, salt_id: bytes | None = None) -> bool:
        """``key`` of ``size`` bytes was read or found; True when its last noted use is long ago."""
        with self._lock:
            return self._put(key, size, salt_id, now)

    def _put(self, key: str, size: int, salt_id: bytes | None, now: float) -> bool:
        before = self._find(key)
        noted = 0.0
        if before is not None:
            noted, salt_id = before.noted, before.salt_id if salt_id is None else salt_id
            self._drop(key)
        stale = now - noted > TOUCH_SECONDS
        self._files[key] = _File(size, now if stale else noted, salt_id)
        owner = salt_id or b""
        self._used += size
        self._accounts.take(owner, size)
        self._accounts.added(owner, key, size)
        return stale

    def _find(self, key: str) -> _File | None:
        return self._files.get(key) or self._parked.get(key)

    def removed(self, key: str) -> bool:
        """``key`` has no file any more; True when it was thought to have one."""
        with self._lock:
            if self._find(key) is None:
                return False
            self._drop(key)
            return True

    def size(self, key: str) -> int | None:
        """Bytes of ``key`` as last seen."""
        held = self._find(key)
        return None if held is None else held.size

    def keys(self) -> list[str]:
        """All keys, least recently used first."""
        with self._lock:
            return [*self._parked, *self._files]

    def totals(self) -> tuple[int, int]:
        """Number of entries and their bytes."""
        with self._lock:
            return len(self._files) + len(self._parked), self._used

    # Quotas

    def ownerless(self) -> list[str]:
        """The keys of which nobody has looked whose they are."""
        with self._lock:
            return [key for key, file in self._files.items() if file.salt_id is None]

    def own(self, owners: Mapping[str, bytes]) -> None:
        """It is known whose these are."""
        with self._lock:
            for key, salt_id in owners.items():
                file = self._files.get(key)
                if file is not None and file.salt_id is None:
                    self._files[key] = msgspec.structs.replace(file, salt_id=salt_id)
                    self._accounts.removed(b"", key, file.size)
                    self._accounts.give_back(b"", file.size)
                    self._accounts.take(salt_id, file.size)
                    self._accounts.added(salt_id, key, file.size)

    def change_quotas(self, quotas: Mapping[bytes, Quota], default: Quota | None) -> Iterator[list[str]]:
        """Have these quotas; yields the keys to delete for them.

        A step at a time, between which others have their turn, as ``cache.index.Index.change_quotas`` does it.
        """
        with self._lock:
            keys = [*self._parked, *self._files] if self._accounts.prepare(quotas, default) else []
        while keys:
            with self._lock:
                for key in reversed(keys[-FILES_AT_ONCE:]):
                    file = self._find(key)
                    if file is not None:
                        self._accounts.place(file.salt_id or b"", key)
            del keys[-FILES_AT_ONCE:]
        with self._lock:
            self._accounts.change(quotas, default)
            limited = [account for account in self._accounts.all() if account.order is not None]
        for account in limited:
            fits = False
            while not fits:
                with self._lock:
                    victims, fits = self._keep_limit(account, 0, FILES_AT_ONCE)
                yield victims
                fits = fits or not victims

    def usage(self, salt_id: bytes | None) -> Usage:
        """See ``tiers.base.QuotaTier.usage``."""
        with self._lock:
            return self._accounts.usage(salt_id)
