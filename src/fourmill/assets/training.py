"""`fourm/*`: pretraining on the manifest, its fine-tunes, what it scores and what it generates."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dagster as dg

from fourmill.assets.result import Verdict, check_spec, data_version, picture, table, timed
from fourmill.assets.tokenizers import model_metadata
from fourmill.assets.workshop import OWNERS, Workshop
from fourmill.core.digest import digest_config
from fourmill.core.modality import IMAGE_TOKENS
from fourmill.runtime.launch import run_warm
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project
from fourmill.runtime.samples import evaluate, make_samples
from fourmill.runtime.session import Session
from fourmill.runtime.superres import train_superres
from fourmill.runtime.training import loss_holds, train_fourm, train_several
from fourmill.train.config import VERSION, PretrainConfig

MANIFEST = dg.AssetKey(["tokens", "manifest"])
PRETRAIN = dg.AssetKey(["fourm", "pretrain"])
TEXT2IM = dg.AssetKey(["fourm", "text2im"])
SUPERRES = dg.AssetKey(["fourm", "superres"])
_KINDS = {"torch", "safetensors"}


def training_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The fourm group of a project."""
    tokenizers = [dg.AssetKey(["tokenizers", name]) for name in (*IMAGE_TOKENS, "text")]
    return [_pretrain(project), _fine_tunes(project), _evaluation(project, tokenizers), _samples(project, tokenizers)]


def _pretrain(project: Project) -> dg.AssetsDefinition:
    @dg.asset(
        key=PRETRAIN,
        deps=[MANIFEST],
        group_name="fourm",
        kinds=_KINDS,
        owners=OWNERS,
        pool="gpu_train",
        code_version=_version(project.pretrain),
        description="4M trained from the manifest, from nothing.",
        check_specs=[_loss_holds(PRETRAIN)],
    )
    def pretrain(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        with timed() as seconds:
            ref = train_fourm(workshop.session(context), "fourm")
        return _trained(context, PRETRAIN, ref, seconds())

    return pretrain


def _fine_tunes(project: Project) -> dg.AssetsDefinition:
    """Both in one step, so that they can be trained at the same time; either can be chosen alone."""
    specs = [
        _fine_tune(TEXT2IM, _version(project.text2im), [], "4M fine-tuned with captions as the main input."),
    ]
    trainings: dict[dg.AssetKey, Callable[[Session], ModelRef]] = {
        TEXT2IM: lambda session: train_fourm(session, "text2im")
    }
    if project.superres is not None and project.second_px is not None:
        low_px, high_px = sorted((project.input_px, project.second_px))
        version = f"{_version(project.superres)}-{digest_config(project.samples)[:8]}"
        text = (
            f"4M fine-tuned to super-resolve tokens of {low_px} pixels to {high_px}; PSNR beside bicubic enlargement."
        )
        specs.append(_fine_tune(SUPERRES, version, [dg.AssetKey(["tokenizers", "rgb"])], text))
        trainings[SUPERRES] = train_superres

    @dg.multi_asset(
        name="fine_tunes",
        specs=specs,
        check_specs=[_loss_holds(key) for key in trainings],
        can_subset=True,
        pool="gpu_train",
    )
    def fine_tunes(
        context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]
    ) -> Iterator[dg.MaterializeResult]:
        session = workshop.session(context)
        keys = {key.path[-1]: key for key in trainings if key in context.selected_asset_keys}
        works = {name: partial(trainings[key], session) for name, key in keys.items()}
        for name, ref, seconds in train_several(works, project.fine_tunes_at_once):
            yield _trained(context, keys[name], ref, seconds)

    return fine_tunes


def _fine_tune(key: dg.AssetKey, version: str, more: list[dg.AssetKey], text: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        key,
        deps=[MANIFEST, PRETRAIN, *more],
        group_name="fourm",
        kinds=_KINDS,
        owners=OWNERS,
        code_version=version,
        description=text,
    )


def _version(config: PretrainConfig) -> str:
    return f"{VERSION}-{digest_config(config)[:8]}"


def _loss_holds(key: dg.AssetKey) -> dg.AssetCheckSpec:
    return check_spec(key, "loss_holds", "The last loss is finite and less than 1.1 times the first.")


def _trained(
    context: dg.AssetExecutionContext, key: dg.AssetKey, ref: ModelRef, seconds: float
) -> dg.MaterializeResult:
    curve = ref.report["loss_curve"]
    first, last = curve[0][1], curve[-1][1]
    verdict = Verdict("loss_holds", loss_holds(ref), metadata={"first": first, "last": last})
    return dg.MaterializeResult(
        asset_key=key,
        metadata={
            **model_metadata(ref),
            "manifest": ref.report["manifest_digest"],
            "steps": ref.report["steps"],
            "loss": last,
            "loss_curve": table(["step", "loss"], curve),
            "seconds": seconds,
        },
        data_version=data_version(context, ref.digest, [verdict]),
        check_results=[verdict.result(key)],
    )


def _evaluation(project: Project, tokenizers: list[dg.AssetKey]) -> dg.AssetsDefinition:
    key = dg.AssetKey(["fourm", "evaluation"])

    @dg.asset(
        key=key,
        deps=[MANIFEST, PRETRAIN, *tokenizers],
        group_name="fourm",
        kinds={"torch", "json"},
        owners=OWNERS,
        pool="gpu_train",
        code_version=f"2-{digest_config(project.samples)[:8]}",
        description="Figures of the model on held-out samples from RGB alone, each beside a per-pixel mean map.",
    )
    def evaluation(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        with timed() as seconds:
            result = evaluate(workshop.session(context))
        rows = [[name, result.figures[name], result.baseline.get(name)] for name in result.figures]
        return dg.MaterializeResult(
            metadata={
                "figures": table(
                    ["figure", "4M from RGB", "per-pixel mean map"], [[r[0], *map(_short, r[1:])] for r in rows]
                ),
                **{f"figure/{name}": value for name, value in result.figures.items()},
                **{f"baseline/{name}": value for name, value in result.baseline.items()},
                "samples": result.num_samples,
                "path": result.path,
                "seconds": seconds(),
            },
            data_version=dg.DataVersion(result.digest),
        )

    return evaluation


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _samples(project: Project, tokenizers: list[dg.AssetKey]) -> dg.AssetsDefinition:
    key = dg.AssetKey(["fourm", "samples"])
    fine_tunes = [TEXT2IM] if project.second_px is None else [TEXT2IM, SUPERRES]

    @dg.asset(
        key=key,
        deps=[MANIFEST, PRETRAIN, *fine_tunes, dg.AssetKey(["fourm", "evaluation"]), *tokenizers],
        group_name="fourm",
        kinds={"torch", "html"},
        owners=OWNERS,
        pool="gpu_train",
        code_version=f"3-{digest_config(project.samples)[:8]}",
        description="A page and a picture: held-out samples, every label, every reconstruction, and what 4M generates.",
    )
    def samples(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.session(context)
        with timed() as seconds:
            made = run_warm(make_samples, session)
        metadata: dict[str, Any] = {
            "page": dg.MetadataValue.path(made.page),
            "grid": dg.MetadataValue.path(made.grid),
            "seconds": seconds(),
            **{title: picture(png, title) for title, png in made.pictures.items()},
        }
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(made.digest))

    return samples
