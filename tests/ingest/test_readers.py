"""Lists in every format they come in."""

import csv
import gzip
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourmill.ingest.config import SourceConfig
from fourmill.ingest.list_text import MAX_LINE_BYTES, iterate_lines
from fourmill.ingest.listing import ROWS
from fourmill.ingest.rows import format_of, open_rows

Row = tuple[str, str]
GOOD: list[Row] = [(f"http://h{i}.test/{i}.jpg", f"a picture, number {i}") for i in range(5)]

no_line_ends = st.characters(exclude_characters="\t\r\n", exclude_categories=["Cs"])
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
paths = st.text(no_line_ends, max_size=20)


def read(path: Path, **options) -> list[dict]:
    with open_rows(SourceConfig(list=str(path), **options)) as rows:
        batches = list(rows())
        assert [batch.to_pylist() for batch in rows()] == [batch.to_pylist() for batch in batches]  # as often as wanted
    assert all(batch.schema == ROWS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def pairs(found: list[dict]) -> list[Row]:
    assert [row["reason"] for row in found] == [None] * len(found)
    return [(row["url"], row["caption"]) for row in found]


def tsv(rows: list[Row], header: tuple[str, ...] = ()) -> bytes:
    return "".join("\t".join(row) + "\n" for row in ([header] if header else []) + rows).encode()


def csv_text(rows: list[Row], header: tuple[str, ...] = (), **options) -> bytes:
    sink = io.StringIO(newline="")
    csv.writer(sink, **options).writerows(([header] if header else []) + rows)
    return sink.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[Row], names: tuple[str, str] = ("url", "caption"), **options) -> bytes:
    sink = io.BytesIO()
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(2)]
    pq.write_table(pa.Table.from_arrays(columns, names=list(names)), sink, **options)
    return sink.getvalue()


WRITERS = {
    "list.tsv": lambda rows: tsv(rows),
    "list.csv": lambda rows: csv_text(rows),
    "header.tsv": lambda rows: tsv(rows, ("url", "caption")),
    "header.csv": lambda rows: csv_text(rows, ("URL", "TEXT")),
    "list.tsv.gz": lambda rows: gzip.compress(tsv(rows)),
    "list.csv.gz": lambda rows: gzip.compress(csv_text(rows)),
    "list.tsv.zst": lambda rows: zstd(tsv(rows)),
    "list.csv.zst": lambda rows: zstd(csv_text(rows)),
    "list.parquet": lambda rows: parquet(rows),
    "small-groups.pq": lambda rows: parquet(rows, row_group_size=2, compression="zstd"),
}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(paths.map(lambda path: f"http://a.test/{path}"), st.text(no_line_ends, max_size=30)), min_size=1)
)
@example([("http://a.test/", '"'), ("http://a.test/ü", '"a"" ,b'), ("http://a.test/x", "")])
def test_the_same_rows_are_read_from_every_format(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    folder = tmp_path_factory.mktemp("lists")
    found = {}
    for name, write in WRITERS.items():
        (folder / name).write_bytes(write(rows))
        found[name] = read(folder / name)
    assert all(other == found["list.parquet"] for other in found.values())
    assert len(found["list.parquet"]) == len(rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(paths.map(lambda path: f"http://a.test/{path}"), anything), min_size=1))
@example([("http://a.test/1", "two\nlines"), ("http://a.test/2", 'a "word", quoted\r\n'), ("http://a.test/3", "\r")])
def test_captions_with_line_ends_are_read_from_csv_as_from_parquet(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    (folder / "list.csv").write_bytes(csv_text(rows, quoting=csv.QUOTE_ALL))
    (folder / "list.parquet").write_bytes(parquet(rows))
    assert read(folder / "list.csv") == read(folder / "list.parquet")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["list.tsv", "list.csv"]))
def test_any_bytes_are_rows(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("lists") / name
    path.write_bytes(b"http://a.test/1\tx\n" + data)
    rows = read(path, header="no", delimiter="\t")
    assert rows[0]["reason"] is None and all(row["url"] is not None and row["caption"] is not None for row in rows)
    if name == "list.tsv":
        assert len(rows) == 1 + data.count(b"\n") + (not data.endswith(b"\n") and bool(data))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=20), st.booleans())
def test_lines_are_counted_as_they_are_split(lines: list[bytes], ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    wanted = data.split(b"\n")
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted
    got = [line for chunk in iterate_lines(io.BytesIO(data), False) for line in chunk]
    assert got[1:] == wanted[1:] and len(got) == len(wanted)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", r"1 column(s), expected 2: URL<TAB>caption"),
        (b"http://a.b/c no tab", r"1 column(s)"),
        (b"http://a.b/c\tone\ttwo", r"3 column(s)"),
        (b"http://a.b/\xff\xfe", r"1 column(s)"),
        (b"http://a.b/\xff\tcaption", "the URL is not UTF-8 at byte 11"),
        (b"http://a.b/c\rd\tcaption", "control character"),
        (b"x" * (MAX_LINE_BYTES + 1), "the line is longer than"),
        (b"x\t" + b"y" * (3 * MAX_LINE_BYTES), "the line is longer than"),
    ],
)
def test_bad_lines_of_a_tsv(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "list.tsv").write_bytes(b"http://a.b/1\tone\n" + line + b"\nhttp://a.b/2\ttwo")
    before, bad, after = read(tmp_path / "list.tsv")
    assert before["url"] == "http://a.b/1" and after["url"] == "http://a.b/2"
    assert reason in bad["reason"] and len(bad["url"]) <= 2000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "0 column(s), expected 2"),
        (b"http://a.b/c", "1 column(s)"),
        (b"http://a.b/c,one,two", "3 column(s)"),
        (b'http://a.b/c,"one"two', "not CSV"),
        (b"http://a.b/\xff,caption", "the URL is not UTF-8 at byte 11"),
        (b"http://a.b/c,one\rtwo", "not CSV"),
        (b'http://a.b/c,"' + b"x" * 150_000 + b'"', "field larger than field limit (131072); is a quote left open?"),
    ],
)
def test_bad_lines_of_a_csv(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "list.csv").write_bytes(b"http://a.b/1,one\n" + line + b"\nhttp://a.b/2,two")
    before, bad, after = read(tmp_path / "list.csv")
    assert before["url"] == "http://a.b/1" and after["url"] == "http://a.b/2"
    assert reason in bad["reason"]


def test_a_quote_left_open_costs_what_the_reader_had_taken_and_no_more(tmp_path: Path) -> None:
    lines = [b"http://a.b/%d,caption %d\n" % (i, i) for i in range(20_000)]
    lines[3] = b'http://a.b/3,"caption\n'
    (tmp_path / "list.csv").write_bytes(b"".join(lines))
    rows = read(tmp_path / "list.csv")
    assert [row["reason"] is None for row in rows[:4]] == [True, True, True, False]
    assert "is a quote left open?" in rows[3]["reason"] and len(rows) > 14_000
    assert all(row["reason"] is None for row in rows[4:]) and rows[-1]["url"] == "http://a.b/19999"
    (tmp_path / "list.csv").write_bytes(b"".join(lines[:10]))
    assert [row["reason"] for row in read(tmp_path / "list.csv")][3:] == [
        "not CSV: unexpected end of data; is a quote left open?"
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes("\ufeffhttp://a.b/c\tone\r\nhttp://a.b/d\ttwo\r".encode())
    assert pairs(read(tmp_path / "list.tsv")) == [("http://a.b/c", "one"), ("http://a.b/d", "two")]
    (tmp_path / "list.csv").write_bytes("\ufeffURL,caption\r\nhttp://a.b/c,one\r\n".encode())
    assert pairs(read(tmp_path / "list.csv")) == [("http://a.b/c", "one")]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("id\tCaption\tURL\n7\tone\thttp://a.b/1\n8\ttwo\n")
    first, second = read(tmp_path / "list.tsv")
    assert (first["url"], first["caption"]) == ("http://a.b/1", "one")
    assert second["reason"] == "2 column(s), expected 3"
    (tmp_path / "list.csv").write_text("link;alt\nhttp://a.b/1;one\n")
    assert pairs(read(tmp_path / "list.csv", delimiter=";", url_column="link", caption_column="alt")) == [
        ("http://a.b/1", "one")
    ]
    (tmp_path / "list.parquet").write_bytes(parquet(GOOD, ("image_url", "TEXT")))
    assert pairs(read(tmp_path / "list.parquet")) == GOOD


def test_a_header_is_told_by_one_rule(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("link\talt\nhttp://a.b/1\tone\n")
    assert [row["reason"] is None for row in read(path)] == [False, True]  # not known for a header: a bad row
    assert pairs(read(path, url_column="link", caption_column="alt")) == [("http://a.b/1", "one")]
    path.write_text("url\ttext\nhttp://a.b/1\tone\n")
    assert [row["reason"] is None for row in read(path, header="no")] == [False, True]
    path.write_text("http://a.b/1\turl\n")  # a caption that is a column's name: then it takes a word
    with pytest.raises(ValueError, match=r"no column 'caption' or 'text' among .*set source\.caption_column"):
        read(path)
    assert pairs(read(path, header="no")) == [("http://a.b/1", "url")]
    path.write_text("http://a.b/1\tone\n")
    with pytest.raises(ValueError, match=r"no column 'url' or 'image_url' among 'http://a.b/1', 'one'"):
        read(path, header="yes")


def test_a_parquet_null_is_a_bad_row(tmp_path: Path) -> None:
    table = pa.table({"url": [None, "http://a.b/1"], "caption": ["x", None]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert [row["reason"] for row in read(tmp_path / "list.parquet")] == ["the URL is null", "the caption is null"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_strings_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    columns = [pa.array([row[i] for row in GOOD], pa.string()).cast(kind) for i in range(2)]
    pq.write_table(pa.Table.from_arrays(columns, names=["url", "caption"]), tmp_path / "list.parquet")
    assert pairs(read(tmp_path / "list.parquet")) == GOOD


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="not readable Parquet"):
        read(path)
    pq.write_table(pa.table({"url": [1], "caption": ["x"]}), path)
    with pytest.raises(ValueError, match=r"column 'url' .*is int64, expected strings"):
        read(path)
    pq.write_table(pa.table({"link": ["x"], "caption": ["x"]}), path)
    with pytest.raises(
        ValueError, match=r"no column 'url' or 'image_url' among 'link', 'caption'; set source\.url_column"
    ):
        read(path)


def test_a_compressed_list_that_breaks_off(tmp_path: Path) -> None:
    rows = [(f"http://a.b/{i}", "x" * (i % 97)) for i in range(5000)]
    for name, data in (("list.tsv.gz", gzip.compress(tsv(rows))), ("list.csv.zst", zstd(csv_text(rows)))):
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"breaks off .*fetch or write it again"):
            read(tmp_path / name)


def test_compression_is_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes(gzip.compress(tsv(GOOD[:2])) + gzip.compress(tsv(GOOD[2:])))
    assert pairs(read(tmp_path / "list.tsv")) == GOOD
    (tmp_path / "list.tsv.gz").write_bytes(tsv(GOOD))
    assert pairs(read(tmp_path / "list.tsv.gz")) == GOOD


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("a/list.TSV", "tsv"),
        ("list.v2.csv.GZ", "csv"),
        ("s3://bucket/a.b/list.parquet", "parquet"),
        ("https://a.b/list.txt.zst?token=a.csv", "tsv"),
    ],
)
def test_the_ending_tells_the_format(place: str, wanted: str) -> None:
    assert format_of(SourceConfig(list=place)) == wanted


def test_an_ending_that_tells_nothing() -> None:
    with pytest.raises(ValueError, match=r"format of the list 'https://a.b/list' cannot be told .*set source\.format"):
        format_of(SourceConfig(list="https://u:p@a.b/list?token=secret"))
    assert format_of(SourceConfig(list="https://a.b/list?token=secret", format="csv")) == "csv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs `list`"),
        ({"kind": "folder"}, "needs `root`"),
        ({"kind": "folder", "list": "a.tsv"}, "needs `root`"),
        ({"kind": "webdataset", "root": "a", "list": "b"}, "not `list`"),
        ({"list": "a", "root": "b"}, "not `root`"),
        ({"list": "a", "captions": "txt"}, "`captions` has no meaning"),
        ({"kind": "folder", "root": "a", "delimiter": ";"}, "`delimiter` has no meaning"),
        ({"kind": "webdataset", "root": "a", "captions": "class"}, "no class folders"),
        ({"kind": "folder", "root": "a", "caption_template": "a photo"}, "no {name}"),
        ({"list": "a", "header": "no", "url_column": "url"}, "header is 'no'"),
        ({"list": "a", "delimiter": "\n"}, "cannot part columns"),
        ({"list": "a", "format": "json"}, "'tsv', 'csv' or 'parquet'"),
    ],
)
def test_a_source_that_contradicts_itself(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SourceConfig(**options)
    assert message in str(caught.value)
