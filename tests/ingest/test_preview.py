import io

import pytest
from PIL import Image

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
    site.put("/cut", answer(jpeg(9, 200, 200)[:-2000]))
    ingest.number([*listed(site, answer, jpeg), "http://10.0.0.1/x\tinside", "http://pictures.test/cut\tcut"])
    before = preview.survey_block(ingest.store, "pics", ingest.layout, "block_00")
    assert (before.num_shards, before.wanted_shards, before.num_rows) == (0, 4, 0)
    for block in ingest.layout.block_keys():
        report = ingest.run(block)
        found = preview.survey_block(ingest.store, "pics", ingest.layout, block)
        assert found.counts == report.counts and found.num_rows == found.wanted_rows
        assert found.num_shards == found.wanted_shards == 4
    first, second = (preview.survey_block(ingest.store, "pics", ingest.layout, b) for b in ("block_00", "block_01"))
    assert first.counts == {"bad_row": 1, "http_404": 1, "ok": 6}
    assert (first.num_asked, first.num_images, first.num_arrived, first.num_decoded) == (7, 6, 6, 6)
    assert preview.failure_table(first) == [
        ["bad_row", 1, 12.5, "1 column(s), expected 2: URL<TAB>caption"],
        ["http_404", 1, 12.5, "HTTP 404"],
    ]
    assert preview.host_table(first) == [["pictures.test", 7, 85.7]]
    assert second.counts == {"bad_row": 1, "duplicate": 1, "refused_address": 1, "truncated": 1}
    assert (second.num_images, second.num_arrived, second.num_decoded) == (1, 2, 1)
    assert preview.host_table(second) == [["pictures.test", 2, 50.0], ["10.0.0.1", 1, 0.0]]
    assert preview.host_table(second, top=1) == [["pictures.test", 2, 50.0]]
    assert preview.domain_table(ingest.store, "pics")[0] == ["pictures.test", 9]
    assert preview.domain_table(ingest.store, "pics", top=0) == []


def test_a_lost_tar_is_a_shard_that_is_not_there(ingest, site, answer, jpeg) -> None:
    ingest.number(listed(site, answer, jpeg))
    ingest.run("block_00")
    tar = next(path for path in ingest.store.list("pics") if path.endswith(".tar"))
    ingest.store.delete(tar)
    found = preview.survey_block(ingest.store, "pics", ingest.layout, "block_00")
    assert (found.num_shards, found.wanted_shards) == (3, 4)


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
