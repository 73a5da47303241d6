"""Where the members of a tar lie: a scan of its headers that reads no picture and trusts nothing.

Not Python's tarfile: that keeps every member and reads an extended header of any length it declares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = 512
_MAX_EXTENDED_BYTES = 1024**2  # of a header that carries a long name
_MAX_NAME_BYTES = 4096
_MAX_SIZE = 10**15  # of a member, as many digits as an address has


class BrokenTarError(ValueError):
    """A tar that cannot be read on; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """One member: its name (odd bytes as surrogates), whether it is a regular file, and where its bytes are."""

    name: str
    is_file: bool
    offset: int
    size: int


def scan_tar(file: BinaryIO) -> Iterator[Member]:
    """Members of a tar (v7, ustar, GNU's long names, PAX paths and sizes) in order, folders left out.

    The file may be read between two members; it is put back in place. A member that the file is too short for is
    yielded before the error.

    Raises:
        BrokenTarError: it ends without the two empty blocks, or a header is none.
    """
    at, long_name, extended, length = 0, None, {}, file.seek(0, 2)
    while True:
        if at + _BLOCK > length:  # before it is sought: a header may point further than a file can be
            raise BrokenTarError(f"the tar ends at byte {length} without an end mark")
        file.seek(at)
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        size, kind = _checked(header, at), header[156:157]
        if kind in (b"x", b"L"):
            payload = _extended(file, size, at)
            if kind == b"L":
                long_name = payload.rstrip(b"\0")
            else:
                extended = _pax_records(payload, at)
        elif kind not in (b"g", b"K"):
            size = _number(extended["size"], at) if "size" in extended else size
            name = extended.get("path") or long_name or _name(header)
            if len(name) > _MAX_NAME_BYTES:
                raise BrokenTarError(f"at byte {at}: a name of {len(name)} bytes")
            text = name.decode("utf-8", "surrogateescape")
            if kind != b"5" and not text.endswith("/"):
                plain = kind in (b"0", b"\0", b"7") and not any(key.startswith("GNU.sparse") for key in extended)
                yield Member(text, plain, at + _BLOCK, size)
            long_name, extended = None, {}
        # Links and devices carry no bytes whatever size they declare.
        at += _BLOCK + (0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else -(-size // _BLOCK) * _BLOCK)


def _checked(header: bytes, at: int) -> int:
    """Size that a header declares, once its checksum is right."""
    try:
        declared = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        declared = -1
    if declared != sum(header) - sum(header[148:156]) + 8 * 32:
        raise BrokenTarError(f"no tar header at byte {at}")
    field = header[124:136]
    if field[0] & 0x80:  # GNU's base 256, for 8 GiB and more
        size = int.from_bytes(field[1:], "big")
    else:
        try:
            size = int(field.strip(b" \0") or b"0", 8)
        except ValueError:
            size = -1
    if not 0 <= size < _MAX_SIZE:
        raise BrokenTarError(f"at byte {at}: {field!r} is no size")
    return size


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _extended(file: BinaryIO, size: int, at: int) -> bytes:
    if size > _MAX_EXTENDED_BYTES:
        raise BrokenTarError(f"at byte {at}: an extended header of {size} bytes, over {_MAX_EXTENDED_BYTES}")
    payload = file.read(size)
    if len(payload) < size:
        raise BrokenTarError(f"the tar ends at byte {at + _BLOCK + len(payload)} inside a header")
    return payload


def _pax_records(payload: bytes, at: int) -> dict[str, bytes]:
    """Records such as `27 path=some/long/name.jpg`, each with a line end."""
    records: dict[str, bytes] = {}
    while payload.strip(b"\0"):
        digits, _, _ = payload.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 6 else 0
        record = payload[len(digits) + 1 : length]
        if not record.endswith(b"\n") or length > len(payload):
            raise BrokenTarError(f"at byte {at}: an extended header that cannot be read")
        key, _, value = record[:-1].partition(b"=")
        records[key.decode(errors="replace")] = value
        payload = payload[length:]
    return records


def _number(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 15:
        raise BrokenTarError(f"at byte {at}: {digits[:40]!r} is no size")
    return int(digits)
