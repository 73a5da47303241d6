"""Tar shards: deterministic when written (no times, no owners), suspicious when read.

Members are `{sample key}.{ext}`, regular files only, one sample a member.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from fourmill.core.names import SampleKey

_MEMBER = re.compile(r"^([0-9]{9})\.([a-z0-9]+(?:\.gz)?)$")
_BLOCK = 512
MAX_MEMBER_BYTES = 256 * 1024**2


class TarError(ValueError):
    """A tar that is cut, malformed, or holds what a shard never holds."""


def _header(name: str, size: int) -> bytes:
    """A ustar header: mode 0644, owner 0, time 0, so that equal samples give equal bytes."""
    field = bytearray(_BLOCK)
    encoded = name.encode("ascii")
    if len(encoded) > 100:
        raise TarError(f"member name {name!r} is longer than the 100 bytes of a ustar header")
    field[0 : len(encoded)] = encoded
    field[100:108] = b"0000644\0"
    field[108:116] = field[116:124] = b"0000000\0"
    field[124:136] = b"%011o\0" % size
    field[136:148] = b"00000000000\0"
    field[148:156] = b" " * 8
    field[156:157] = b"0"
    field[257:265] = b"ustar\00000"
    field[148:156] = b"%06o\0 " % sum(field)
    return bytes(field)


class TarWriter:
    """Writes members to a binary stream and digests what it wrote."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._sha = hashlib.sha256()
        self.num_members = 0
        self.num_bytes = 0

    def add(self, key: SampleKey, ext: str, data: bytes) -> None:
        """Append one member.

        Raises:
            TarError: the name is not `{nine digits}.{ext}`.
        """
        name = f"{key}.{ext}"
        if not _MEMBER.match(name):
            raise TarError(f"member name {name!r} is not a nine-digit sample key and an extension")
        self._write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))
        self.num_members += 1

    def close(self) -> str:
        """Write the end of the archive and return the sha256 of all bytes. Does not close the stream."""
        self._write(bytes(2 * _BLOCK))
        return self._sha.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha.update(data)
        self.num_bytes += len(data)


def read_tar(stream: BinaryIO, where: str = "tar") -> Iterator[tuple[SampleKey, str, bytes]]:
    """Yield (sample key, extension, bytes) of every member in order, without ever writing a file.

    Args:
        where: what to call the archive in an error.

    Raises:
        TarError: a link, a folder, a strange name, a member over 256 MiB, or an archive that ends early.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                match = _MEMBER.match(member.name)
                if not member.isfile() or not match:
                    raise TarError(
                        f"{where}: member {member.name!r} is not a sample (nine digits, a dot, an extension)"
                    )
                if member.size > MAX_MEMBER_BYTES:
                    raise TarError(
                        f"{where}: member {member.name!r} declares {member.size} bytes, over {MAX_MEMBER_BYTES}"
                    )
                file = archive.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise TarError(f"{where}: member {member.name!r} ends after {len(data)} of {member.size} bytes")
                yield SampleKey(match[1]), match[2], data
    except (tarfile.TarError, EOFError) as error:
        raise TarError(f"{where}: not a readable tar ({error}); rebuild the shard") from error
