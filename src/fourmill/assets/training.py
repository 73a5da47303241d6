"""`fourm/*`: pretraining on the manifest, its fine-tunes, what it scores and what it generates."""

import math
from collections.abc import Callable
from typing import Any

import dagster as dg

from fourmill.assets.result import Verdict, check_spec, picture, table, timed
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
from fourmill.runtime.training import train_fourm
from fourmill.train.config import VERSION, PretrainConfig

MANIFEST = dg.AssetKey(["tokens", "manifest"])
PRETRAIN = dg.AssetKey(["fourm", "pretrain"])
_MAX_LOSS_SHARE = 1.1  # of the first steps' loss; a fine-tune starts low and its batches differ
TEXT2IM = dg.AssetKey(["fourm", "text2im"])
SUPERRES = dg.AssetKey(["fourm", "superres"])


def training_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The fourm group of a project."""
    tokenizers = [dg.AssetKey(["tokenizers", name]) for name in (*IMAGE_TOKENS, "text")]
    return [
        _model(
            PRETRAIN,
            lambda session: train_fourm(session, "fourm"),
            _version(project.pretrain),
            [MANIFEST],
            "4M trained from the manifest, from nothing.",
        ),
        _model(
            TEXT2IM,
            lambda session: train_fourm(session, "text2im"),
            _version(project.text2im),
            [MANIFEST, PRETRAIN],
            "4M fine-tuned with captions as the main input.",
        ),
        *_superres(project),
        _evaluation(project, tokenizers),
        _samples(project, tokenizers),
    ]


def _version(config: PretrainConfig) -> str:
    return f"{VERSION}-{digest_config(config)[:8]}"


def _superres(project: Project) -> list[dg.AssetsDefinition]:
    """Nothing where the project has one resolution only."""
    if project.superres is None or project.second_px is None:
        return []
    low_px, high_px = sorted((project.input_px, project.second_px))
    return [
        _model(
            SUPERRES,
            train_superres,
            f"{_version(project.superres)}-{digest_config(project.samples)[:8]}",
            [MANIFEST, PRETRAIN, dg.AssetKey(["tokenizers", "rgb"])],
            f"4M fine-tuned to super-resolve tokens of {low_px} pixels to {high_px}; PSNR beside bicubic enlargement.",
        )
    ]


def _model(
    key: dg.AssetKey, train: Callable[[Session], ModelRef], version: str, deps: list[dg.AssetKey], text: str
) -> dg.AssetsDefinition:
    @dg.asset(
        key=key,
        deps=deps,
        group_name="fourm",
        kinds={"torch", "safetensors"},
        owners=OWNERS,
        pool="gpu_train",
        code_version=version,
        description=text,
        check_specs=[check_spec(key, "loss_holds", "The last loss is finite and not above the first.")],
    )
    def model(context: dg.AssetExecutionContext, workshop: dg.ResourceParam[Workshop]) -> dg.MaterializeResult:
        session = workshop.session(context)
        with timed() as seconds:
            ref = train(session)
        curve = ref.report["loss_curve"]
        first, last = curve[0][1], curve[-1][1]
        fine = math.isfinite(last) and last < first * _MAX_LOSS_SHARE
        return dg.MaterializeResult(
            metadata={
                **model_metadata(ref),
                "manifest": ref.report["manifest_digest"],
                "steps": ref.report["steps"],
                "loss": last,
                "loss_curve": table(["step", "loss"], curve),
                "seconds": seconds(),
            },
            data_version=dg.DataVersion(ref.digest),
            check_results=[Verdict("loss_holds", fine, metadata={"first": first, "last": last}).result(key)],
        )

    return model


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
            result = run_warm(evaluate, workshop.session(context))
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
        code_version=f"2-{digest_config(project.samples)[:8]}",
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
