"""Streams from and to S3: a reader that goes on where a broken connection left it, a writer that uploads as it is fed."""

import io
import logging
import uuid
from collections.abc import Callable
from typing import Any

import urllib3
from botocore.exceptions import BotoCoreError, ClientError

from fourmill.core.store import StoreError, StoreFullError
from fourmill.runtime.s3_client import AWAY, ask, error_code

_log = logging.getLogger(__name__)
PART_BYTES = 8 * 1024**2
"""Smallest part of an upload. S3 takes parts from 5 MiB and 10,000 of them: 78 GiB in all."""

_CHUNK_BYTES = 1024**2
_MAX_BREAKS = 8  # in a row, without a byte in between
_UPLOAD_ID = "fourmill-upload"  # metadata of an object: which upload made it


class ObjectReader(io.RawIOBase):
    """An object as a file. Always the same object: when it was replaced meanwhile, reading ends in StoreError."""

    def __init__(self, where: str, client: Callable[[], Any], bucket: str, key: str) -> None:
        """Ask for the object. Raises FileNotFoundError, StoreError."""
        self._where, self._client, self._object = where, client, {"Bucket": bucket, "Key": key}
        self._body: Any = None  # between two connections
        answer = self._get()
        self._body = answer["Body"]
        self._size, self._etag = int(answer["ContentLength"]), str(answer["ETag"])
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._where}: cannot seek to byte {base + offset}")
        if base + offset != self._at:
            self._drop_body()
            self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._some(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._some(_CHUNK_BYTES), b""))

    def close(self) -> None:
        if not self.closed:
            self._drop_body()
        super().close()

    def _some(self, num_bytes: int) -> bytes:
        """Up to `num_bytes` more; none at the end."""
        breaks = 0
        while self._at < self._size and num_bytes:
            try:
                if self._body is None:
                    self._body = self._rest()
                data = self._body.read(min(num_bytes, self._size - self._at))
                if data:
                    self._at += len(data)
                    if self._at == self._size:
                        self._finish()
                    return data
            except (*AWAY, urllib3.exceptions.HTTPError) as error:
                _log.info("%s broke off at byte %d of %d: %s", self._where, self._at, self._size, error)
            self._drop_body()
            breaks += 1
            if breaks == _MAX_BREAKS:
                raise StoreError(f"{self._where} broke off {breaks} times at byte {self._at}; look at the store's log")
        return b""

    def _rest(self) -> Any:
        answer = self._get(Range=f"bytes={self._at}-", IfMatch=self._etag)
        if answer["ContentLength"] != self._size - self._at:
            raise StoreError(
                f"{self._where}: asked for bytes from {self._at} of {self._size}, the store sends {answer['ContentLength']}; "
                "it does not serve ranges, which reading needs"
            )
        return answer["Body"]

    def _finish(self) -> None:
        """Read the end, where the checksum is compared and the connection is given back."""
        try:
            self._body.read()
        except (BotoCoreError, ClientError) as error:
            if not isinstance(error, AWAY):
                raise StoreError(f"{self._where} arrived damaged ({error}); read it again") from error
        self._body = None

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
        self._body = None

    def _get(self, **extra: str) -> dict[str, Any]:
        return ask(self._where, lambda: self._client().get_object(**self._object, **extra))


class ObjectWriter(io.BufferedIOBase):
    """What is written goes up in parts and is seen by nobody before `publish`; a small object goes up as one."""

    def __init__(self, where: str, client: Callable[[], Any], bucket: str, key: str) -> None:
        self._where, self._client, self._object = where, client, {"Bucket": bucket, "Key": key}
        self._held = bytearray()
        self._at = 0
        self._upload: dict[str, str] = {}
        self._mark = uuid.uuid4().hex
        self._parts: list[dict[str, Any]] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, buffer: Any, /) -> int:
        size = memoryview(buffer).nbytes
        self._held += buffer
        self._at += size
        if len(self._held) >= PART_BYTES:
            self._send_part()
        return size

    def publish(self) -> None:
        """Let the object appear, whole, in place of what was there."""
        if not self._upload:
            self._ask(lambda: self._client().put_object(**self._object, Body=bytes(self._held)))
            return
        if self._held:
            self._send_part()
        self._ask(self._complete)
        self._upload = {}

    def abort(self) -> None:
        """Take back what went up. Failing at it is no error: unfinished uploads are invisible, and stores expire them."""
        if self._upload:
            try:
                self._client().abort_multipart_upload(**self._object, **self._upload)
            except (BotoCoreError, ClientError) as error:
                _log.warning(
                    "%s: its unfinished upload stays where it is until the store expires it: %s", self._where, error
                )
        self._upload = {}
        self._held.clear()

    def _send_part(self) -> None:
        if not self._upload:
            begun = self._ask(
                lambda: self._client().create_multipart_upload(**self._object, Metadata={_UPLOAD_ID: self._mark})
            )
            self._upload = {"UploadId": begun["UploadId"]}
        number, data = len(self._parts) + 1, bytes(self._held)
        self._held.clear()
        sent = self._ask(
            lambda: self._client().upload_part(**self._object, **self._upload, PartNumber=number, Body=data)
        )
        # Where the store keeps checksums, the list of parts has to name them.
        kept = {name: sent[name] for name in ("ETag", "ChecksumCRC32") if name in sent}
        self._parts.append({"PartNumber": number, **kept})

    def _complete(self) -> None:
        try:
            self._client().complete_multipart_upload(
                **self._object, **self._upload, MultipartUpload={"Parts": self._parts}
            )
        except ClientError as error:
            # Asked again after an answer that was lost, a store may know the upload no more, since it is done.
            if error_code(error) != "NoSuchUpload" or not self._is_published():
                raise

    def _is_published(self) -> bool:
        try:
            return self._client().head_object(**self._object)["Metadata"].get(_UPLOAD_ID) == self._mark
        except ClientError as error:
            if error_code(error) == "404":
                return False
            raise

    def _ask(self, operation: Callable[[], Any]) -> Any:
        try:
            return ask(self._where, operation)
        except StoreFullError as error:
            raise StoreFullError(f"{error}; it needs at least {self._at:,} bytes") from error
