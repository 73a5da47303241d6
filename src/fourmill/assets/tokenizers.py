"""`tokenizers/*`: the frozen subset they are trained on, one image tokenizer a modality, one vocabulary for all texts."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import dagster as dg

from fourmill.assets.labels import label_key
from fourmill.assets.result import Verdict, check_spec, data_version, picture, table, timed
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_config, digest_json
from fourmill.core.modality import IMAGE_TOKENS, LABELS
from fourmill.runtime.labeller_weights import require_labellers
from fourmill.runtime.launch import run_warm
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project
from fourmill.runtime.stages import features_digest
from fourmill.runtime.training import (
    MIN_ROUND_TRIPS,
    captions_come_back,
    fit_text,
    make_train_set,
    train_set_asset,
    train_tokenizers,
)
from fourmill.tokenize.config import TEXT_VERSION, TRAIN_SET_VERSION, TRAIN_VERSION, TrainSetConfig

TRAIN_SET = dg.AssetKey(["tokenizers", "train_set"])


def tokenizer_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The tokenizers group of a project."""
    sets = [_train_set(project, name) for name in (None, *project.more_train_sets)]
    return [*sets, _image_tokenizers(project), _text(project)]


def _train_set(project: Project, name: str | None) -> dg.AssetsDefinition:
    config = project.train_set_of(name)
    dataset = config.dataset or project.dataset
    mapping = dg.SpecificPartitionsPartitionMapping(list(config.blocks))
    other = "" if dataset == project.dataset else dataset
    sources = [dg.AssetKey([dataset, "images"]), *(label_key(label, other) for label in LABELS)]
    key = _train_set_key(name)

    @dg.asset(
        key=key,
        deps=[dg.AssetDep(source, partition_mapping=mapping) for source in sources],
        group_name="tokenizers",
        kinds={"python", "numpy"},
        owners=OWNERS,
        code_version=f"{TRAIN_SET_VERSION}-{digest_config(config)[:8]}-{features_digest(project)[:8]}-{project.input_px}",
        description=f"{_packed(config)} and their labels, of the first samples of {', '.join(config.blocks)}: blocks that come later "
        "do not change it.",
    )
    def train_set(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        require_labellers(project, ["clip"])
        with timed() as seconds:
            made = run_warm(partial(make_train_set, name=name), workshop.session(context))
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
        )

    return train_set


def _packed(config: TrainSetConfig) -> str:
    return (
        "Centre squares of images" if config.side_px is None else f"Whole images, squeezed to {config.side_px} pixels,"
    )


def _train_set_key(name: str | None) -> dg.AssetKey:
    return dg.AssetKey(train_set_asset(name).split("/"))


def _image_tokenizers(project: Project) -> dg.AssetsDefinition:
    """All of them in one step, so that some can be trained at the same time; any of them can be chosen alone."""
    keys = {name: dg.AssetKey(["tokenizers", name]) for name in IMAGE_TOKENS}

    @dg.multi_asset(
        name="image_tokenizers",
        specs=[_tokenizer_spec(project, name, key) for name, key in keys.items()],
        check_specs=[spec for name, key in keys.items() for spec in _check_specs(project, name, key)],
        can_subset=True,
        pool="gpu_train",
    )
    def image_tokenizers(
        context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]
    ) -> Iterator[dg.MaterializeResult]:
        session = workshop.session(context)
        chosen = [name for name, key in keys.items() if key in context.selected_asset_keys]
        for name, ref, seconds in train_tokenizers(session, chosen):
            preview = session.store.read(ref.report["preview"])
            verdicts = _verdicts(project, name, ref)
            yield dg.MaterializeResult(
                asset_key=keys[name],
                metadata={
                    **model_metadata(ref),
                    **_training_metadata(ref),
                    "seconds": seconds,
                    "preview": picture(preview, f"{name}: held-out input above, reconstruction below"),
                },
                data_version=data_version(context, ref.digest, verdicts),
                check_results=[verdict.result(keys[name]) for verdict in verdicts],
            )

    return image_tokenizers


def _check_specs(project: Project, name: str, key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    bounds = project.bounds_of(name)
    if bounds.headline is not None:
        asked = f"The headline figure on held-out samples is {bounds.headline:g} or better."
    elif bounds.error_share is not None:
        asked = f"At most {bounds.error_share:.0%} of the baseline's error are left on held-out samples."
    else:
        asked = "No bound is set on the headline figure."
    used = f"At least {bounds.min_usage:.0%} of the codes are in use on held-out samples."
    return [check_spec(key, "good_enough", asked), check_spec(key, "codebook_used", used)]


def _verdicts(project: Project, name: str, ref: ModelRef) -> list[Verdict]:
    """What fails here does not serve (`runtime.training`)."""
    bounds, headline, usage = project.bounds_of(name), ref.report["headline"], float(ref.report["usage"])
    return [
        Verdict("good_enough", bounds.reaches(headline), metadata=headline),
        Verdict("codebook_used", bounds.is_used(usage), metadata={"usage": usage}),
    ]


def _training_metadata(ref: ModelRef) -> dict[str, Any]:
    """How the training went; tokenizers that were not trained here have none of it."""
    report = ref.report
    stages = [
        [one["name"], one["steps"], one["skipped_steps"], f"{one['headline']} {one['value']}", one["digest"]]
        for one in report.get("earlier_stages", [])
    ]
    return {
        "codebook_usage": float(report["usage"]),
        "perplexity": float(report["perplexity"]),
        **{key: report[key] for key in ("skipped_steps", "rollbacks", "tensorboard") if key in report},
        **({"earlier_stages": table(["stage", "steps", "skipped", "held out", "digest"], stages)} if stages else {}),
    }


def _tokenizer_spec(project: Project, name: str, key: dg.AssetKey) -> dg.AssetSpec:
    imported: dict[str, str] = {**project.served_tokenizers}
    config, served = project.tokenizers[name], imported.get(name)
    trained = f"{TRAIN_VERSION}-{digest_json(config.weights_depend_on)[:8]}"
    made = f"served-{served[:12]}-{digest_json(config.interface)[:8]}" if served else trained
    what = f"{name}: {config.codebook_size} codes, {config.decoder.kind} decoder."
    return dg.AssetSpec(
        key,
        deps=sorted({_train_set_key(stage.train_set) for stage in config.stages}),
        group_name="tokenizers",
        kinds={"torch", "safetensors"},
        owners=OWNERS,
        tags={"modality": name, "stage": "tokenizer"},
        code_version=f"{made}-{digest_config(project.bounds_of(name))[:8]}",  # other bounds judge again what is there
        description=f"Imported VQ-VAE of {what} Scored here, not trained." if served else f"VQ-VAE of {what}",
    )


def _text(project: Project) -> dg.AssetsDefinition:
    key = dg.AssetKey(["tokenizers", "text"])
    served = project.served_tokenizers.get("text")
    asked = f"At least {MIN_ROUND_TRIPS:.0%} of the captions are what their ids decode to, in lower case, word by word."
    about = "One WordPiece vocabulary for captions and boxes, "

    @dg.asset(
        key=key,
        deps=[TRAIN_SET],
        group_name="tokenizers",
        kinds={"python", "json"},
        owners=OWNERS,
        code_version=f"served-{served[:12]}" if served else f"{TEXT_VERSION}-{digest_config(project.text)[:8]}",
        description=about + ("imported." if served else "fitted on the training split's captions."),
        check_specs=[check_spec(key, "round_trip", asked)],
    )
    def text(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        with timed() as seconds:
            ref = fit_text(workshop.session(context))
        verdict = _round_trip(ref)
        return dg.MaterializeResult(
            metadata={**model_metadata(ref), "seconds": seconds()},
            data_version=data_version(context, ref.digest, [verdict]),
            check_results=[verdict.result(key)],
        )

    return text


def _round_trip(ref: ModelRef) -> Verdict:
    """What fails here does not serve (`runtime.training`)."""
    share = float(ref.report["figures"]["round_trip_share"])
    return Verdict("round_trip", captions_come_back(ref), metadata={"round_trip_share": share})


def model_metadata(ref: ModelRef) -> dict[str, Any]:
    """What a person wants to know of a model in one glance."""
    figures = {f"figure/{k}": v for k, v in ref.report.get("figures", {}).items() if isinstance(v, int | float)}
    baselines = {f"baseline/{k}": v for k, v in ref.report.get("baseline", {}).items() if isinstance(v, int | float)}
    headline = {"headline": ref.report["headline"]["name"]} if "headline" in ref.report else {}
    origin = {key: ref.report[key] for key in ("origin", "licence") if key in ref.report}
    return {"path": ref.path, "digest": ref.digest, **origin, **headline, **figures, **baselines}
