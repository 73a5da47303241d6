"""Pictures at hand: folder trees and webdataset tars as sources, and nothing read outside their root."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.core.names import Layout, split_of
from fourmill.core.store import LocalStore
from fourmill.ingest.at_hand import AtHandError, file_address, is_at_hand, read_at_hand, tar_address
from fourmill.ingest.at_hand_captions import read_class_names
from fourmill.ingest.at_hand_tar import BrokenTarError, scan_tar
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.rows import open_rows
from fourmill.ingest.source import build_source_index, domains, is_current, read_source_rows
from fourmill.ingest.statuses import STATUSES

FORMATS = {"v7": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def put(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def tar(members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def rows(config: SourceConfig) -> list[dict]:
    with open_rows(config) as opened:
        return [row for batch in opened() for row in batch.to_pylist()]


def folder(root: Path, **options) -> SourceConfig:
    return SourceConfig(kind="folder", root=str(root), **options)


def tars(root: Path, **options) -> SourceConfig:
    return SourceConfig(kind="webdataset", root=str(root), **options)


def refused(config: SourceConfig, url: str, **options) -> tuple[str, str]:
    with pytest.raises(AtHandError) as caught:
        read_at_hand(config, url, **options)
    assert caught.value.status in STATUSES
    return caught.value.status, caught.value.reason


IMAGENET = {
    "n01440764/n01440764_10.JPEG": b"tench 10",
    "n01440764/n01440764_2.JPEG": b"tench 2",
    "n02123045/a b.jpg": b"tabby",
    "n02123045/notes.txt": "no picture",
    "n02123045/.hidden.jpg": b"hidden",
    "synsets.txt": "n01440764 tench, Tinca tinca\nn02123045 tabby, tabby_cat\n",
}


def test_a_folder_tree_is_rows_in_the_order_of_its_paths(tmp_path: Path) -> None:
    config = folder(put(tmp_path, IMAGENET), class_names=str(tmp_path / "synsets.txt"))
    found = rows(config)
    assert [(row["url"], row["caption"], row["host"], row["reason"]) for row in found] == [
        ("file:n01440764/n01440764_10.JPEG", "a photo of a tench", "n01440764", None),
        ("file:n01440764/n01440764_2.JPEG", "a photo of a tench", "n01440764", None),
        ("file:n02123045/a%20b.jpg", "a photo of a tabby", "n02123045", None),
    ]
    assert [read_at_hand(config, row["url"]) for row in found] == [b"tench 10", b"tench 2", b"tabby"]
    assert all(is_at_hand(row["url"]) for row in found)


def test_a_class_is_called_as_its_folder_unless_a_file_says_otherwise(tmp_path: Path) -> None:
    root = put(tmp_path, {"train/golden_retriever/1.png": b"x", "flat.jpg": b"x"})
    flat, nested = rows(folder(root, caption_template="{name}!"))
    assert nested["caption"] == "golden retriever!"
    assert "no class folder" in flat["reason"] and flat["url"] == "file:flat.jpg"
    put(tmp_path, {"names.json": json.dumps({"cat": "a cat"})})
    _, unnamed = rows(folder(root, class_names=str(tmp_path / "names.json")))
    assert unnamed["reason"].startswith("class 'golden_retriever' is not in")


def test_class_names_come_as_lines_or_json(tmp_path: Path) -> None:
    wanted = {"n1": "tench", "n2": "great white shark"}
    for text in (
        "n1 tench, Tinca tinca\n\nn2\tgreat white shark",
        '{"n1": "tench", "n2": "great_white_shark, white shark"}',
        '{"0": ["n1", "tench"], "1": ["n2", "great_white_shark"]}',
    ):
        assert read_class_names(put(tmp_path, {"names": text}) / "names") == wanted
    for text, message in (
        ("n1\n", "line 1"),
        ('{"n1": 3}', "folder to name"),
        ("{", "not JSON"),
        (b"\xff", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_class_names(put(tmp_path, {"names": text}) / "names")
    with pytest.raises(ValueError, match="cannot be read"):
        read_class_names(tmp_path / "none")


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "1.jpg": b"x",
            "1.txt": " a cat\n",
            "1.json": '{"caption": "a tom"}',
            "2.jpg": b"x",
            "2.txt": b"\xff",
            "2.json": "[1]",
            "3.jpg": b"x",
            "3.json": '{"caption": null}',
            "4.jpg": b"x",
            "4.txt": b"x" * (1024**2 + 1),
            "4.json": "[" * 100_000,
        },
    )
    texts, jsons = rows(folder(root, captions="txt")), rows(folder(root, captions="json"))
    assert (texts[0]["caption"], jsons[0]["caption"]) == ("a cat", "a tom")
    assert [row["reason"] for row in texts[1:]] == [
        "the caption is not UTF-8 at byte 0",
        "no caption: no file '3.txt' in the root",
        "no caption: '4.txt' is over 1048576 bytes",
    ]
    assert [row["reason"] for row in jsons[1:]] == [
        "no caption: its JSON has none",
        "no caption: its JSON has none",
        "no caption: its JSON cannot be read",
    ]
    assert [row["caption"] for row in rows(folder(root, captions="none"))] == [""] * 4


def test_links_out_of_the_root_are_refused_when_listed_and_when_read(tmp_path: Path) -> None:
    secret = put(tmp_path / "outside", {"secret.jpg": b"secret"})
    root = put(tmp_path / "root", {"cat/1.jpg": b"one"})
    (root / "cat" / "2.jpg").symlink_to(secret / "secret.jpg")
    (root / "cat" / "3.jpg").symlink_to("1.jpg")
    (root / "cat" / "4.jpg").symlink_to("4.jpg")
    (root / "dog").symlink_to(secret)
    (root / "up").symlink_to(root)
    config = folder(root)
    reasons = {row["url"]: row["reason"] for row in rows(config)}
    assert reasons["file:cat/1.jpg"] is None and reasons["file:cat/3.jpg"] is None
    assert "link out of the root" in reasons["file:cat/2.jpg"] and reasons["file:cat/4.jpg"]
    assert "link to a folder" in reasons["file:dog"] and "link to a folder" in reasons["file:up"]
    assert len(reasons) == 6
    assert read_at_hand(config, "file:cat/3.jpg") == b"one"
    for url in ("file:cat/2.jpg", "file:dog/secret.jpg", "tar:cat/2.jpg#0+3"):
        assert refused(config, url)[0] == "refused_address"
    assert refused(config, "file:cat/4.jpg")[0] == "unreadable"


@pytest.mark.parametrize(
    "url",
    [
        "file:../outside/secret.jpg",
        "file:cat/../../outside/secret.jpg",
        "file:%2e%2e/outside/secret.jpg",
        "file:/etc/passwd",
        "file:///etc/passwd",
        "file:a%00b",
        "file:",
        "tar:../x.tar#0+1",
        "tar:x.tar",
        "tar:x.tar#-1+1",
        "tar:x.tar#0+1#",
        "http://a.test/1.jpg",
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(tmp_path: Path, url: str) -> None:
    put(tmp_path, {"outside/secret.jpg": b"secret", "root/cat/1.jpg": b"one"})
    assert refused(folder(tmp_path / "root"), url)[0] == "refused_address"


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    config = folder(put(tmp_path, {"1.jpg": b"12345"}))
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refused(config, "file:2.jpg")[0] == "missing"
    assert refused(config, "file:1.jpg/2.jpg")[0] == "missing"
    assert refused(config, "file:pipe.jpg") == ("unreadable", "'pipe.jpg' is not a file")
    assert refused(config, "file:1.jpg", max_bytes=4) == ("too_large", "5 bytes, over 4")
    assert refused(config, "tar:1.jpg#0+999999", max_bytes=4)[0] == "too_large"
    assert refused(config, "tar:1.jpg#3+3")[0] == "truncated"
    assert read_at_hand(config, "tar:1.jpg#1+3") == b"234"


def test_a_machine_without_the_root_says_so_and_calls_no_picture_missing(tmp_path: Path) -> None:
    config = folder(put(tmp_path / "root", {"1.jpg": b"12345"}))
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    for url in ("file:1.jpg", "tar:1.jpg#1+3"):
        with pytest.raises(ValueError, match=rf"no folder at '{tmp_path}/root' on .*: mount it, then run again"):
            read_at_hand(config, url)


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(names.filter(lambda name: not name.startswith(".") and len(name.encode()) < 100), st.binary(max_size=20))
def test_any_file_name_has_an_address_that_is_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    root = put(tmp_path_factory.mktemp("tree"), {f"{name}/{name}.jpg": data})
    (row,) = rows(folder(root, captions="none"))
    assert row["reason"] is None and row["url"].isascii() and row["url"].isprintable()
    assert read_at_hand(folder(root), row["url"]) == data


def test_a_name_that_is_not_utf8_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.jpg")).write_bytes(b"x")
    (row,) = rows(folder(tmp_path))
    assert row["url"] == "file:cat/%FF.jpg" and read_at_hand(folder(tmp_path), row["url"]) == b"x"


def test_img2dataset_tars_are_rows_in_their_own_order(tmp_path: Path) -> None:
    described = json.dumps({"caption": "from json", "url": "http://a.test/1"}).encode()
    root = put(
        tmp_path,
        {
            "00001.tar": tar([("000010000.jpg", b"late"), ("000010000.txt", b"a late one")]),
            "00000.tar": tar(
                [
                    ("000000001.json", described),
                    ("000000001.jpg", b"one"),
                    ("000000001.txt", b"from txt\n"),
                    ("000000000.JPG", b"zero" * 300),
                    ("000000000.json", described),
                    ("000000002.json", described),
                    ("000000003.jpg", b"three"),
                    ("dir/4.seg.png", b"a mask"),
                    ("dir/4.png", b"four"),
                    ("dir/4.txt", b"4"),
                ]
            ),
            "00000.parquet": b"not looked at",
            "00002.tar.gz": b"no",
        },
    )
    config = tars(root)
    found = rows(config)
    assert [(row["caption"], row["reason"]) for row in found] == [
        ("from txt", None),
        ("from json", None),
        ("", "no picture among its members: .json"),
        ("", "no caption: neither .txt nor .json"),
        ("4", None),
        ("a late one", None),
        ("", "a compressed tar, in which no picture has a place of its own; unpack it"),
    ]
    good = [row for row in found if row["reason"] is None]
    assert [read_at_hand(config, row["url"]) for row in good] == [b"one", b"zero" * 300, b"four", b"late"]
    assert good[0]["url"] == "tar:00000.tar#1536+3" and good[0]["host"] == "00000.tar"
    assert [row["caption"] for row in rows(tars(root, captions="json"))][:2] == ["from json", "from json"]
    assert [row["reason"] for row in rows(tars(root, captions="none"))][3] is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.text("abcdé/", max_size=160), st.binary(max_size=1200)), max_size=6),
    st.sampled_from(sorted(FORMATS)),
)
def test_every_tar_that_python_writes_is_scanned_alike(members: list[tuple[str, bytes]], kind: str) -> None:
    named = [(f"{i}{name.rstrip('/')}x", data) for i, (name, data) in enumerate(members)]
    try:
        archive = tar(named, FORMATS[kind])
    except ValueError:  # a ustar has no room for the name
        return
    found = list(scan_tar(io.BytesIO(archive)))
    assert [(m.name, archive[m.offset : m.offset + m.size]) for m in found] == named
    assert all(member.is_file for member in found)


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 4000))
def test_a_spoilt_tar_never_crashes(noise: bytes, at: int) -> None:
    archive = bytearray(tar([("a" * 120 + ".jpg", b"one"), ("b.jpg", b"two")], tarfile.PAX_FORMAT))
    archive[at : at + len(noise)] = noise
    try:
        assert all(member.size >= 0 for member in scan_tar(io.BytesIO(archive)))
    except BrokenTarError:
        pass


def spoilt_size(archive: bytes, field: bytes) -> bytes:
    header = bytearray(archive[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[512:]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda archive: archive[:700], [None, "ends at byte 700"]),
        (lambda archive: archive[:514], ["inside the picture", "ends at byte 514"]),
        (lambda archive: archive[:1024], [None, "without an end mark"]),
        (lambda archive: archive[:1024] + b"x" * 512 + archive[1536:], [None, "no tar header at byte 1024"]),
        (lambda archive: b"", ["ends at byte 0"]),
        (lambda archive: b"<html>" * 200, ["no tar header at byte 0"]),
        (lambda archive: spoilt_size(archive, b"\xff" * 12), ["is no size"]),
        (lambda archive: spoilt_size(archive, b"-0000000001\0"), ["is no size"]),
        (lambda archive: spoilt_size(archive, b"\x80" + b"\0" * 5 + b"\xff" * 6), ["inside the picture", "end mark"]),
    ],
)
def test_a_broken_tar_is_a_bad_row_and_the_others_are_read(
    tmp_path: Path, change: Callable[[bytes], bytes], wanted: list[str | None]
) -> None:
    whole = tar([("1.jpg", b"picture"), ("2.jpg", b"another")])
    put(tmp_path, {"0.tar": change(whole), "1.tar": whole})
    found = [row["reason"] for row in rows(tars(tmp_path, captions="none"))]
    assert found[-2:] == [None, None] and len(found) == len(wanted) + 2
    for reason, expected in zip(found, wanted, strict=False):
        assert (reason is None) == (expected is None) and (expected or "") in (reason or "")


def test_members_that_are_no_files_are_bad_rows(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, kind in (
            ("1.jpg", tarfile.SYMTYPE),
            ("2.jpg", tarfile.LNKTYPE),
            ("3.jpg", tarfile.FIFOTYPE),
            ("d", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    put(tmp_path, {"0.tar": sink.getvalue()})
    assert [row["reason"] for row in rows(tars(tmp_path, captions="none"))] == [
        "its picture is no regular member but a link or a device"
    ] * 3


def test_a_tar_with_an_endless_header_is_not_read_into_memory(tmp_path: Path) -> None:
    archive = tar([("a" * 200 + ".jpg", b"one")], tarfile.PAX_FORMAT)
    put(tmp_path, {"0.tar": spoilt_size(archive, b"77777777777\0")})
    (row,) = rows(tars(tmp_path))
    assert "extended header of 8589934591 bytes" in row["reason"]


def test_pictures_at_hand_are_numbered_split_and_counted_as_a_list_is(tmp_path: Path) -> None:
    root = put(tmp_path / "root", {f"class_{i % 3}/{i}.jpg": b"%d" % i for i in range(10)} | {"flat.jpg": b"x"})
    store, layout = LocalStore(tmp_path / "store"), Layout(rows_per_shard=4, shards_per_block=2, num_blocks=2)
    config = folder(root, val_fraction=0.4)
    index = build_source_index(store, "things", config, layout)
    assert (index.num_rows, index.num_bad_rows, index.num_repeated_urls) == (11, 1, 0)
    found = [row for shard in range(4) for row in read_source_rows(store, "things", shard).to_pylist()]
    assert [row["row"] for row in found] == list(range(11)) and found[-1]["status"] == "bad_row"
    assert all(row["split"] == split_of(row["url"], 0.4) for row in found)
    assert {row["split"] for row in found} == {"train", "val"}
    assert domains(store, "things") == [("class_0", 4), ("class_1", 3), ("class_2", 3)]
    assert is_current(store, "things", config)
    put(root, {"class_0/new.jpg": b"new"})
    assert not is_current(store, "things", config)
    assert build_source_index(store, "things", config, layout).digest != index.digest


def test_a_root_that_cannot_be_used(tmp_path: Path) -> None:
    store, layout = LocalStore(tmp_path / "store"), Layout(num_blocks=1)
    (tmp_path / "bare").mkdir()
    for config, message in (
        (folder(tmp_path / "none"), "no folder at .*source.root"),
        (folder(tmp_path / "bare"), "is empty; it takes at least one picture in a class folder"),
        (tars(tmp_path / "bare"), "is empty; it takes at least one .tar with samples"),
    ):
        with pytest.raises(ValueError, match=message):
            build_source_index(store, "things", config, layout)


def test_addresses_are_written_in_one_way() -> None:
    assert file_address("a b/ü.jpg") == "file:a%20b/%C3%BC.jpg"
    assert tar_address("a#b.tar", 512, 3) == "tar:a%23b.tar#512+3"
