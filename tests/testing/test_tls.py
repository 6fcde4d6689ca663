"""The certificates of the tests, as the strictest of the supported Pythons (3.13) checks them by default."""

import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from kvstrata.testing.tls import Certificates


def test_certificates_follow_rfc_5280(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)

    def load(name: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate(Path(certificates.path(f"{name}.crt")).read_bytes())

    here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    verifier = PolicyBuilder().store(Store([load("authority")])).build_server_verifier(here)
    verifier.verify(load("server"), [])
    for name in ("elsewhere", "expired"):
        with pytest.raises(VerificationError):
            verifier.verify(load(name), [])
