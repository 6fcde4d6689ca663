"""TLS of the tiers that speak over sockets of ours: parameters of their URLs, and the settings of a connection."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers.urls import flag

TLS_PARAMETERS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs")


class TLSEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is, as far as TLS is concerned. Subclasses say where."""

    tls: bool = False
    ca_file: str = ""
    """Certificates to trust; those of the system when empty."""
    certificate_file: str = ""
    key_file: str = ""
    check_hostname: bool = True
    verify: bool = True

    def describe(self) -> str:
        """The address without secrets."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Without secrets, which subclasses have."""
        return f"Endpoint({self.describe()})"

    def tls_context(self) -> ssl.SSLContext | None:
        """The settings of TLS connections; None for plain ones.

        Raises:
            ConfigError: a certificate file cannot be used.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.certificate_file:
                context.load_cert_chain(self.certificate_file, self.key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS files of {self.describe()} cannot be used: {error}") from error
        context.check_hostname = self.check_hostname and self.verify
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        return context


def tls_fields(tier: str, query: Mapping[str, str]) -> dict[str, Any]:
    """The fields of :class:`TLSEndpoint` for a URL that means TLS.

    Raises:
        ConfigError: a parameter has a value that it cannot have.
    """
    return {
        "tls": True,
        "ca_file": query.get("ssl_ca_certs", ""),
        "certificate_file": query.get("ssl_certfile", ""),
        "key_file": query.get("ssl_keyfile", ""),
        "check_hostname": flag(tier, query, "ssl_check_hostname", {"true": True, "false": False}),
        "verify": flag(tier, query, "ssl_cert_reqs", {"required": True, "none": False}),
    }
