import io
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fourmill.core.labels import decode_boxes, decode_depth, encode_boxes, encode_depth
from fourmill.core.names import SPLITS, Layout, SampleKey, Split, sample_key
from fourmill.core.scene import Scene, render
from fourmill.core.shards import (
    Item,
    MissingShardError,
    Receipt,
    Recipe,
    ShardPlace,
    finished,
    read_members,
    read_rows,
    write_shard,
)
from fourmill.core.store import Store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.canny import encode_edges
from fourmill.pseudolabel.checks import _compare_rows, check_block
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.config import AnyLabellerConfig, DptConfig, SceneConfig
from fourmill.pseudolabel.labeller import NotASceneError
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import ROW_EXTRA, label_format
from fourmill.pseudolabel.preview import label_preview
from fourmill.pseudolabel.stored import WeightsMissingError
from fourmill.pseudolabel.worker import LabelWorker, label_recipe

DATASET = "tiny"
LABELS = ("depth", "normal", "semseg", "det")
pytestmark = pytest.mark.usefixtures("one_thread")
Fill = Callable[[str, dict[int, bytes | None]], None]


def run(store: Store, layout: Layout, label: str, config: AnyLabellerConfig) -> dict[tuple[Split, int], Receipt]:
    worker = LabelWorker(store.root, DATASET, label, config)
    return {
        (split, shard): worker.run(
            ShardJob(split, shard, label_recipe(store, DATASET, split, shard, label, config), "run")
        )
        for shard in layout.shards_of("block_00")
        for split in SPLITS
    }


@pytest.mark.parametrize("label", LABELS)
def test_a_block_of_scenes_is_labelled_exactly(label: str, store: Store, layout: Layout, scenes: list[int]) -> None:
    receipts = run(store, layout, label, SceneConfig(batch_size=1))
    assert sum(receipt.num_ok for receipt in receipts.values()) == len(scenes)
    form = label_format(label)
    found = [
        key
        for split, shard in receipts
        for key, data in read_members(store, ShardPlace(DATASET, split, form.folder, shard))
        if form.decode(data) is not None
    ]
    assert sorted(found) == [sample_key(row) for row in scenes]
    report = check_block(store, DATASET, layout, "block_00", label)
    assert report.passed, report.problems
    assert report.figures["images"] == report.figures["labelled"] == len(scenes)
    assert report.figures["rejected"] == {}


def test_the_stored_depth_is_the_renderers(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], scene: Scene
) -> None:
    truth = render(scene, 32)
    fill("block_00", {0: jpeg(truth.rgb_HWC, scene.model_dump_json())})
    run(store, layout, "depth", SceneConfig())
    ((_, data),) = read_members(store, ShardPlace(DATASET, "train", "depth", 0))
    assert np.abs(decode_depth(data) - truth.depth_HW).max() <= 0.5 / 65535 + 1e-7


@pytest.mark.parametrize("label", LABELS)
def test_the_same_inputs_give_the_same_bytes(label: str, store: Store, layout: Layout, scenes: list[int]) -> None:
    config = seeded_labellers()[label]
    first, again = (run(store, layout, label, config) for _ in range(2))
    assert {k: r.content for k, r in first.items()} == {k: r.content for k, r in again.items()}


def test_a_finished_shard_is_known_by_its_recipe(store: Store, layout: Layout, scenes: list[int]) -> None:
    run(store, layout, "depth", SceneConfig())
    place = ShardPlace(DATASET, "train", "depth", 0)
    recipe = label_recipe(store, DATASET, "train", 0, "depth", SceneConfig())
    assert finished(store, place, recipe)
    assert label_recipe(store, DATASET, "train", 0, "depth", SceneConfig(batch_size=7)) == recipe
    other = label_recipe(store, DATASET, "train", 0, "depth", DptConfig(weights="seeded:0"))
    assert not finished(store, place, other)


def test_new_images_make_a_new_recipe_and_old_plans_are_refused(
    store: Store, layout: Layout, scenes: list[int], fill: Fill, jpeg: Callable[..., bytes], scene: Scene
) -> None:
    planned = label_recipe(store, DATASET, "train", 0, "depth", SceneConfig())
    fill("block_00", {0: jpeg(render(scene, 32).rgb_HWC, scene.model_dump_json())})
    assert label_recipe(store, DATASET, "train", 0, "depth", SceneConfig()) != planned
    with pytest.raises(ValueError, match="have changed since the work was planned"):
        LabelWorker(store.root, DATASET, "depth", SceneConfig()).run(ShardJob("train", 0, planned, "run"))


def test_a_recipe_asks_for_images_and_weights(store: Store, scenes: list[int], tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match="materialize tiny/images"):
        label_recipe(store, DATASET, "train", 9, "depth", SceneConfig())
    with pytest.raises(WeightsMissingError, match="depth labeller"):
        label_recipe(store, DATASET, "train", 0, "depth", DptConfig(weights=str(tmp_path / "none")))


def test_an_image_that_is_not_a_scene_stops_the_block(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    fill("block_00", {0: jpeg(photo(32, 32))})
    with pytest.raises(NotASceneError, match="--labellers seeded"):
        run(store, layout, "semseg", SceneConfig())
    assert not store.exists(ShardPlace(DATASET, "train", "semseg", 0).receipt)


@pytest.mark.parametrize("label", LABELS)
def test_photographs_of_any_shape_go_through_seeded_networks(
    label: str, store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    sizes = {0: (40, 64), 1: (64, 40), 2: (40, 64), 3: (1, 1), 12: (90, 30), 14: (64, 64)}
    fill("block_00", {row: jpeg(photo(*size, row)) for row, size in sizes.items()})
    run(store, layout, label, seeded_labellers()[label])
    report = check_block(store, DATASET, layout, "block_00", label)
    assert report.passed, report.problems
    rows = [
        row
        for split in SPLITS
        for row in read_rows(store, ShardPlace(DATASET, split, label_format(label).folder, 0)).to_pylist()
    ]
    assert {int(row["key"]): (row["height"], row["width"]) for row in rows} == {
        r: s for r, s in sizes.items() if r < 10
    }


def test_an_undecodable_image_is_rejected_with_its_reason(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    whole = jpeg(photo(64, 64))
    fill("block_00", {0: whole, 2: whole[:-200], 4: b"not an image", 6: whole})
    receipts = run(store, layout, "depth", seeded_labellers()["depth"])
    assert receipts["train", 0].counts == {"ok": 2, "undecodable": 2}
    rows = read_rows(store, ShardPlace(DATASET, "train", "depth", 0)).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "undecodable", "undecodable", "ok"]
    assert all("not a readable image" in row["reason"] for row in rows[1:3])
    report = check_block(store, DATASET, layout, "block_00", "depth")
    assert report.passed
    rejected = report.figures["rejected"]
    assert isinstance(rejected, dict) and sum(rejected.values()) == 2  # type: ignore[arg-type]


def test_images_rejected_for_one_reason_are_counted_together(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    whole = jpeg(photo(64, 64))
    fill("block_00", {0: whole, 2: whole, 4: whole, 6: whole[:-200], 8: whole[:-300]})
    run(store, layout, "depth", seeded_labellers()["depth"])
    rows = read_rows(store, ShardPlace(DATASET, "train", "depth", 0)).to_pylist()
    assert (
        len({row["reason"] for row in rows if row["status"] == "undecodable"}) == 2
    )  # rows say how many bytes are missing
    report = check_block(store, DATASET, layout, "block_00", "depth")
    rejected: Any = report.figures["rejected"]
    assert list(rejected.values()) == [2]


def test_a_rejected_image_has_the_same_row_each_time(store: Store, layout: Layout, fill: Fill) -> None:
    fill("block_00", {0: b"not an image"})
    first, again = (run(store, layout, "depth", SceneConfig())["train", 0] for _ in range(2))
    assert first.content == again.content


def test_a_check_names_what_is_missing_wrong_and_of_another_size(
    store: Store, layout: Layout, scenes: list[int]
) -> None:
    report = check_block(store, DATASET, layout, "block_00", "depth")
    assert not report.passed and "tiny/train/depth/shard-00000.tar not there" in report.problems[0]
    run(store, layout, "depth", SceneConfig())
    place = ShardPlace(DATASET, "train", "depth", 0)
    rows, data = read_rows(store, place), list(read_members(store, place))
    recipe = label_recipe(store, DATASET, "train", 0, "depth", SceneConfig())
    assert rows.num_rows == 2

    def rewrite(payloads: dict[SampleKey, bytes]) -> tuple[str, ...]:
        extra = {"width": 32, "height": 32, "figures": [("least", 0.0), ("most", 1.0), ("mean", 0.5), ("clamped", 0.0)]}
        items = [Item(key, ext="png", data=payload, extra=extra) for key, payload in payloads.items()]
        write_shard(store, place, recipe, items, "run", ROW_EXTRA)
        return check_block(store, DATASET, layout, "block_00", "depth").problems

    assert rewrite(dict(data)) == ()
    (gap,) = rewrite(dict(data[:1]))
    assert f"first key that differs {data[1][0]}" in gap
    (small,) = rewrite({data[0][0]: data[0][1], data[1][0]: encode_depth(np.zeros((3, 4), np.float32))})
    assert "4 x 3 pixels, its image 32 x 32" in small
    (foreign,) = rewrite({data[0][0]: data[0][1], data[1][0]: encode_boxes([])})
    assert "not a readable depth map" in foreign


def test_a_check_holds_one_tar_and_the_labels_that_it_decodes(store: Store, jpeg: Callable[..., bytes]) -> None:
    rows, side = 320, 256
    edges = encode_edges(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (side, side)))
    image = jpeg(np.zeros((side, side, 3), np.uint8))
    extra = {"width": side, "height": side, "figures": [("edges", 0.5)]}
    recipe = Recipe(stage="any", code_version="1")
    for split, num in zip(SPLITS, (rows, 0), strict=True):
        keys = [sample_key(row) for row in range(num)]
        pictures = [Item(key, ext="jpg", data=image) for key in keys]
        labels = [Item(key, ext="png", data=edges, extra=extra) for key in keys]
        write_shard(store, ShardPlace(DATASET, split, "images", 0), recipe, pictures, "run")
        write_shard(store, ShardPlace(DATASET, split, "canny", 0), recipe, labels, "run", ROW_EXTRA)
    one_shard = Layout(rows_per_shard=rows, shards_per_block=1, num_blocks=1)
    tracemalloc.start()
    try:
        assert check_block(store, DATASET, one_shard, "block_00", "canny").passed
        assert tracemalloc.get_traced_memory()[1] < 1.6 * rows * len(edges)
    finally:
        tracemalloc.stop()


def test_a_block_that_loses_most_of_its_images_fails(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    fill("block_00", {0: jpeg(photo(40, 40)), 1: b"no", 2: b"no", 3: b"no"})
    run(store, layout, "det", seeded_labellers()["det"])
    report = check_block(store, DATASET, layout, "block_00", "det")
    assert not report.passed and "3 of 4 images were rejected" in report.problems[0]


def test_figures_say_what_a_person_wants_to_know(store: Store, layout: Layout, scenes: list[int]) -> None:
    figures = {}
    for label in LABELS:
        run(store, layout, label, SceneConfig())
        figures[label] = check_block(store, DATASET, layout, "block_00", label).figures
    assert figures["normal"]["share of unit length"] == 1.0
    assert 0 <= figures["depth"]["least"] < figures["depth"]["most"] <= 1
    shares = figures["semseg"]["share of pixels"]
    assert {"sky-other-merged", "floor-other-merged"} < set(shares) and sum(shares.values()) == pytest.approx(
        1, abs=1e-3
    )
    boxes = [
        box
        for split in SPLITS
        for shard in layout.shards_of("block_00")
        for _, data in read_members(store, ShardPlace(DATASET, split, "boxes", shard))
        for box in decode_boxes(data)
    ]
    assert figures["det"]["boxes"] == len(boxes) == sum(figures["det"]["boxes by class"].values())


@pytest.mark.parametrize("label", LABELS)
def test_a_preview_is_a_small_picture_of_images_and_labels(
    label: str, store: Store, layout: Layout, scenes: list[int]
) -> None:
    run(store, layout, label, SceneConfig())
    jpeg = label_preview(store, DATASET, layout, "block_00", label)
    assert len(jpeg) < 100_000 and jpeg == label_preview(store, DATASET, layout, "block_00", label)
    sheet = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    assert sheet.shape[0] >= 4 * 128 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 30


def test_a_preview_of_large_photographs_stays_small(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes]
) -> None:
    rng = np.random.default_rng(0)
    fill("block_00", {row: jpeg(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)) for row in range(0, 8, 2)})
    run(store, layout, "normal", seeded_labellers()["normal"])
    assert len(label_preview(store, DATASET, layout, "block_00", "normal")) < 100_000


def test_a_block_without_labels_has_a_preview_that_says_so(store: Store, layout: Layout, fill: Fill) -> None:
    fill("block_00", {0: None})
    run(store, layout, "depth", SceneConfig())
    assert Image.open(io.BytesIO(label_preview(store, DATASET, layout, "block_00", "depth"))).width > 100
    assert check_block(store, DATASET, layout, "block_00", "depth").passed


def damaged(store: Store, damage: Callable[[Path], None]) -> None:
    damage(Path(store.root) / ShardPlace(DATASET, "train", "images", 0).tar)


OTHER_BYTES = "does not have the digest its receipt names"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-600]), f"{OTHER_BYTES}: delete {{}} and"),
        (lambda tar: tar.write_bytes(b"x" + tar.read_bytes()[1:]), f"{OTHER_BYTES}: delete {{}} and"),
        (lambda tar: tar.unlink(), "is gone, though its receipt is there:"),
    ],
    ids=["truncated", "changed", "gone"],
)
def test_a_damaged_tar_of_images_stops_its_shard_and_says_what_to_do(
    damage: Callable[[Path], None], said: str, store: Store, layout: Layout, scenes: list[int]
) -> None:
    damaged(store, damage)
    images = ShardPlace(DATASET, "train", "images", 0)
    problem = f"{images.tar} {said.format(images.receipt)} materialize tiny/images for its block again"
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        run(store, layout, "depth", SceneConfig())
    assert not store.exists(ShardPlace(DATASET, "train", "depth", 0).receipt)
    assert not store.exists(ShardPlace(DATASET, "train", "depth", 0).tar)


@pytest.mark.parametrize("label", LABELS)
def test_an_image_of_one_pixel_and_one_of_a_thousand_to_one_are_labelled_like_any(
    label: str, store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    sizes = {0: (1, 1), 2: (3, 20000), 4: (20000, 3), 6: (40, 40), 8: (64, 40)}
    fill("block_00", {row: jpeg(photo(*size, row)) for row, size in sizes.items()})
    receipts = run(store, layout, label, seeded_labellers()[label])
    assert receipts["train", 0].counts == {"ok": 5}
    assert check_block(store, DATASET, layout, "block_00", label).passed


def test_the_worker_says_how_long_its_network_was_at_work(store: Store, layout: Layout, scenes: list[int]) -> None:
    worker = LabelWorker(store.root, DATASET, "depth", SceneConfig())
    worker.run(ShardJob("train", 0, label_recipe(store, DATASET, "train", 0, "depth", SceneConfig()), "run"))
    assert 0 < worker.shares["network"] <= 1
    worker.close()


class HalfOfTheTime:
    """A clock whose GPU is at work for as long as the shard takes, on two streams of which each works half of the time."""

    def begin(self) -> None:
        self._start = time.monotonic()

    def spans(self) -> list[tuple[float, float]]:
        now = time.monotonic()
        middle = (self._start + now) / 2
        return [(self._start, middle), (middle, now), (middle, now)]


def test_a_gpus_share_is_by_its_own_clock(store: Store, layout: Layout, scenes: list[int]) -> None:
    worker: Any = LabelWorker(store.root, DATASET, "depth", SceneConfig())
    worker._attempts.labeller.clock = HalfOfTheTime()
    worker.run(ShardJob("train", 0, label_recipe(store, DATASET, "train", 0, "depth", SceneConfig()), "run"))
    assert list(worker.shares) == ["gpu_forward"] and 0.5 < worker.shares["gpu_forward"] <= 1
    worker.close()


def test_labels_made_together_are_those_made_apart(
    store: Store, layout: Layout, fill: Fill, jpeg: Callable[..., bytes], photo: Callable[..., np.ndarray]
) -> None:
    fill("block_00", {row: jpeg(photo(40, 48 + 16 * (row % 3), row)) if row != 4 else b"no" for row in range(0, 10, 2)})
    configs = {label: seeded_labellers()[label] for label in ("depth", "normal")}
    apart = {label: run(store, layout, label, config)["train", 0] for label, config in configs.items()}
    for label in configs:
        store.delete(ShardPlace(DATASET, "train", label, 0).receipt)
    recipes = {label: label_recipe(store, DATASET, "train", 0, label, config) for label, config in configs.items()}
    worker = LabelWorker(store.root, DATASET, "depth", configs["depth"], also={"normal": configs["normal"]})
    together = worker.run(ShardJob("train", 0, recipes["depth"], "run"))
    other = finished(store, ShardPlace(DATASET, "train", "normal", 0), recipes["normal"])
    assert other is not None and together.content == apart["depth"].content and other.content == apart["normal"].content
    assert other.counts == {"ok": 4, "undecodable": 1}
    worker.run(ShardJob("train", 0, recipes["depth"], "another run"))
    assert finished(store, ShardPlace(DATASET, "train", "normal", 0), recipes["normal"]) == other  # done is left alone
    worker.close()


def test_weights_that_changed_under_a_label_made_beside_another_are_refused(
    store: Store,
    layout: Layout,
    fill: Fill,
    jpeg: Callable[..., bytes],
    photo: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    """Else an old network's labels are recorded as those of the new weights."""
    fill("block_00", {0: jpeg(photo(40, 48))})
    seeded = seeded_labellers()
    normal = seeded["normal"].model_copy(update={"weights": str(tmp_path / "normal")})
    made: Any = make_labeller("normal", seeded["normal"])
    made._network.save_pretrained(tmp_path / "normal")
    worker = LabelWorker(store.root, DATASET, "depth", seeded["depth"], also={"normal": normal})
    (tmp_path / "normal" / "config.json").write_text((tmp_path / "normal" / "config.json").read_text() + " ")
    job = ShardJob("train", 0, label_recipe(store, DATASET, "train", 0, "depth", seeded["depth"]), "run")
    with pytest.raises(ValueError, match=r"normal of .*weights have changed since the work was planned"):
        worker.run(job)
    assert not store.exists(ShardPlace(DATASET, "train", "normal", 0).receipt)
    worker.close()


@pytest.mark.parametrize(
    ("label", "figures", "problem"),
    [
        ("semseg", [("class_132", 1.0)], None),
        ("semseg", [("class_200", 1.0)], "ids [200] are no classes"),
        ("det", [("boxes", 1.0), ("person", 1.0)], None),
        ("det", [("boxes", 1.0), ("unicorn", 1.0)], "boxes are called unicorn"),
    ],
)
def test_a_check_looks_at_the_figures_of_every_row(
    store: Store, layout: Layout, scenes: list[int], label: str, figures: list[tuple[str, float]], problem: str | None
) -> None:
    run(store, layout, label, SceneConfig())
    place = ShardPlace(DATASET, "train", label_format(label).folder, 0)
    extra = {"width": 32, "height": 32, "figures": figures}
    items = [Item(key, ext=label_format(label).ext, data=data, extra=extra) for key, data in read_members(store, place)]
    recipe = label_recipe(store, DATASET, "train", 0, label, SceneConfig())
    write_shard(store, place, recipe, items, "run", ROW_EXTRA)
    problems = check_block(store, DATASET, layout, "block_00", label).problems
    assert problems == () if problem is None else problem in "".join(problems), problems


def test_a_rejection_without_a_reason_is_a_problem(store: Store, layout: Layout, scenes: list[int]) -> None:
    run(store, layout, "depth", SceneConfig())
    place = ShardPlace(DATASET, "train", "depth", 0)
    recipe = label_recipe(store, DATASET, "train", 0, "depth", SceneConfig())

    def rewritten(reason: str) -> str:
        (first, _), *others = read_members(store, place)
        extra = {"width": 32, "height": 32, "figures": [("least", 0.0), ("most", 1.0), ("mean", 0.5), ("clamped", 0.0)]}
        rest = [Item(key, ext="png", data=data, extra=extra) for key, data in others]
        write_shard(store, place, recipe, [Item(first, "rejected", reason), *rest], "run", ROW_EXTRA)
        return "".join(check_block(store, DATASET, layout, "block_00", "depth").problems)

    whole = read_rows(store, place).num_rows
    unexplained = rewritten("")
    assert read_rows(store, place).num_rows == whole and "reason" in unexplained


def test_rows_in_another_order_are_a_problem() -> None:
    place = ShardPlace(DATASET, "train", "depth", 0)
    images = [{"key": key, "status": "ok"} for key in ("000000001", "000000002")]
    assert _compare_rows(images, images, place) == []
    assert "another order" in _compare_rows(images, images[::-1], place)[0]


def test_a_recipe_names_the_settings_that_change_labels(store: Store, scenes: list[int]) -> None:
    """Beside the weights, whose digest says nothing of them once they are stored."""
    small, large = (
        label_recipe(store, DATASET, "train", 0, "depth", DptConfig(weights="seeded:0", longer_px=side))
        for side in (64, 96)
    )
    assert small.config != large.config


def test_weights_that_changed_since_the_work_was_planned_are_refused(store: Store, scenes: list[int]) -> None:
    planned = label_recipe(store, DATASET, "train", 0, "depth", SceneConfig())
    job = ShardJob("train", 0, planned.model_copy(update={"weights": "0" * 64}), "run")
    with pytest.raises(ValueError, match="have changed since the work was planned"):
        LabelWorker(store.root, DATASET, "depth", SceneConfig()).run(job)
