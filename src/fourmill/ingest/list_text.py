"""Lists of text: TSV as CC12M's own (no quotes) and CSV (quotes, line ends in them), any separator, with or without a header."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

import pyarrow as pa

from fourmill.ingest.config import SourceConfig
from fourmill.ingest.listing import BATCH_ROWS, MAX_URL_CHARS, url_rows

MAX_LINE_BYTES = 1024**2  # of a line that is kept; the rest of a longer one is passed over
URL_NAMES = ("url", "image_url")
CAPTION_NAMES = ("caption", "text")
_CHUNK_BYTES = 512 * 1024


@dataclass(frozen=True)
class Columns:
    """How many columns a row has, and which are its URL and caption."""

    count: int
    url: int
    caption: int


def read_tsv(file: BinaryIO, config: SourceConfig) -> Iterator[pa.RecordBatch]:
    """Rows of a list without quotes: a line is a row, whatever is in it.

    Holds one chunk of half a megabyte and its rows, whatever the list's length and that of its longest line.

    Raises:
        ValueError: the header lacks a column that is needed.
    """
    separator = (config.delimiter or "\t").encode()
    batches = iterate_lines(file)
    first = next(batches, [])
    columns, with_header = find_columns(_header_cells(first, separator), config)
    for lines in chain([first[1:] if with_header else first], batches):
        if lines:
            yield _tsv_batch(lines, separator, columns)


def read_csv(file: BinaryIO, config: SourceConfig) -> Iterator[pa.RecordBatch]:
    """Rows of a list with quotes, RFC 4180: cells in double quotes may hold separators, line ends and doubled quotes.

    A row whose quotes are wrong is a bad row, and reading goes on with the next line. A quote that is never closed
    costs the lines up to the reader's limit for one cell (131,072 characters): they are one bad row.

    Raises:
        ValueError: the header lacks a column that is needed.
    """
    lines = (
        (line + b"\n").decode("utf-8", "surrogateescape") for lines in iterate_lines(file, False) for line in lines
    )
    rows = _csv_rows(csv.reader(lines, delimiter=config.delimiter or ",", strict=True))
    first = next(rows, None)
    columns, with_header = find_columns([] if first is None or isinstance(first, str) else first, config)
    batch: list[list[str] | str] = [] if first is None or with_header else [first]
    for row in rows:
        batch.append(row)
        if len(batch) >= BATCH_ROWS:
            yield _csv_batch(batch, columns)
            batch = []
    if batch:
        yield _csv_batch(batch, columns)


def iterate_lines(file: BinaryIO, universal: bool = True) -> Iterator[list[bytes]]:
    """Lines of a text without their line ends, a chunk's at a time.

    A byte order mark is dropped. Lines over `MAX_LINE_BYTES` come back longer than that, but cut.

    Args:
        universal: CR LF ends a line too; without it the CR stays, since a CSV may have it in a cell.
    """
    rest, first = b"", True
    while chunk := file.read(_CHUNK_BYTES):
        text = rest + chunk
        if first:
            text, first = text.removeprefix(b"\xef\xbb\xbf"), False
        if universal:
            text = text.replace(b"\r\n", b"\n")
        lines = text.split(b"\n")
        rest = lines.pop()[: MAX_LINE_BYTES + 2]
        if lines:
            yield lines
    if rest:
        yield [rest.removesuffix(b"\r") if universal else rest]


def find_columns(cells: Sequence[str], config: SourceConfig) -> tuple[Columns, bool]:
    """Where a list's URL and caption are, and whether its first row, `cells`, is a header (`SourceConfig.header`).

    Raises:
        ValueError: there is a header, and it lacks a column.
    """
    names = [cell.strip() for cell in cells]
    named = config.url_column is not None or config.caption_column is not None
    known = any(name.lower() in URL_NAMES for name in names)
    if config.header == "no" or (config.header == "auto" and not named and not known):
        return Columns(2, 0, 1), False
    url = find_column(names, config.url_column, URL_NAMES, "url_column", config.where)
    caption = find_column(names, config.caption_column, CAPTION_NAMES, "caption_column", config.where)
    return Columns(len(names), url, caption), True


def find_column(names: Sequence[str], wanted: str | None, usual: Sequence[str], field: str, where: str) -> int:
    """Position of a column: the one that is wanted, else the first with a usual name, whatever its case.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if wanted is not None and wanted in names:
        return names.index(wanted)
    for name in [wanted] if wanted is not None else usual:
        for position, found in enumerate(names):
            if found.lower() == name.lower():
                return position
    expected = repr(wanted) if wanted is not None else " or ".join(map(repr, usual))
    shown = ", ".join(repr(name[:40]) for name in names[:20])
    raise ValueError(f"the list {where!r} has no column {expected} among {shown}; set source.{field}")


def _header_cells(lines: Sequence[bytes], separator: bytes) -> list[str]:
    line = lines[0][:MAX_LINE_BYTES] if lines else b""
    return [cell.decode(errors="replace") for cell in line.split(separator)] if line else []


def _tsv_batch(lines: Sequence[bytes], separator: bytes, columns: Columns) -> pa.RecordBatch:
    rows = [line.split(separator) for line in lines]
    faults = {
        row: _line_fault(lines[row], len(cells), columns)
        for row, cells in enumerate(rows)
        if len(cells) != columns.count or len(lines[row]) > MAX_LINE_BYTES
    }
    for row in faults:
        rows[row] = [b""] * columns.count
        rows[row][columns.url] = _shown(lines[row])
    urls, captions = ([cells[column] for cells in rows] for column in (columns.url, columns.caption))
    return url_rows(pa.array(urls, pa.binary()), pa.array(captions, pa.binary()), faults)


def _line_fault(line: bytes, num_cells: int, columns: Columns) -> str:
    if len(line) > MAX_LINE_BYTES:
        return f"the line is longer than {MAX_LINE_BYTES} bytes"
    return _count_fault(num_cells, columns)


def _count_fault(num_cells: int, columns: Columns) -> str:
    plain = ": URL<TAB>caption" if columns == Columns(2, 0, 1) else ""
    return f"{num_cells} column(s), expected {columns.count}{plain}"


def _shown(line: bytes) -> bytes:
    return line[: 4 * MAX_URL_CHARS].decode(errors="backslashreplace")[:MAX_URL_CHARS].encode()


def _csv_rows(reader: Iterator[list[str]]) -> Iterator[list[str] | str]:
    """Cells of each row, or what is wrong with it."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "; is a quote left open?" if "limit" in str(error) or "end of data" in str(error) else ""
            yield f"not CSV: {error}{unclosed}"


def _csv_batch(rows: Sequence[list[str] | str], columns: Columns) -> pa.RecordBatch:
    urls: list[bytes] = []
    captions: list[bytes] = []
    faults: dict[int, str] = {}
    for row in rows:
        if not isinstance(row, str) and len(row) == columns.count:
            urls.append(row[columns.url].encode("utf-8", "surrogateescape"))
            captions.append(row[columns.caption].encode("utf-8", "surrogateescape"))
            continue
        faults[len(urls)] = row if isinstance(row, str) else _count_fault(len(row), columns)
        cells = [] if isinstance(row, str) else row
        urls.append(_shown(",".join(cells).encode("utf-8", "surrogateescape")))
        captions.append(b"")
    return url_rows(pa.array(urls, pa.binary()), pa.array(captions, pa.binary()), faults)
