"""From a codec's spelling in the configuration, or its name in a frame, to the codec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from kvstrata import plugins
from kvstrata.codecs.base import Codec
from kvstrata.codecs.chain import SEPARATOR, ChainCodec
from kvstrata.config import chain_fault, parse_codec
from kvstrata.errors import ConfigError, FrameError, PluginError
from kvstrata.types import MissReason

_MAX_PARAMETERS = 32
"""Characters that a frame has room for."""


def open_codec(text: str, general: Mapping[str, Any] | None = None) -> Codec:
    """The codec that ``text`` spells, ready to encode.

    Args:
        text: ``NAME``, ``NAME:VALUE`` or ``NAME:OPTION=VALUE,...``, chained by ``+``.
        general: values for options of any codec that has them and is not given others.

    Raises:
        ConfigError: it is spelled wrong, makes no sense, or cannot encode as it is configured.
        PluginError: there is no such codec, or it cannot be loaded.
    """
    codec = spelled_codec(text, general)
    if len(codec.parameters) > _MAX_PARAMETERS:
        raise ConfigError(
            f"codec {text!r} is not allowed: a frame has no room for {codec.parameters!r}, what it must say of "
            "such a chain; leave one codec out"
        )
    return codec


def spelled_codec(text: str, general: Mapping[str, Any] | None = None) -> Codec:
    """As ``open_codec``, but it need not be able to encode: it may lack a key."""
    try:
        codecs = [_make(name, {**(general or {}), **options}) for name, options in parse_codec(text)]
    except ValueError as error:
        raise ConfigError(f"codec {text!r} is not allowed: {error}") from None
    return codecs[0] if len(codecs) == 1 else ChainCodec(codecs)


def _make(name: str, options: Mapping[str, Any]) -> Codec:
    codec_class = plugins.load("codecs", name)
    known = codec_class.Options.__struct_fields__
    given = {key: value for key, value in options.items() if key in known}
    codec: Codec = codec_class(msgspec.convert(given, codec_class.Options, strict=False))
    return codec


class Decoders:
    """Codecs by the names that frames give, each opened when a frame first asks for it. Thread-safe."""

    def __init__(
        self,
        general: Mapping[str, Any] | None = None,
        known: Iterable[Codec] = (),
        *,
        encrypted_only: bool = False,
    ) -> None:
        """
        Args:
            general: values for options of any codec that has them (keys, say).
            known: codecs that are there already.
            encrypted_only: whether frames that are not encrypted are refused.
        """
        self._general = dict(general or {})
        self._encrypted_only = encrypted_only
        self._found = {codec.name: codec for codec in known}

    def find(self, name: str) -> Codec:
        """The codec of a frame whose header says ``name``.

        Raises:
            FrameError: there is none here (``unknown_codec``), or it does not encrypt and has to
                (``undecryptable``).
        """
        codec = self._find(name)
        if self._encrypted_only and not codec.encrypts:
            raise FrameError(
                MissReason.UNDECRYPTABLE, "it is not encrypted, as require_encryption wants it to be"
            )
        return codec

    def _find(self, name: str) -> Codec:
        codec = self._found.get(name)
        if codec is None:
            codec = self._found[name] = self._open(name)
        return codec

    def _open(self, name: str) -> Codec:
        parts = name.split(SEPARATOR)
        if len(parts) > 1:
            codecs = [self._find(part) for part in parts]
            fault = chain_fault([codec.stage for codec in codecs])
            if fault:
                raise FrameError(MissReason.UNKNOWN_CODEC, f"codec {name!r}: {fault}")
            return ChainCodec(codecs)
        if name not in plugins.names("codecs"):
            raise FrameError(MissReason.UNKNOWN_CODEC, f"codec {name!r} is not known here")
        try:
            return _make(name, self._general)
        except (PluginError, ConfigError) as error:
            raise FrameError(MissReason.UNKNOWN_CODEC, str(error)) from None
