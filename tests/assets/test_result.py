"""Pictures on an asset's page: there whatever they show, and small enough for the event log."""

import base64
import io
from typing import Any

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from fourmill.assets.result import Verdict, data_version, picture
from fourmill.tokenize.preview import preview_png

LIMIT = 200_000


def shown(value: dg.MetadataValue) -> tuple[str, bytes]:
    """Kind and bytes of a picture in metadata."""
    assert isinstance(value, dg.MarkdownMetadataValue) and value.md_str is not None
    head, _, data = value.md_str.partition(";base64,")
    return head.partition("data:")[2], base64.b64decode(data.removesuffix(")"))


def photographs(num: int, px: int, blur_px: int) -> np.ndarray:
    """Noise with structure of that size: at one pixel nothing compresses it, at some it is as a photograph is."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (num, px // blur_px, px // blur_px, 3), dtype=np.uint8)
    enlarged = [Image.fromarray(one).resize((px, px), Image.Resampling.BICUBIC) for one in small]
    grain = rng.normal(0, 8, (num, px, px, 3))
    return np.clip(np.stack([np.asarray(one) for one in enlarged]) + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("blur_px", [1, 16])
def test_reconstructions_of_photographs_show_on_the_page(blur_px: int) -> None:
    images = photographs(8, 224, blur_px)
    sheet = preview_png("rgb", images, images[:, ::-1])
    assert len(sheet) > LIMIT
    kind, data = shown(picture(sheet, "rgb"))
    assert kind == "image/jpeg" and len(data) <= LIMIT
    before, after = (Image.open(io.BytesIO(one)).convert("RGB") for one in (sheet, data))
    assert after.size == before.size
    assert blur_px == 1 or np.abs(np.asarray(after, float) - np.asarray(before, float)).mean() < 8


def test_a_picture_whose_worst_jpeg_is_too_large_is_halved() -> None:
    sink = io.BytesIO()
    Image.fromarray(photographs(1, 2048, 1)[0]).save(sink, "PNG")
    kind, data = shown(picture(sink.getvalue(), "large"))
    assert kind == "image/jpeg" and len(data) <= LIMIT and Image.open(io.BytesIO(data)).size[0] < 2048


def test_a_small_picture_is_as_it_was_made() -> None:
    flat: Any = np.full((2, 64, 64, 3), 9, np.uint8)
    sheet = preview_png("rgb", flat, flat)
    assert shown(picture(sheet, "flat")) == ("image/png", sheet)


@pytest.mark.parametrize(("blocking", "version"), [(True, "failed-"), (False, "abc")])
def test_what_fails_a_blocking_check_has_the_data_version_of_nothing_else(blocking: bool, version: str) -> None:
    verdict = Verdict("large_enough", False, blocking=blocking)

    @dg.asset(check_specs=[dg.AssetCheckSpec("large_enough", asset="model", blocking=blocking)])
    def model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        return dg.MaterializeResult(
            data_version=data_version(context, "abc", [verdict]), check_results=[verdict.result(context.asset_key)]
        )

    with dg.DagsterInstance.ephemeral() as instance:
        results = [dg.materialize([model], instance=instance, raise_on_error=False) for _ in range(2)]
    events = [event for result in results for event in result.get_asset_materialization_events()]
    found = [(event.materialization.tags or {})["dagster/data_version"] for event in events]
    assert all(one.startswith(version) for one in found) and len(set(found)) == (2 if blocking else 1)
