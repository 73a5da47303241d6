"""`tokenizers/*`: the frozen subset they are trained on, one image tokenizer a modality, one vocabulary for all texts."""

from typing import Any

import dagster as dg

from fourmill.assets.result import Verdict, check_spec, picture, timed
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_config
from fourmill.core.modality import IMAGE_TOKENS, LABELS
from fourmill.pseudolabel.config import weights_digest
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project
from fourmill.runtime.training import fit_text, make_train_set, train_tokenizer
from fourmill.tokenize.config import TEXT_VERSION, TRAIN_SET_VERSION, TRAIN_VERSION

TRAIN_SET = dg.AssetKey(["tokenizers", "train_set"])
MIN_USAGE = 0.05  # of the codebook; below it the tokenizer has collapsed


def tokenizer_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The tokenizers group of a project."""
    return [_train_set(project), *(_image_tokenizer(project, name) for name in IMAGE_TOKENS), _text(project)]


def _train_set(project: Project) -> dg.AssetsDefinition:
    mapping = dg.SpecificPartitionsPartitionMapping(list(project.train_set.blocks))
    sources = [dg.AssetKey([project.dataset, "images"]), *(dg.AssetKey(["labels", label]) for label in LABELS)]
    clip = project.labellers["clip"]

    @dg.asset(
        key=TRAIN_SET,
        deps=[dg.AssetDep(source, partition_mapping=mapping) for source in sources],
        group_name="tokenizers",
        kinds={"python", "numpy"},
        owners=OWNERS,
        code_version=f"{TRAIN_SET_VERSION}-{digest_config(project.train_set)[:8]}-{weights_digest(clip)[:8]}",
        description="Crops and labels of a fixed share of the first blocks, packed: later blocks do not change it.",
        check_specs=[check_spec(TRAIN_SET, "enough_samples", "At least one sample to train on and one to score.")],
    )
    def train_set(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        with timed() as seconds:
            made = make_train_set(workshop.session(context))
        train, held_out = made.report["num_train"], made.report["num_eval"]
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": train + held_out,
                "train_samples": train,
                "eval_samples": held_out,
                "path": made.path,
                "digest": made.digest,
                "seconds": seconds(),
            },
            data_version=dg.DataVersion(made.digest),
            check_results=[Verdict("enough_samples", train > 0 and held_out > 0).result(TRAIN_SET)],
        )

    return train_set


def _image_tokenizer(project: Project, name: str) -> dg.AssetsDefinition:
    key = dg.AssetKey(["tokenizers", name])
    config = project.tokenizers[name]

    @dg.asset(
        key=key,
        deps=[TRAIN_SET],
        group_name="tokenizers",
        kinds={"torch", "safetensors"},
        owners=OWNERS,
        tags={"modality": name, "stage": "tokenizer"},
        pool="gpu_train",
        code_version=f"{TRAIN_VERSION}-{digest_config(config)[:8]}",
        description=f"VQ-VAE of {name}: {config.codebook_size} codes, {config.decoder.kind} decoder.",
        check_specs=[check_spec(key, "codebook_used", f"At least {MIN_USAGE:.0%} of the codes are in use.")],
    )
    def tokenizer(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.session(context)
        with timed() as seconds:
            ref = train_tokenizer(session, name)
        usage = float(ref.report["usage"])
        preview = session.store.read(ref.report["preview"])
        return dg.MaterializeResult(
            metadata={
                **model_metadata(ref),
                "codebook_usage": usage,
                "perplexity": float(ref.report["perplexity"]),
                "seconds": seconds(),
                "preview": picture(preview, f"{name}: held-out input above, reconstruction below"),
            },
            data_version=dg.DataVersion(ref.digest),
            check_results=[Verdict("codebook_used", usage >= MIN_USAGE, metadata={"usage": usage}).result(key)],
        )

    return tokenizer


def _text(project: Project) -> dg.AssetsDefinition:
    key = dg.AssetKey(["tokenizers", "text"])

    @dg.asset(
        key=key,
        deps=[TRAIN_SET],
        group_name="tokenizers",
        kinds={"python", "json"},
        owners=OWNERS,
        code_version=f"{TEXT_VERSION}-{digest_config(project.text)[:8]}",
        description="One WordPiece vocabulary for captions and boxes, fitted on the training split's captions.",
        check_specs=[check_spec(key, "round_trip", "Captions come back from their ids.")],
    )
    def text(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        with timed() as seconds:
            ref = fit_text(workshop.session(context))
        known = float(ref.report["known_share"])
        return dg.MaterializeResult(
            metadata={**model_metadata(ref), "seconds": seconds()},
            data_version=dg.DataVersion(ref.digest),
            check_results=[Verdict("round_trip", known > 0.9, metadata={"known_share": known}).result(key)],
        )

    return text


def model_metadata(ref: ModelRef) -> dict[str, Any]:
    """What a person wants to know of a model in one glance."""
    figures = {f"figure/{k}": v for k, v in ref.report.get("figures", {}).items() if isinstance(v, int | float)}
    baselines = {f"baseline/{k}": v for k, v in ref.report.get("baseline", {}).items() if isinstance(v, int | float)}
    headline = {"headline": ref.report["headline"]["name"]} if "headline" in ref.report else {}
    return {"path": ref.path, "digest": ref.digest, **headline, **figures, **baselines}
