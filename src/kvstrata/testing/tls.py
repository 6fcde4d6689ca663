"""TLS for tests: certificates made on the spot, a Redis server with a TLS port. Needs ``cryptography``."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvstrata.testing.process import free_port
from kvstrata.testing.redis_server import RedisServer, server_binary

_Issuer = tuple[x509.Name, ec.EllipticCurvePrivateKey]

_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Certificates:
    """A certificate authority; certificates for 127.0.0.1, an expired one, one of another host, one of clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = self._make("authority", issuer=None)
        self._make("other_authority", issuer=None)
        self._make("server", issuer=self.authority, addresses=["127.0.0.1"])
        self._make("elsewhere", issuer=self.authority, addresses=["192.0.2.1"])
        self._make("client", issuer=self.authority)
        self._make("expired", issuer=self.authority, addresses=["127.0.0.1"], days_left=-1)

    def path(self, name: str) -> str:
        """A file: a name with ``.crt`` or ``.key``."""
        return str(self.directory / name)

    def issue(self, name: str, addresses: Sequence[str]) -> None:
        """A further certificate, for servers at these addresses."""
        self._make(name, issuer=self.authority, addresses=addresses)

    def _make(
        self, name: str, issuer: _Issuer | None, addresses: Sequence[str] = (), days_left: int = 1
    ) -> _Issuer:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0] if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=2))
            .not_valid_after(now + dt.timedelta(days=days_left))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        # The key identifiers and an authority's key usage are what RFC 5280 asks for and Python 3.13 insists on.
        if issuer:
            signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[1].public_key())
            builder = builder.add_extension(signer, critical=False)
        else:
            builder = builder.add_extension(_SIGNS_CERTIFICATES, critical=True)
        if addresses:
            names = x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
            )
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        Path(self.path(f"{name}.crt")).write_bytes(certificate.public_bytes(pem))
        Path(self.path(f"{name}.key")).write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return subject, key


class TLSServer:
    """A server with a TLS port beside the plain one."""

    def __init__(self, certificates: Certificates, name: str, *, client_certificates: bool) -> None:
        self.tls_port = free_port()
        self.certificates = certificates
        lines = [
            f"tls-port {self.tls_port}",
            f"tls-cert-file {certificates.path(name + '.crt')}",
            f"tls-key-file {certificates.path(name + '.key')}",
            f"tls-ca-cert-file {certificates.path('authority.crt')}",
            f"tls-auth-clients {'yes' if client_certificates else 'no'}",
        ]
        self.server = RedisServer(lines, binary=server_binary(tls=True))

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def url(self, authority: str = "authority", more: str = "") -> str:
        """``rediss://`` that trusts ``authority``, with ``more`` parameters."""
        ca = self.certificates.path(f"{authority}.crt")
        return f"rediss://127.0.0.1:{self.tls_port}/0?ssl_ca_certs={ca}{more}"
