"""What several tests here share: servers on loopback, and ingest as the runtime drives it."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fourmill.ingest.config import IngestConfig
from tests.ingest.deaths import die_at_every_change
from tests.ingest.driven import Ingest, jpeg, quick_config
from tests.ingest.server import HOST, Answer, Site, running

__all__ = ["die_at_every_change"]


@pytest.fixture
def site() -> Iterator[Site]:
    with running(Site()) as server:
        yield server


@pytest.fixture
def other_site() -> Iterator[Site]:
    """A second one, for redirects between hosts."""
    with running(Site()) as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with the key and the certificate of `pictures.test`, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pictures.pem"
    plain_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(plain_key + made.public_bytes(Encoding.PEM))
    return path


@pytest.fixture
def secure_site(certificate: Path) -> Iterator[Site]:
    server = Site()
    server.use_tls(certificate)
    with running(server):
        yield server


@pytest.fixture
def ingest(tmp_path: Path, site: Site) -> Ingest:
    return Ingest(tmp_path, site)


@pytest.fixture(name="jpeg")
def jpeg_maker() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture(name="answer")
def answer_maker() -> type[Answer]:
    return Answer


@pytest.fixture(name="quick_config")
def quick_config_maker() -> Callable[..., IngestConfig]:
    return quick_config
