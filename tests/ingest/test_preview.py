import io

import pytest
from PIL import Image

from fourmill.core.shards import MissingShardError
from fourmill.ingest import preview


def listed(site, answer, jpeg) -> list[str]:
    lines = [f"{site.put(f'/{i}.jpg', answer(jpeg(i, 300, 200)))}\tpicture {i}" for i in range(6)]
    return [
        *lines,
        "http://pictures.test/dead\tx",
        "no tab",
        "http://pictures.test/0.jpg\tagain",
        "http://a.test\tx\ty",
    ]


def test_figures_of_a_block(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg))
    with pytest.raises(MissingShardError, match="pics/images"):
        preview.status_counts(ingest.store, "pics", ingest.layout, "block_00")
    totals = []
    for block in ingest.layout.block_keys():
        ingest.run(block)
        counts = preview.status_counts(ingest.store, "pics", ingest.layout, block)
        failures = preview.failure_table(ingest.store, "pics", ingest.layout, block)
        assert sum(counts.values()) == preview.rows_in_block(ingest.store, "pics", ingest.layout, block)
        assert {status: rows for status, rows, _ in failures} == {s: n for s, n in counts.items() if s != "ok"}
        totals.append((counts, failures))
    assert totals[0][0] == {"bad_row": 1, "http_404": 1, "ok": 6}
    assert totals[0][1] == [
        ["bad_row", 1, "1 column(s), expected 2: URL<TAB>caption"],
        ["http_404", 1, "HTTP 404"],
    ]
    assert totals[1][0] == {"bad_row": 1, "duplicate": 1}
    assert [preview.rows_in_block(ingest.store, "pics", ingest.layout, b) for b in ("block_00", "block_01")] == [8, 2]
    assert preview.domain_table(ingest.store, "pics") == [["pictures.test", 8]]
    assert preview.domain_table(ingest.store, "pics", top=0) == []


def test_contact_sheets_are_small_pngs(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg))
    for block in ingest.layout.block_keys():
        ingest.run(block)
    sheet = preview.images_preview(ingest.store, "pics", ingest.layout, "block_00", num=5)
    image = Image.open(io.BytesIO(sheet))
    assert image.format == "PNG" and len(sheet) < 60_000 and image.width > 8 * 100
    colours = image.convert("RGB").getcolors(image.width * image.height)
    assert colours and len(colours) > 20
    empty = preview.images_preview(ingest.store, "pics", ingest.layout, "block_01")
    assert Image.open(io.BytesIO(empty)).format == "PNG"


@pytest.mark.parametrize("num", [1, 3, 6, 24])
def test_pictures_come_from_all_shards(ingest, site, answer, jpeg, num) -> None:
    ingest.number(listed(site, answer, jpeg))
    ingest.run("block_00")
    found = preview._pictures(ingest.store, "pics", ingest.layout, "block_00", num)
    assert len(found) == min(num, 6)


def test_noise_still_fits(ingest, site, answer) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    lines = []
    for number in range(8):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(sink, "JPEG", quality=95)
        lines.append(f"{site.put(f'/{number}', answer(sink.getvalue()))}\tnoise")
    ingest.number(lines)
    ingest.run("block_00")
    assert len(preview.images_preview(ingest.store, "pics", ingest.layout, "block_00")) < 60_000
