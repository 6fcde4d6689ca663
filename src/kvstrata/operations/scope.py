"""Which entries an operation is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstrata.cache.index import Entry
from kvstrata.errors import OperationError
from kvstrata.hashing import salt_id
from kvstrata.types import Namespace, parse_key


@dataclass(frozen=True)
class Scope:
    """Entries whose key begins with ``prefix``, of one model, of one salt; None or empty does not matter."""

    prefix: str = ""
    model_name: str | None = None
    salt: str | None = None
    """The cache salt of a tenant. Keys do not tell it, so only L1 can be asked for it."""

    def key_filter(self) -> Callable[[str], bool]:
        """Whether a key that begins with ``prefix`` is meant.

        Raises:
            OperationError: a key alone cannot tell.
        """
        if self.salt is not None:
            raise OperationError("keys do not tell their salt: only tier l1 can be filtered by it")
        if self.model_name is None:
            return lambda _: True
        wanted = self.model_name

        def matches(key: str) -> bool:
            try:
                return parse_key(key).model_name == wanted
            except ValueError:
                return False

        return matches

    def entry_filter(self, namespaces: Sequence[Namespace]) -> Callable[[Entry], bool]:
        """Whether an entry of L1 is meant. ``namespaces``: all that its entries can be of."""
        chosen = {
            id(namespace)
            for namespace in namespaces
            if self.model_name is None or namespace.model_name == self.model_name
        }
        salt = None if self.salt is None else salt_id(self.salt)
        prefix = self.prefix

        def matches(entry: Entry) -> bool:
            return (
                id(entry.namespace) in chosen
                and (salt is None or entry.salt_id == salt)
                and (not prefix or entry.namespace.key(entry.chunk_hash, entry.shard).startswith(prefix))
            )

        return matches
