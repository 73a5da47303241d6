import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.ingest.listing import (
    MAX_CAPTION_CHARS,
    ROWS,
    RowsDigest,
    at_hand_rows,
    url_fault,
    url_rows,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
BAD_URLS = [
    ("", "empty"),
    ("   ", "empty"),
    ("http://a.b/" + "x" * 2000, "2011 characters"),
    ("ftp://a.b/c", "scheme 'ftp'"),
    ("javascript:alert(1)", "scheme 'javascript'"),
    ("file:///etc/passwd", "scheme 'file'"),
    ("file:n01/1.jpg", "scheme 'file'"),
    ("tar:1.tar#0+1", "scheme 'tar'"),
    ("a.b/c", "scheme ''"),
    ("http:///c", "no host"),
    ("http://[::1/c", "not a URL"),
    ("http://a.b:port/c", "not a URL"),
    ("http://a.b:99999/c", "not a URL"),
    ("http://a.b/c\rd", "control character"),
    ("http://a.b/c\nd", "control character"),
    ("http://a.b/c\x00", "control character"),
]


def rows(urls: list, captions: list | None = None, faults: dict[int, str] | None = None) -> list[dict]:
    captions = ["x"] * len(urls) if captions is None else captions
    kinds = [pa.binary() if any(isinstance(v, bytes) for v in column) else pa.string() for column in (urls, captions)]
    batch = url_rows(pa.array(urls, kinds[0]), pa.array(captions, kinds[1]), faults)
    assert batch.schema == ROWS
    return batch.to_pylist()


def test_a_good_row() -> None:
    assert rows([" https://Example.com:80/a.jpg?b "], [" a red ball \r"]) == [
        {
            "url": "https://Example.com:80/a.jpg?b",
            "caption": "a red ball",
            "host": "example.com",
            "reason": None,
            "origin": None,
        }
    ]


@pytest.mark.parametrize(("url", "reason"), BAD_URLS)
def test_bad_urls_say_why_and_leave_their_neighbours_alone(url: str, reason: str) -> None:
    before, bad, after = rows(["http://a.b/1", url, "http://a.b/2"])
    assert before["reason"] is None and after["reason"] is None
    assert reason in bad["reason"] and bad["host"] is None and len(bad["url"]) <= 2000


@pytest.mark.parametrize(
    "url",
    [
        "HTTP://A.B/c",
        "http://bücher.example/ü.jpg",
        "https://u:p@a.b/c",
        "http://[::1]:8080/c",
        "http://a.b?q",
        "http://a.b",
    ],
)
def test_uncommon_urls_are_good_rows(url: str) -> None:
    (row,) = rows([url])
    assert row["reason"] is None and row["url"] == url and row["host"]


def test_nulls_wrong_bytes_and_long_captions_are_bad_rows() -> None:
    url = b"http://a.b/c"
    found = rows(
        [None, url, b"http://a.b/\xff", url, url, url],
        [b"x", None, b"x", b"x\xff", b"x" * (MAX_CAPTION_CHARS + 1), b"x"],
        {5: "known to the reader"},
    )
    assert [row["reason"] for row in found] == [
        "the URL is null",
        "the caption is null",
        "the URL is not UTF-8 at byte 11",
        "the caption is not UTF-8 at byte 1",
        f"the caption is over {MAX_CAPTION_CHARS} characters long",
        "known to the reader",
    ]
    assert found[2]["url"] == "http://a.b/\\xff" and found[3]["caption"] == "x\\xff"
    assert len(found[4]["caption"]) == MAX_CAPTION_CHARS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.one_of(texts, st.sampled_from([u for u, _ in BAD_URLS]), st.binary(max_size=20)), texts)))
def test_what_is_decided_for_many_is_what_is_decided_for_one(pairs: list[tuple]) -> None:
    data = [url.encode() if isinstance(url, str) else url for url, _ in pairs]
    for url, row in zip(data, rows(data, [caption for _, caption in pairs]), strict=True):
        try:
            wanted = url_fault(url.decode().strip(" "))
        except UnicodeDecodeError:
            wanted = row["reason"]
            assert "not UTF-8" in wanted
        assert row["reason"] == wanted
        assert (row["host"] is None) == (wanted is not None)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts, st.none() | texts), max_size=12), st.data())
def test_the_digest_of_rows_does_not_see_how_they_are_cut(table: list[tuple], data: st.DataObject) -> None:
    columns = [pa.array([row[i] for row in table], pa.string()) for i in range(3)]
    whole = pa.Table.from_arrays(columns, names=["a", "b", "c"])
    cut = data.draw(st.integers(0, len(table)))
    digests = []
    for parts in ([whole], [whole.slice(0, cut), whole.slice(cut)]):
        digest = RowsDigest(["a", "b", "c"])
        for part in parts:
            digest.update(part)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]


def test_the_digest_tells_rows_apart() -> None:
    found = set()
    for table in (["a", "b"], ["ab", ""], ["", "ab"], ["b", "a"], ["ab"], ["a", "b", ""], ["a", "b", None], []):
        digest = RowsDigest(["a"])
        digest.update(pa.table({"a": pa.array(table, pa.string())}))
        found.add(digest.hexdigest())
    assert len(found) == 8


def test_rows_at_hand_are_not_held_to_the_rules_of_urls() -> None:
    batch = at_hand_rows(
        ["file:a/1.jpg", "file:" + "x" * 2000, "tar:a.tar#0+0"], [b" a cat ", b"x", b"\xff"], ["a", "b", "c"], {}
    )
    assert batch["reason"].to_pylist() == [
        None,
        "its address is over 2000 characters long; shorten the folder's names",
        "the caption is not UTF-8 at byte 0",
    ]
    assert batch["caption"].to_pylist()[0] == "a cat" and batch["host"].to_pylist() == ["a", None, None]
