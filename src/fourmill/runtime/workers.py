"""Workers made from a project: the factories that actors call. Rooms do not know each other; here they are put together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.core.store import open_store
from fourmill.core.work import ShardWorker
from fourmill.runtime.project import Project
from fourmill.runtime.token_assets import token_assets


def images(
    project: Mapping[str, Any], connect_to: Mapping[str, str], opt_out: str = "", retry_failed: bool = False
) -> ShardWorker:
    """The downloader of `cc12m/images`; all of them on a Ray cluster together keep the limit per host."""
    from fourmill.ingest.worker import ImageWorker
    from fourmill.runtime.host_limits import cluster_host_limits

    made = Project.model_validate(project)
    return ImageWorker(
        made.store,
        made.dataset,
        made.layout,
        made.ingest,
        dict(connect_to),
        source=made.source,
        opt_out=opt_out,
        retry_failed=retry_failed,
        host_limits=cluster_host_limits(made.ingest.per_host, made.ingest.concurrency),
    )


def labels(project: Mapping[str, Any], label: str, also: Sequence[str] = ()) -> ShardWorker:
    """The labeller of `labels/{label}`; with `also`, of more labels from the same decoded images."""
    from fourmill.pseudolabel.worker import LabelWorker

    made = Project.model_validate(project)
    threads = max(2, round(made.ray.for_stage(f"labels/{label}").cpus_per_worker))
    more = {other: made.labellers[other] for other in also}
    return LabelWorker(made.store, made.dataset, label, made.labellers[label], threads, more)


def tokens(project: Mapping[str, Any], name: str, tokenizer_path: str, tokenizer_digest: str) -> ShardWorker:
    """The tokenizer of `tokens/{name}`; CLIP's features are computed on the way and never stored."""
    from fourmill.tokenize.worker import TokenWorker

    made = Project.model_validate(project)
    asset = token_assets(made)[name]
    return TokenWorker(
        made.store,
        made.dataset,
        asset.modality,
        tokenizer_path,
        asset.px,
        features=clip_features(made, asset.px) if asset.label == "clip" else None,
        config=made.tokenizing,
        threads=max(2, round(made.ray.for_stage(f"tokens/{name}").cpus_per_worker)),
    )


def aligned(project: Mapping[str, Any]) -> ShardWorker:
    """The aligner of `tokens/shards`."""
    from fourmill.tokenize.align import AlignWorker

    made = Project.model_validate(project)
    return AlignWorker(made.store, made.dataset, token_modalities(made), made.input_px, made.tokenizing.crops)


def clip_features(project: Project, px: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Crops (B, S, S, 3) uint8 to dense CLIP features (B, h, w, C) float32.

    Args:
        px: side of the crops, where it is not the base resolution's: a network that is fed another size than its crops
            is fed as much more of it.
    """
    from fourmill.pseudolabel.config import ClipConfig
    from fourmill.pseudolabel.make import make_features

    config = project.labellers["clip"]
    if px is not None and isinstance(config, ClipConfig) and config.input_px is not None:
        config = config.model_copy(update={"input_px": config.input_px * px // project.input_px})
    return make_features(config, open_store(project.store))


def token_modalities(project: Project) -> list[str]:
    """Every modality that is tokenized, in the table's order."""
    return [m.name for m in project.modalities().values() if m.kind != "pixels"]
