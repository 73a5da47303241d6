"""Lists in Parquet with named columns, as LAION's, COYO's and DataComp's are."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.ingest.config import SourceConfig
from fourmill.ingest.list_text import CAPTION_NAMES, URL_NAMES, find_column
from fourmill.ingest.listing import BATCH_ROWS, url_rows

_BUFFER_BYTES = 1024**2  # read at once of a column; a row group may be the whole file


def read_parquet(path: Path, config: SourceConfig) -> Iterator[pa.RecordBatch]:
    """Rows of a Parquet file, a few thousand at a time; only the two columns are read.

    A null in either column is a bad row.

    Raises:
        ValueError: not Parquet, or without two columns of strings.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            schema = file.schema_arrow
            url = find_column(schema.names, config.url_column, URL_NAMES, "url_column", config.where)
            caption = find_column(schema.names, config.caption_column, CAPTION_NAMES, "caption_column", config.where)
            names = [_text_column(schema.field(position), config.where) for position in (url, caption)]
            for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
                yield url_rows(_plain(batch.column(names[0])), _plain(batch.column(names[1])))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"the list {config.where!r} is not readable Parquet ({error}); fetch or write it again"
        ) from error


def _text_column(field: pa.Field, where: str) -> str:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    ):
        raise ValueError(f"column {field.name!r} of the list {where!r} is {field.type}, expected strings")
    return field.name


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
