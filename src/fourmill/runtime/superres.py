"""`fourm/superres`: fine-tuned, scored on held-out samples, and shown.

The small image's tokens are all that 4M sees; the baseline sees no more: what the tokenizer makes of the same tokens,
enlarged. Both are compared with the image at the higher resolution, where a blur does well and no model can pass the
tokenizer's own reconstruction by much, since it answers in tokens; and with that reconstruction, the picture it aims at.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fourmill.core.manifest import read_manifest
from fourmill.runtime.generation import Generator
from fourmill.runtime.heldout import HeldOut, View, read_heldout
from fourmill.runtime.launch import run_warm
from fourmill.runtime.models import ModelRef, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.sheets import superres_sheet
from fourmill.runtime.training import loss_holds, train_fourm

WAYS = {
    "superres": "the small image's tokens, super-resolved by 4M",
    "bicubic": "the small image's tokens, decoded and enlarged (bicubic): the baseline",
    "tokenizer": "the true tokens at this size, decoded: the ceiling",
}
MAX_SCORED = 100  # samples; each is decoded by diffusion three times
Scores = dict[str, dict[str, float]]


def train_superres(session: Session) -> ModelRef:
    """Fine-tune and score; if its loss holds the model serves, with its figures in its report."""
    ref = train_fourm(session, "superres")
    found, num_samples = run_warm(partial(_score_heldout, ref), session)
    psnr, close = found["psnr_db"], found["psnr_to_tokenizer_db"]
    figures = {
        "psnr_db": psnr["superres"],
        "psnr_db_ceiling": psnr["tokenizer"],
        "psnr_to_tokenizer_db": close["superres"],
    }
    baseline = {"psnr_db": psnr["bicubic"], "psnr_to_tokenizer_db": close["bicubic"]}
    scored = {
        "scored": {**found, "samples": num_samples},
        "headline": {"name": "psnr_db", "value": psnr["superres"], "baseline": psnr["bicubic"]},
        "figures": {**ref.report["figures"], **figures},
        "baseline": {**ref.report["baseline"], **baseline},
    }
    ref = ref.model_copy(update={"report": {**ref.report, **scored}})
    if loss_holds(ref):
        set_current(session.store, session.project.dataset, ref)
    return ref


def _score_heldout(ref: ModelRef, session: Session) -> tuple[Scores, int]:
    number = min(MAX_SCORED, session.project.samples.num_scored)
    heldout = read_heldout(session.store, read_manifest(session.store, ref.report["manifest"]), number)
    return score_superres(Generator(session, {"superres": ref}), heldout), len(heldout)


def score_superres(generator: Generator, heldout: HeldOut) -> Scores:
    """RGB PSNR in dB at the higher resolution, by `WAYS`.

    Returns:
        `psnr_db` against the image, `psnr_to_tokenizer_db` against what the true tokens are decoded to.
    """
    from fourmill.tokenize.score import psnr_db  # torch

    low, high = heldout.views
    tokenizer = generator.tokenizers["rgb"]
    _, made = generator.superres(low.tokens["rgb"])
    ways = {
        "superres": made,
        "bicubic": enlarge(tokenizer.detokenize(low.tokens["rgb"], generator.seed), high.px),
        "tokenizer": tokenizer.detokenize(high.tokens["rgb"], generator.seed),
    }

    def against(truth_BHWC: NDArray[np.uint8], names: tuple[str, ...]) -> dict[str, float]:
        return {name: round(psnr_db(ways[name], truth_BHWC), 3) for name in names}

    return {
        "psnr_db": against(high.rgb_BHWC, tuple(WAYS)),
        "psnr_to_tokenizer_db": against(ways["tokenizer"], ("superres", "bicubic")),
    }


def enlarge(rgb_BHWC: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """Images enlarged to another side, bicubic as PIL does it."""
    sized = [Image.fromarray(one).resize((px, px), Image.Resampling.BICUBIC) for one in rgb_BHWC]
    return np.stack([np.asarray(one) for one in sized])


def superres_picture(generator: Generator, heldout: HeldOut) -> bytes:
    """A PNG: from the small image over what 4M makes of it to the large one."""
    low, high = heldout.views
    _, made = generator.superres(low.tokens["rgb"])

    def shown(view: View) -> dict[str, NDArray[Any]]:
        rebuilt = generator.tokenizers["rgb"].detokenize(view.tokens["rgb"], generator.seed)
        return {"image": view.rgb_BHWC, "tokenizer": rebuilt}

    return superres_sheet(heldout.keys, shown(low), shown(high), made)
