"""The namespaces that a core knows."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.cache.io import TierIO
from kvstrata.errors import LayoutError
from kvstrata.types import Namespace


class Namespaces:
    """One object for each namespace, so that entries can compare them by identity. Thread-safe."""

    def __init__(self, tiers: Sequence[TierIO]) -> None:
        self._tiers = tiers
        self._known: dict[bytes, Namespace] = {}

    def intern(self, namespace: Namespace) -> Namespace:
        """The object that stands for ``namespace``.

        Raises:
            LayoutError: a tier has a codec that cannot encode its KV.
        """
        fingerprint = namespace.fingerprint
        known = self._known.get(fingerprint)
        if known is not None:
            return known
        self._check_codecs(namespace)
        return self._known.setdefault(fingerprint, namespace)

    def _check_codecs(self, namespace: Namespace) -> None:
        for tier in self._tiers:
            reason = tier.codec.why_not(namespace.layout) if tier.write_policy != "none" else ""
            if reason:
                raise LayoutError(
                    f"tier {tier.name}: codec {tier.codec.name} cannot encode the KV of {namespace.model_name}: "
                    f"{reason}. Choose a lossless codec for this tier; until then nothing of this model is cached"
                )

    def all(self) -> list[Namespace]:
        """Those that were interned, in that order."""
        return list(self._known.values())
