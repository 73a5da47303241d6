"""`fourm/superres`: fine-tuned, scored on held-out samples, and shown.

Scored against the image at the higher resolution. The small image's tokens are all that 4M sees; the baseline sees no more:
what the tokenizer makes of the same tokens, enlarged. No model can pass the tokenizer's own reconstruction of the true
tokens by much, since it answers in tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fourmill.core.metrics import psnr_db
from fourmill.runtime.generation import Generator
from fourmill.runtime.heldout import HeldOut, View, read_heldout
from fourmill.runtime.launch import run_warm
from fourmill.runtime.models import ModelRef, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.sheets import superres_sheet
from fourmill.runtime.training import make_manifest, train_fourm

WAYS = {
    "superres": "the small image's tokens, super-resolved by 4M",
    "bicubic": "the small image's tokens, decoded and enlarged (bicubic): the baseline",
    "tokenizer": "the true tokens at this size, decoded: the ceiling",
}


def train_superres(session: Session) -> ModelRef:
    """Fine-tune, score, and let the model serve with its figures in its report."""
    ref = train_fourm(session, "superres")
    found, num_samples = run_warm(_score_heldout, session)
    scored = {
        "scored": {"psnr_db": found, "samples": num_samples},
        "headline": {"name": "psnr_db", "value": found["superres"], "baseline": found["bicubic"]},
        "figures": {**ref.report["figures"], "psnr_db": found["superres"], "psnr_db_ceiling": found["tokenizer"]},
        "baseline": {**ref.report["baseline"], "psnr_db": found["bicubic"]},
    }
    ref = ref.model_copy(update={"report": {**ref.report, **scored}})
    set_current(session.store, session.project.dataset, ref)
    return ref


def _score_heldout(session: Session) -> tuple[dict[str, float], int]:
    heldout = read_heldout(session.store, make_manifest(session), session.project.samples.num_scored)
    return score_superres(Generator(session), heldout), len(heldout)


def score_superres(generator: Generator, heldout: HeldOut) -> dict[str, float]:
    """RGB PSNR in dB at the higher resolution, of each of `WAYS`."""
    low, high = heldout.views
    tokenizer = generator.tokenizers["rgb"]
    _, made = generator.superres(low.tokens["rgb"])
    ways = {
        "superres": made,
        "bicubic": enlarge(tokenizer.detokenize(low.tokens["rgb"], generator.seed), high.px),
        "tokenizer": tokenizer.detokenize(high.tokens["rgb"], generator.seed),
    }
    return {name: round(psnr_db(ways[name], high.rgb_BHWC), 3) for name in WAYS}


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
