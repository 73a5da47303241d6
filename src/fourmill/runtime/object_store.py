"""A bucket as a store: `s3://bucket/prefix`, the protocol of `core.store` over boto3.

Objects appear whole by nature; large ones are uploaded in parts and completed last. A store that goes away is waited
for, `s3_client.PATIENCE_S` long. What a killed writer had uploaded is invisible and stays until the bucket's lifecycle
rule for unfinished uploads (`AbortIncompleteMultipartUpload`) removes it.
"""

import io
import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from boto3.s3.transfer import TransferConfig

from fourmill.core.store import StoreError, relative_path
from fourmill.runtime.s3_client import ask, make_client, process_client
from fourmill.runtime.s3_streams import PART_BYTES, ObjectReader, ObjectWriter

_BUCKET = re.compile(r"^[A-Za-z0-9._-]{3,63}$")
# One request copies up to 5 GB; above, the copy is made in parts, still without moving bytes through here.
_COPY = TransferConfig(multipart_threshold=1024**3, multipart_chunksize=256 * 1024**2, use_threads=False)


class ObjectStore:
    """Objects below a prefix of a bucket. Threads may share it, processes may be forked from it."""

    def __init__(self, root: str) -> None:
        """Open a store; nothing is asked of it yet.

        Raises:
            StoreError: the root is not `s3://bucket/prefix`.
        """
        scheme, _, rest = root.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not _BUCKET.match(self._bucket):
            raise StoreError(
                f"store root {root!r} is not s3://bucket/prefix (a bucket's name has 3 to 63 of a-z 0-9 . -)"
            )
        self._prefix = "".join(f"{part}/" for part in relative_path(prefix.strip("/")).parts)

    @property
    def root(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def exists(self, path: str) -> bool:
        try:
            self._ask(path, lambda: process_client().head_object(**self._object(path)))
        except FileNotFoundError:
            return False
        return True

    def stamp(self, path: str) -> list[str]:
        found = self._ask(path, lambda: process_client().head_object(**self._object(path)))
        return [str(found["ContentLength"]), str(found["ETag"])]

    def read(self, path: str) -> bytes:
        with self._reader(path) as reader:
            return reader.readall()

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(self._reader(path), buffer_size=1024**2))

    def write(self, path: str, data: bytes) -> None:
        with self.create(path) as stream:
            for start in range(0, len(data), PART_BYTES):
                stream.write(memoryview(data)[start : start + PART_BYTES])

    @contextmanager
    def create(self, path: str) -> Generator[BinaryIO]:
        writer = ObjectWriter(self._where(path), process_client, self._bucket, self._key(path))
        try:
            yield cast(BinaryIO, writer)
            writer.publish()
        except BaseException:
            writer.abort()
            raise

    def copy(self, source: str, target: str) -> None:
        self._ask(
            source, lambda: process_client().copy(self._object(source), self._bucket, self._key(target), Config=_COPY)
        )

    def list(self, folder: str) -> list[str]:
        below = "".join(f"{part}/" for part in relative_path(folder).parts)
        names = (key.removeprefix(self._prefix) for key in _keys(self._bucket, self._prefix + below))
        return sorted(name for name in names if not name.rpartition("/")[2].startswith(".") and not name.endswith("/"))

    def delete(self, path: str) -> None:
        self._ask(path, lambda: process_client().delete_object(**self._object(path)))

    def sweep(self, folder: str, name: str | None = None) -> None:
        """Nothing: what is left here is incomplete multipart uploads, which a lifecycle rule of the bucket aborts."""

    def check(self) -> None:
        client, path = make_client(attempts=2, read_timeout_s=10), f"_probe-{uuid.uuid4().hex[:8]}"
        ask(self.root, lambda: client.put_object(**self._object(path), Body=b"fourmill"), patience_s=0)
        ask(self.root, lambda: client.delete_object(**self._object(path)), patience_s=0)

    def _key(self, path: str) -> str:
        return self._prefix + str(relative_path(path))

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(path)}

    def _where(self, path: str) -> str:
        return f"s3://{self._bucket}/{self._key(path)}"

    def _reader(self, path: str) -> ObjectReader:
        return ObjectReader(self._where(path), process_client, self._bucket, self._key(path))

    def _ask(self, path: str, operation: Any) -> Any:
        return ask(self._where(path), operation)


def _keys(bucket: str, prefix: str) -> list[str]:
    def fetch() -> list[str]:
        pages = process_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    return ask(f"s3://{bucket}/{prefix}", fetch)
