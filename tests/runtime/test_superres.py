"""Super-resolution of the smallest demo: what it is scored against, and that tokens and pictures are both taken."""

import json
from pathlib import Path

import numpy as np
import pytest

from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.generation import Generator
from fourmill.runtime.heldout import HeldOut, read_heldout
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.models import current
from fourmill.runtime.session import Session
from fourmill.runtime.superres import WAYS, enlarge, score_superres, superres_picture
from fourmill.runtime.training import train_fourm
from fourmill.tokenize.score import psnr_db


def test_enlarging_keeps_flat_pictures_and_smooths_edges() -> None:
    flat = np.full((2, 4, 4, 3), 77, np.uint8)
    assert np.array_equal(enlarge(flat, 8), np.full((2, 8, 8, 3), 77, np.uint8))
    edge = np.repeat(np.array([[0, 0, 255, 255]], np.uint8), 4, 0)[None, ..., None].repeat(3, -1)
    large = enlarge(edge, 8)
    assert large.shape == (1, 8, 8, 3) and 0 < large[0, 0, 3, 0] < 255
    assert psnr_db(large, edge.repeat(2, 1).repeat(2, 2)) < 40


@pytest.fixture
def session(smallest_demo: Path) -> Session:
    return Session(Workspace(smallest_demo).project())


def heldout_of(session: Session) -> HeldOut:
    return read_heldout(session.store, current_manifest(session)[0], 4)


@pytest.mark.ray
def test_held_out_samples_are_seen_at_both_sizes(session: Session) -> None:
    heldout = heldout_of(session)
    low, high = heldout.views
    assert (low.px, high.px) == (32, 64) and low.rgb_BHWC.shape == (len(heldout), 32, 32, 3)
    assert set(low.tokens) == {"rgb"} and low.tokens["rgb"].shape == (len(heldout), 16)
    assert set(high.tokens) == {"rgb", "depth", "normal", "semseg", "clip"} == set(heldout.tokens)
    assert np.array_equal(high.rgb_BHWC, heldout.maps["rgb"])


@pytest.mark.ray
def test_a_small_picture_and_its_tokens_give_the_same_large_picture(session: Session) -> None:
    low, _ = heldout_of(session).views
    generator = Generator(session)
    tokens, pictures = generator.superres(low.tokens["rgb"])
    assert tokens.shape == (len(pictures), 64) and pictures.shape[1:] == (64, 64, 3)
    again, same = generator.superres(low.rgb_BHWC)
    assert np.array_equal(tokens, again) and np.array_equal(pictures, same)
    with pytest.raises(ValueError, match=r"tok_rgb@32 tokens of shape \(\d+, 64\); this model takes \(B, 16\)"):
        generator.superres(np.zeros((2, 64), np.int16))


@pytest.mark.ray
def test_the_figures_are_those_of_the_asset_and_of_the_page(session: Session, smallest_demo: Path) -> None:
    report = current(session.store, "cc12m", "superres", "fourm/superres").report
    heldout = read_heldout(session.store, current_manifest(session)[0], session.project.samples.num_scored)
    found = score_superres(Generator(session), heldout)
    scored, close = found["psnr_db"], found["psnr_to_tokenizer_db"]
    assert report["scored"] == {**found, "samples": len(heldout)} and set(scored) == set(WAYS)
    assert report["headline"] == {"name": "psnr_db", "value": scored["superres"], "baseline": scored["bicubic"]}
    assert report["figures"]["psnr_db_ceiling"] == scored["tokenizer"]
    assert report["figures"]["psnr_to_tokenizer_db"] == close["superres"]
    assert report["baseline"]["psnr_to_tokenizer_db"] == close["bicubic"]
    page = (smallest_demo / "report" / "index.html").read_text()
    assert "Super-resolution of RGB, 32 to 64 pixels" in page and f"{scored['superres']:.2f}" in page
    assert superres_picture(Generator(session), heldout).startswith(b"\x89PNG")


@pytest.mark.ray
def test_the_fine_tune_starts_from_the_pretrained_model(session: Session) -> None:
    base = current(session.store, "cc12m", "fourm", "fourm/pretrain")
    tuned = current(session.store, "cc12m", "superres", "fourm/superres")
    assert tuned.report["init_from"] == base.path
    known = [json.loads(session.store.read(f"{ref.path}/config.json")) for ref in (base, tuned)]
    assert not any(m["name"].endswith("@32") for m in known[0]["modalities"])
    assert {m["name"] for m in known[1]["modalities"]} == {"tok_rgb@32", "tok_rgb@64"}
    assert known[1]["predicted"] == ["tok_rgb@64"]


def test_a_project_of_one_resolution_says_what_it_lacks(tmp_path: Path) -> None:
    from fourmill.pipelines.profiles import smallest

    project = smallest(tmp_path).model_copy(update={"second_px": None, "second_labels": (), "superres": None})
    with pytest.raises(ValueError, match="one resolution only; give second_px"):
        Generator(Session(project)).superres(np.zeros((1, 16), np.int16))
    with pytest.raises(ValueError, match="one resolution only; give second_px"):
        train_fourm(Session(project), "superres")
