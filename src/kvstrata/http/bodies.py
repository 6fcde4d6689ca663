"""What requests may carry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvstrata.operations.report import DOCSTRINGS_ARE_READ
from kvstrata.quotas import MAX_BYTES

MAX_KEYS = 10_000
MAX_TOKENS = 1_000_000
MAX_PROMPTS = 1000
MAX_PIN_SECONDS = 30 * 24 * 3600

Name = Annotated[str, Field(min_length=1, max_length=500)]
Key = Annotated[str, Field(min_length=1, max_length=2000)]
Salt = Annotated[str, Field(max_length=1000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=MAX_TOKENS)]
Tiers = Annotated[list[Name], Field(min_length=1, max_length=100)]


class Body(BaseModel):
    """Strict: no value is guessed, no key is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=DOCSTRINGS_ARE_READ)


class LookupBody(Body):
    """A prompt to look up. Prompts with images or adapters have other keys, and are not found."""

    tokens: Tokens
    """Token ids, as the inference engine's tokenizer makes them (vLLM: ``POST /tokenize``)."""
    salt: Salt = ""
    """The request's ``cache_salt``."""
    model_name: Name | None = None
    """Only in namespaces of this model."""
    namespace: Name | None = None
    """Only in the namespace whose fingerprint begins so."""


class DeleteBody(Body):
    """What to delete: ``keys``, or else all that agrees with the rest."""

    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_KEYS)] | None = None
    prefix: Key | None = None
    """Keys that begin so."""
    model_name: Name | None = None
    salt: Salt | None = None
    """Of lower tiers, only entries that L1 holds too are found by their salt."""
    tiers: Tiers | None = None
    """Where; null is everywhere."""


class ClearBody(Body):
    """What to empty."""

    tiers: Tiers | None = None
    """Null is all."""


class PinBody(Body):
    """What to keep in L1: ``keys``, or ``tokens``, or else all that agrees with the rest."""

    owner: Name
    """Who wants it; ``DELETE /pins?owner=`` ends all of an owner."""
    seconds: Annotated[float, Field(gt=0, le=MAX_PIN_SECONDS, strict=False)] = 3600
    """Then the pin ends by itself."""
    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_KEYS)] | None = None
    tokens: Tokens | None = None
    prefix: Key | None = None
    model_name: Name | None = None
    salt: Salt | None = None


class WarmBody(Body):
    """What to bring to L1: ``keys``, or ``prompts``."""

    keys: Annotated[list[Key], Field(min_length=1, max_length=MAX_KEYS)] | None = None
    prompts: Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    """Lists of token ids."""
    salt: Salt = ""
    model_name: Name | None = None
    namespace: Name | None = None


class VerifyBody(Body):
    """What to check."""

    tiers: Tiers | None = None
    """Null is all."""
    prefix: Key | None = None
    model_name: Name | None = None
    sample: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """So many entries per tier, chosen at random; null is all of them."""
    delete_bad: bool = False
    """Whether what is bad is deleted. It would never be served: reading checks too."""


class QuotaAmounts(Body):
    """What a salt may hold of one tier."""

    reserved_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)] = 0
    """Loads of other salts never evict it below this."""
    limit_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)] | None = None
    """It never holds more; its own oldest entries go first. Null: as much as there is."""


class QuotaBody(Body):
    """What a salt may hold."""

    salt: Salt | None = None
    """The ``cache_salt``; null: what it was, or the quota's name. Empty: requests without a salt."""
    tiers: Annotated[dict[Name, QuotaAmounts], Field(min_length=1, max_length=100)]
    """Tier -> amounts; tiers that are not named are not bounded. Possible for ``l1`` and disk tiers."""


class RuntimeBody(Body):
    """What to change; what is null stays."""

    l1_budget_bytes: Annotated[int, Field(ge=0, le=2**62)] | None = None
    """Shrinking evicts; growing ends at the size of the pool."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None
    gate: Literal["auto", "always", "never"] | None = None
    """When what tiers hold is loaded, as the setting of that name."""
    stores_frozen: bool | None = None
    bypass: Annotated[dict[Name, bool], Field(max_length=100)] | None = None
    """Tier -> whether it is left alone."""
    ttl_seconds: (
        Annotated[dict[Name, Annotated[int, Field(ge=1, lt=2**31)] | None], Field(max_length=100)] | None
    ) = None
    """Tier -> how long entries that are written from now on live; null is for ever."""
