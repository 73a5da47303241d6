"""Bodies that come compressed although nobody asked for it."""

import zlib
from typing import Self

import aiohttp

from fourmill.ingest.failures import FetchFailedError


class Inflater:
    """Undoes gzip or deflate piece by piece, without ever holding more than it is asked for.

    A body that is no gzip although it is said to be comes out as it is: servers label plain pictures so. What follows
    the end of a stream is dropped, as browsers do.
    """

    def __init__(self, encoding: str, http_status: int) -> None:
        self._encoding = encoding
        self._http_status = http_status
        self._head = b""  # of a body that has not shown yet what it is
        self._stream: zlib._Decompress | None = None
        self._is_plain = False

    @classmethod
    def of(cls, response: aiohttp.ClientResponse) -> Self | None:
        """One for a response that says to need it; None for others, unknown encodings among them."""
        if "Content-Encoding" not in response.headers:
            return None
        encoding = response.headers["Content-Encoding"].strip().lower().removeprefix("x-")
        return cls(encoding, response.status) if encoding in ("gzip", "deflate") else None

    def feed(self, piece: bytes, most: int) -> bytes:
        """What a piece of the body becomes, `most` bytes of it.

        Raises:
            FetchFailedError: the stream is broken.
        """
        if self._is_plain:
            return piece
        if self._stream is None:
            piece = self._head = self._head + piece
            if len(piece) < 2:
                return b""
            self._begin(piece)
            return self.feed(piece, most)
        if self._stream.eof:
            return b""
        try:
            return self._stream.decompress(piece, most)
        except zlib.error as error:
            raise FetchFailedError(
                "truncated", f"a broken {self._encoding} stream: {error}", self._http_status
            ) from error

    def end(self) -> bytes:
        """What is left after the last piece.

        Raises:
            FetchFailedError: the body ended within the stream.
        """
        if self._stream is not None and not self._stream.eof:
            raise FetchFailedError("truncated", f"the body ended within its {self._encoding} stream", self._http_status)
        return self._head if self._stream is None and not self._is_plain else b""

    def _begin(self, head: bytes) -> None:
        is_zlib = head[0] & 0x0F == zlib.DEFLATED and int.from_bytes(head[:2], "big") % 31 == 0
        if self._encoding == "gzip":
            self._is_plain = not head.startswith(b"\x1f\x8b")
            window = 16 + zlib.MAX_WBITS
        else:  # of zlib's format, or, by servers that read the name literally, without its header
            window = zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS
        self._stream = None if self._is_plain else zlib.decompressobj(window)
