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


# A ustar header is made of the name, the size and the checksum; the rest is the same for all: mode 0644, owner 0, time 0,
# so that equal samples give equal bytes.
_NAME_BYTES = 100
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"\0" + b"00000000000\0"
_KIND = b"0".ljust(101, b"\0") + b"ustar\00000"
_TAIL = _KIND.ljust(_BLOCK - 156, b"\0")
_SAME_SUM = sum(_OWNER + _TIME + b" " * 8 + _TAIL)  # the checksum itself counts as blanks


def _header(name: str, size: int) -> bytes:
    encoded, octal = name.encode("ascii"), b"%011o" % size
    if len(encoded) > _NAME_BYTES:
        raise TarError(f"member name {name!r} is longer than the {_NAME_BYTES} bytes of a ustar header")
    checksum = b"%06o\0 " % (_SAME_SUM + sum(encoded) + sum(octal))
    return b"".join((encoded.ljust(_NAME_BYTES, b"\0"), _OWNER, octal, _TIME, checksum, _TAIL))


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
