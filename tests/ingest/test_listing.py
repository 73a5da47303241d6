import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.ingest.listing import MAX_LINE_BYTES, count_rows, iterate_lines, parse_row


def test_a_good_row() -> None:
    row = parse_row(b"https://Example.com/a.jpg\t a red ball \r\n")
    assert (row.url, row.caption, row.status, row.reason) == ("https://Example.com/a.jpg", "a red ball", "ok", None)
    assert row.host == "example.com"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", r"1 column\(s\)"),
        (b"http://a.b/c no tab", r"1 column\(s\)"),
        (b"http://a.b/c\tone\ttwo", r"3 column\(s\)"),
        (b"\tcaption", "empty"),
        (b"   \tcaption", "empty"),
        (b"http://a.b/" + b"x" * 2000 + b"\tlong", "2011 characters"),
        (b"ftp://a.b/c\tcaption", "scheme 'ftp'"),
        (b"javascript:alert(1)\tcaption", "scheme 'javascript'"),
        (b"a.b/c\tcaption", "scheme ''"),
        (b"http:///c\tcaption", "no host"),
        (b"http://[::1/c\tcaption", "not a URL"),
        (b"http://a.b:port/c\tcaption", "not a URL"),
        (b"http://a.b/c\rd\tcaption", "control character"),
        (b"http://a.b/\xff\tcaption", "not UTF-8 at byte 11"),
        (b"x" * (MAX_LINE_BYTES + 1), "longer than"),
    ],
)
def test_bad_rows_say_why(line: bytes, reason: str) -> None:
    row = parse_row(line + b"\n")
    assert row.status == "bad_row" and len(row.url) <= 2000
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.reason)


@given(st.binary(max_size=200))
def test_any_bytes_become_a_row(line: bytes) -> None:
    row = parse_row(line)
    assert row.status in ("ok", "bad_row")
    assert row.url.encode() is not None and row.caption.encode() is not None  # Parquet takes them
    if row.status == "ok":
        assert row.url.lower().startswith(("http://", "https://")) and row.host


@given(st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), max_size=50))
def test_captions_survive(caption: str) -> None:
    row = parse_row(f"http://a.b/c\t{caption}\n".encode())
    assert (row.status, row.caption) == ("ok", caption.strip())


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=20), st.booleans())
def test_lines_are_counted_as_they_are_split(lines: list[bytes], ended: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    wanted = data.split(b"\n")
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted
    got = [line.removesuffix(b"\n") for line in iterate_lines(io.BytesIO(data))]
    assert got[1:] == wanted[1:] and len(got) == len(wanted)


def test_a_very_long_line_is_one_row() -> None:
    data = b"a\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\nb\n"
    lines = list(iterate_lines(io.BytesIO(data)))
    assert [len(line) > MAX_LINE_BYTES for line in lines] == [False, True, False]
    assert parse_row(lines[1]).status == "bad_row" and len(lines[1]) < 2 * MAX_LINE_BYTES


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_bytes("\ufeffhttp://a.b/c\tone\nhttp://a.b/d\ttwo".encode())
    assert count_rows(str(path)) == 2
    with path.open("rb") as file:
        assert [parse_row(line).status for line in iterate_lines(file)] == ["ok", "ok"]
