"""The opt-out list: what it names goes, at the next rebuild of the blocks that hold it, and nothing else is touched."""

import hashlib
from pathlib import Path

import pytest

from fourmill.core.names import SPLITS
from fourmill.core.shards import ShardPlace, read_members, read_receipt
from fourmill.ingest.optout import OptOut, parse_opt_out, publish_opt_out, published_opt_out, read_opt_out
from fourmill.ingest.stale import blocks_to_rebuild

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("domain:example.org", "domain:example.org"),
        ("  Example.ORG.  ", "domain:example.org"),
        ("*.example.org", "domain:example.org"),
        ("domain:bücher.example", "domain:xn--bcher-kva.example"),
        ("10.1.2.3", "domain:10.1.2.3"),
        ("url:https://Example.org/a.jpg?x=1#part", "url://example.org/a.jpg?x=1"),
        ("http://user:secret@example.org:80", "url://example.org/"),
        ("http://example.org:8080/a", "url://example.org:8080/a"),
        ("url:file:n01440764/1.JPEG", "url:file:n01440764/1.JPEG"),
        (f"sha256:{DIGEST.upper()}", f"sha256:{DIGEST}"),
        (DIGEST, f"sha256:{DIGEST}"),
    ],
)
def test_forms_of_an_entry(line: str, entry: str) -> None:
    assert parse_opt_out(f"# a comment\n\n{line}\r\n").text == f"{entry}\n"


@pytest.mark.parametrize(
    "line",
    ["domain:", "domain:https://example.org", "url:example", "sha256:12", "two words", "ftp://example.org/a", "a/b"],
)
def test_a_line_that_is_no_entry_is_named(line: str) -> None:
    with pytest.raises(ValueError, match=r"line 2: .* is no entry; write domain:"):
        parse_opt_out(f"example.org\n{line}\n")


def test_subdomains_are_named_and_other_domains_are_not() -> None:
    opt_out = parse_opt_out("example.org\nhttps://other.test/a.jpg\n" + DIGEST)
    named = {
        "https://example.org/x": "domain:example.org",
        "http://a.b.EXAMPLE.org./x": "domain:example.org",
        "http://myexample.org/x": None,
        "http://example.org.evil.test/x": None,
        "http://other.test/a.jpg": "url://other.test/a.jpg",
        "http://other.test/b.jpg": None,
        "http://[broken": None,
        "file:example.org/a.jpg": None,
    }
    assert {url: opt_out.entry_for([url], []) for url in named} == named
    assert opt_out.entry_for([None, "http://x.test"], [None, DIGEST]) == f"sha256:{DIGEST}"


def test_a_list_is_published_once_and_read_back(ingest) -> None:
    one, other = parse_opt_out(f"b.test\na.test\n{DIGEST}\nhttp://c.test/x"), parse_opt_out("# nothing\n")
    digest = publish_opt_out(ingest.store, one)
    assert publish_opt_out(ingest.store, parse_opt_out(one.text + "# again\n")) == digest == one.digest
    assert published_opt_out(ingest.store.root, digest) == one
    assert publish_opt_out(ingest.store, other) == "" and published_opt_out(ingest.store.root, "") == other == OptOut()


def test_a_list_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*ingest\.opt_out"):
        read_opt_out(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"b\xfccher.example\n")
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        read_opt_out(str(tmp_path / "latin.txt"))
    assert not read_opt_out(None)


def sixteen(ingest, site, answer, jpeg) -> None:
    """Two blocks of two shards of four rows; row 5 redirects to row 5's picture on another path."""
    lines = [f"{site.put(f'/{row}.jpg', answer(jpeg(row)))}\tc" for row in range(16)]
    site.put("/5.jpg", answer(status=302, headers={"Location": "/moved/5.jpg"}))
    site.put("/moved/5.jpg", answer(jpeg(5)))
    ingest.number(lines)
    for block in ingest.layout.block_keys():
        ingest.run(block)
    site.asked.clear()


def opt_out(ingest, quick_config, *entries: str) -> None:
    path = ingest.folder / "opt_out.txt"
    path.write_text("\n".join(entries))
    ingest.config = quick_config(opt_out=str(path))


def stamps(ingest) -> dict[str, int]:
    return {path: ingest.store.path(path).stat().st_mtime_ns for path in ingest.store.list("pics")}


def entries_for(jpeg, how: str, row: int) -> str:
    return {
        "url": f"https://pictures.test/{row}.jpg",
        "final url": f"url:http://pictures.test/moved/{row}.jpg",
        "sha256": hashlib.sha256(jpeg(row)).hexdigest(),
    }[how]


@pytest.mark.parametrize("how", ["url", "final url", "sha256"])
def test_a_named_row_goes_and_only_its_shard_is_written(ingest, site, answer, jpeg, quick_config, how: str) -> None:
    sixteen(ingest, site, answer, jpeg)
    before, split = stamps(ingest), ingest.rows()[5]["split"]
    opt_out(ingest, quick_config, "# asked for by mail", entries_for(jpeg, how, 5))
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == ["block_00"]
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert not site.asked
    row = ingest.rows()[5]
    assert (row["status"], row["digest"]) == ("opted_out", None) and "opt-out list" in row["reason"]
    assert [n for n, found in ingest.rows().items() if found["status"] != "ok"] == [5]
    place = ShardPlace("pics", split, "images", 1)
    assert "000000005" not in dict(read_members(ingest.store, place))
    after = stamps(ingest)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    own = {place.tar, place.rows, place.receipt}
    assert own <= changed | ({place.tar} if not ingest.store.exists(place.tar) else set())
    assert all(path in own or "/_ledger/images/block_" in path for path in changed)
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == []


def test_a_named_domain_goes_from_the_block_that_holds_it(
    ingest, site, answer, jpeg, quick_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = next(iter(site.connect_to.values()))
    monkeypatch.setattr(type(site), "connect_to", {f"{host}:80": here for host in ("pictures.test", "img.other.test")})
    lines = [f"{site.put(f'/{row}.jpg', answer(jpeg(row)))}\tc" for row in range(16)]
    lines[9] = lines[9].replace("pictures.test", "img.other.test")
    ingest.number(lines)
    for block in ingest.layout.block_keys():
        assert ingest.run(block).counts == {"ok": 8}
    before, split = stamps(ingest), ingest.rows()[9]["split"]
    site.asked.clear()
    opt_out(ingest, quick_config, "other.test")
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == ["block_01"]
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert not site.asked
    assert [n for n, row in ingest.rows().items() if row["status"] != "ok"] == [9]
    after, place = stamps(ingest), ShardPlace("pics", split, "images", 2)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path for path in changed if "/shard-" in path} == {place.tar, place.rows, place.receipt}


def test_an_entry_taken_off_brings_its_row_back_and_fetches_only_it(ingest, site, answer, jpeg, quick_config) -> None:
    sixteen(ingest, site, answer, jpeg)
    whole = {path: data for path, data in ingest.files().items() if path.endswith(".tar")}
    opt_out(ingest, quick_config, entries_for(jpeg, "url", 3), entries_for(jpeg, "sha256", 9))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert [n for n, row in ingest.rows().items() if row["status"] == "opted_out"] == [3, 9]
    opt_out(ingest, quick_config, entries_for(jpeg, "url", 3))
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == ["block_01"]
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert dict(site.counts) == {"/9.jpg": 1}
    opt_out(ingest, quick_config)
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert dict(site.counts) == {"/9.jpg": 1, "/3.jpg": 1}
    assert {path: data for path, data in ingest.files().items() if path.endswith(".tar")} == whole


def test_rows_named_by_url_or_domain_are_never_asked_for(ingest, site, answer, jpeg, quick_config) -> None:
    opt_out(ingest, quick_config, "pictures.test")
    lines = [f"{site.put(f'/{row}.jpg', answer(jpeg(row)))}\tc" for row in range(4)]
    ingest.number([*lines, "no tab", "http://10.0.0.1/x\tinside"])
    assert ingest.run("block_00").counts == {"bad_row": 1, "opted_out": 4, "refused_address": 1}
    assert not site.asked
    assert ingest.run("block_00").shards_done == 0


@pytest.mark.parametrize("how", ["final url", "sha256"])
def test_what_only_the_download_shows_is_dropped_at_once(ingest, site, answer, jpeg, quick_config, how: str) -> None:
    opt_out(ingest, quick_config, entries_for(jpeg, how, 5))
    sixteen(ingest, site, answer, jpeg)
    assert ingest.rows()[5]["status"] == "opted_out"
    assert all(ingest.run(block).shards_done == 0 for block in ingest.layout.block_keys())
    assert blocks_to_rebuild(ingest.store, "pics", ingest.layout, ingest.opt_out) == []


def test_the_received_bytes_count_as_well_as_the_stored_ones(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.config = quick_config(max_side_px=50)
    ingest.number([f"{site.put('/0.jpg', answer(jpeg(0, 200, 100)))}\tc"])
    ingest.run("block_00")
    stored, received = ingest.rows()[0]["sha256"], ingest.rows()[0]["source_sha256"]
    assert stored != received == hashlib.sha256(jpeg(0, 200, 100)).hexdigest()
    for digest in (stored, received):
        path = ingest.folder / "opt_out.txt"
        path.write_text(f"sha256:{digest}")
        ingest.config = quick_config(max_side_px=50, opt_out=str(path))
        assert ingest.run("block_00").counts == {"opted_out": 1}


def test_copies_of_a_picture_named_by_its_digest_all_go(ingest, site, answer, jpeg, quick_config) -> None:
    ingest.number([f"{site.put(f'/{row}.jpg', answer(jpeg(row % 7)))}\tc" for row in range(16)])
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert ingest.rows()[8]["status"] == "duplicate"
    opt_out(ingest, quick_config, entries_for(jpeg, "sha256", 1))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    assert [n for n, row in ingest.rows().items() if row["status"] == "opted_out"] == [1, 8, 15]


def test_a_rebuild_for_the_list_that_dies_loses_nothing(
    ingest, site, answer, jpeg, quick_config, die_at_every_change
) -> None:
    def prepare() -> None:
        ingest.config = quick_config()
        sixteen(ingest, site, answer, jpeg)
        opt_out(ingest, quick_config, entries_for(jpeg, "url", 5), entries_for(jpeg, "sha256", 6))

    prepare()
    whole = ingest.run("block_00")
    deaths = 0
    for _ in die_at_every_change(ingest, prepare, lambda: ingest.run("block_00")):
        deaths += 1
        assert ingest.run("block_00").digest == whole.digest
        assert not site.asked
    assert deaths > 8


def test_a_top_up_leaves_opted_out_rows_alone(ingest, site, answer, jpeg, quick_config) -> None:
    sixteen(ingest, site, answer, jpeg)
    opt_out(ingest, quick_config, entries_for(jpeg, "url", 5))
    ingest.run("block_00")
    assert ingest.run("block_00", retry_failed=True).shards_done == 0 and not site.asked


def test_only_shards_that_the_list_names_depend_on_it(ingest, site, answer, jpeg, quick_config) -> None:
    sixteen(ingest, site, answer, jpeg)
    before = {(split, shard): ingest.recipe(split, shard) for split in SPLITS for shard in range(4)}
    opt_out(ingest, quick_config, entries_for(jpeg, "url", 5), "nowhere.test")
    own = (ingest.rows()[5]["split"], 1)
    after = {(split, shard): ingest.recipe(split, shard) for split in SPLITS for shard in range(4)}
    assert [where for where in before if before[where] != after[where]] == [own]
    assert set(after[own].inputs) == {"source", "opt_out"}
    ingest.run("block_00")
    receipt = read_receipt(ingest.store, ShardPlace("pics", own[0], "images", 1))
    assert receipt and receipt.recipe == after[own]
