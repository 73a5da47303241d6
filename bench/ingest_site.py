"""A site on loopback for bench.ingest: its pictures, its list, its certificate, and the server (run as a program)."""

import argparse
import asyncio
import functools
import json
import random
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

HOST = "127.0.0.1"
SLOW_S = 1.0
_KINDS = {"missing": 0.10, "cut": 0.01, "short": 0.01, "slow": 0.02}  # the rest is ok
_FALLS = (1.3, 1.5, 1.7, 1.9)  # of amplitude with frequency: photographs lie between


def make_small(folder: Path, count: int) -> None:
    """JPEGs of 400 to 800 pixels, quality 88, of photograph-like noise."""
    rng = np.random.default_rng(0)
    whole = [_noise(1600, 1200, fall, rng) for fall in _FALLS]
    for index in range(count):
        width = int(rng.integers(400, 801))
        height = int(width * rng.uniform(0.6, 0.9))
        x, y = int(rng.integers(1600 - width)), int(rng.integers(1200 - height))
        _write(folder / f"{index:06d}.jpg", whole[index % len(whole)][y : y + height, x : x + width])


def make_large(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of `size`, width and height."""
    rng = np.random.default_rng(1)
    (width, height), margin = size, 350
    whole = [_noise(width + margin, height + margin, fall, rng) for fall in _FALLS]
    for index in range(count):
        x, y = int(rng.integers(margin)), int(rng.integers(margin))
        _write(folder / f"{index:06d}.jpg", whole[index % len(whole)][y : y + height, x : x + width])


def make_tiny(folder: Path, count: int) -> None:
    """JPEGs of 96 x 72 pixels."""
    rng = np.random.default_rng(2)
    whole = _noise(400, 300, 1.7, rng)
    for index in range(count):
        x, y = int(rng.integers(304)), int(rng.integers(228))
        _write(folder / f"{index:06d}.jpg", whole[y : y + 72, x : x + 96])


def plan(count: int, files: Sequence[Path], all_good: bool = False) -> list[tuple[str, str]]:
    """What each row answers, ok, missing, cut, short or slow, and with which file: the same for the same count."""
    rng = random.Random(count)
    kinds = [kind for kind, share in _KINDS.items() for _ in range(round(share * count))] if not all_good else []
    kinds += ["ok"] * (count - len(kinds))
    rng.shuffle(kinds)
    return [(kind, str(files[row % len(files)])) for row, kind in enumerate(kinds)]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """PEM files: key and certificate of `HOST`, its own authority; and the system's authorities with it among them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench.ingest")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    both, authorities = folder / "site.pem", folder / "authorities.pem"
    both.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + made)
    system = ssl.get_default_verify_paths().cafile
    authorities.write_bytes((Path(system).read_bytes() if system else b"") + b"\n" + made)
    return both, authorities


@contextmanager
def serving(rows: Sequence[tuple[str, str]], folder: Path, certificate: Path | None = None) -> Iterator[str]:
    """Serve the rows from a process of its own; yields the URL before the row's number."""
    (folder / "plan.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "bench.ingest_site", str(folder / "plan.json")]
    command += ["--certificate", str(certificate)] if certificate else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        yield f"http{'s' if certificate else ''}://{HOST}:{port}/"
    finally:
        process.terminate()
        process.wait()


def _noise(width: int, height: int, fall: float, rng: np.random.Generator) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    planes = []
    for contrast in (50, 15, 15):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width), np.float32)) / np.maximum(1, frequency) ** fall
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std() * contrast + 128)
    return cv2.cvtColor(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8), cv2.COLOR_YCrCb2RGB)


def _write(path: Path, rgb: np.ndarray) -> None:
    path.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=88, colorsubsampling="420"))


class _Answerer(asyncio.Protocol):
    """One connection, one answer: rows of a real list lie on thousands of hosts, so connections are hardly reused."""

    def __init__(self, rows: list[tuple[str, str]]) -> None:
        self._rows = rows
        self._asked = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._asked += data
        if self._asked.endswith(b"\r\n\r\n"):
            kind, file = self._rows[int(self._asked.split(b" ", 2)[1].strip(b"/").removesuffix(b".jpg"))]
            asyncio.get_running_loop().call_later(SLOW_S if kind == "slow" else 0, self._answer, kind, file)

    def _answer(self, kind: str, file: str) -> None:
        status, body = ("404 Not Found", b"gone") if kind == "missing" else ("200 OK", _read(file))
        body = body[: len(body) * 2 // 3] if kind == "short" else body
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + (body[: len(body) // 2] if kind == "cut" else body))
        self._transport.close()


@functools.cache
def _read(file: str) -> bytes:
    return Path(file).read_bytes()


async def _serve(rows: list[tuple[str, str]], certificate: str | None) -> None:
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Answerer(rows), HOST, 0, ssl=tls, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--certificate")
    given = parser.parse_args()
    asyncio.run(_serve(json.loads(given.plan.read_text()), given.certificate))
