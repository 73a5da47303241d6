"""A profile over another source: blocks that hold all its rows, labellers for ordinary pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from fourmill.core.names import MAX_BLOCKS, Layout
from fourmill.core.store import open_store
from fourmill.ingest.list_file import list_stamp
from fourmill.ingest.source import count_rows, numbered_rows
from fourmill.pipelines.profiles import DETECTRON2_PYTHON
from fourmill.pseudolabel.choices import Detector, labellers_from
from fourmill.pseudolabel.config import SceneConfig, VitDetConfig, feature_dim
from fourmill.pseudolabel.members import own_labellers
from fourmill.runtime.labeller_weights import pinned_labellers
from fourmill.runtime.project import Project, ProjectError
from fourmill.runtime.ray_session import StageShare

_ROWS_PER_SHARD, _SHARDS_PER_BLOCK = 1000, 200  # as `cc12m_4m7` has them
_USUAL_SHARD = 500  # rows, of a list that fills no block
_TRAIN_BLOCKS = 6


@dataclass(frozen=True)
class Choice:
    """What `fourmill run` was told; None where it was told nothing."""

    labellers: str | None = None
    detector: Detector | None = None
    allow_hosts: Sequence[str] = ()
    num_blocks: int | None = None
    opt_out: str | None = None
    labels: Sequence[str] = field(default_factory=tuple)


def list_project(base: Project, choice: Choice, before: Project | None = None) -> Project:
    """A profile over another source.

    Args:
        base: the profile, its source in place; its store is where rows may have been numbered already.
        before: the project that the folder holds: its blocks stay as they are while the rows fit, and more are added when
            they do not.

    Raises:
        ValueError: the source cannot be read, is too long, or no labellers fit it.
    """
    before = before if before is not None and before.source == base.source else None
    layout = _layout(base.source.where, choice, before, _rows_of(base))
    wanted = before.train_set.blocks if before else base.train_set.blocks
    keys = layout.block_keys()
    blocks = wanted if set(wanted) <= set(keys) else tuple(keys[:_TRAIN_BLOCKS])
    project = base.model_copy(
        update={
            "layout": layout,
            "ingest": base.ingest.model_copy(
                update={"allow_hosts": tuple(choice.allow_hosts), "opt_out": choice.opt_out}
            ),
            "train_set": base.train_set.model_copy(update={"blocks": blocks}),
        }
    )
    return _with_a_place_for_detectors(_labelled(project, choice), base)


def with_grown_list(project: Project) -> Project:
    """A project with more blocks where its list has more rows than it holds; else, or where nobody can be asked, as it is.

    Raises:
        ValueError: the source cannot be read, or is too long.
    """
    if project.source.kind == "list" and list_stamp(project.source) is None:
        return project
    layout = _layout(project.source.where, Choice(), project, _rows_of(project))
    return project if layout == project.layout else project.model_copy(update={"layout": layout})


def _rows_of(base: Project) -> int:
    known = numbered_rows(open_store(base.store), base.dataset, base.source)
    return count_rows(base.source) if known is None else known


def _layout(where: str, choice: Choice, before: Project | None, rows: int) -> Layout:
    if choice.num_blocks is None and before is not None:
        layout = before.layout
        num_blocks = max(layout.num_blocks, -(-rows // (layout.rows_per_shard * layout.shards_per_block)))
    elif choice.num_blocks is None and rows > _ROWS_PER_SHARD * _SHARDS_PER_BLOCK:
        layout = Layout(rows_per_shard=_ROWS_PER_SHARD, shards_per_block=_SHARDS_PER_BLOCK, num_blocks=1)
        num_blocks = -(-rows // layout.num_rows)
    else:
        num_blocks = choice.num_blocks or 1
        shards = max(1, min(_SHARDS_PER_BLOCK, -(-rows // (num_blocks * _USUAL_SHARD))))
        layout = Layout(rows_per_shard=max(1, -(-rows // (num_blocks * shards))), shards_per_block=shards, num_blocks=1)
    if num_blocks > MAX_BLOCKS:
        raise ProjectError(
            f"{where} has {rows:,} rows: {num_blocks} blocks of {layout.num_rows // layout.num_blocks:,}, more "
            f"than {MAX_BLOCKS}; give --num-blocks (and another --out, where there are blocks already)"
        )
    return layout.model_copy(update={"num_blocks": num_blocks})


def _labelled(project: Project, choice: Choice) -> Project:
    grid = project.input_px // project.patch_px
    if choice.labellers is None:
        if any(isinstance(one, SceneConfig) for one in project.labellers.values()):
            raise ProjectError(
                f"the labellers of the profile {project.profile} know nothing but the demo's pictures; give --labellers: "
                "stored, seeded, or a folder of networks"
            )
        chosen, kind = {}, "weights"
    else:
        det = project.labellers["det"]
        detector = choice.detector or ("vitdet" if isinstance(det, VitDetConfig) else "detector")
        precision = "bf16" if getattr(project.labellers["depth"], "precision", "fp32") == "bf16" else "fp32"
        store = open_store(project.store)
        chosen = labellers_from(choice.labellers, grid, store, detector=detector, precision=precision)
        kind = choice.labellers if choice.labellers in ("seeded", "scene") else "weights"
    labellers = {**project.labellers, **chosen, **own_labellers(choice.labels)}
    clip = project.tokenizers["clip"].model_copy(update={"feature_dim": feature_dim(labellers["clip"])})
    update = {"profile": f"list-{kind}", "labellers": labellers, "tokenizers": {**project.tokenizers, "clip": clip}}
    return pinned_labellers(project.model_copy(update=update))


def _with_a_place_for_detectors(project: Project, base: Project) -> Project:
    """ViTDet's actors in detectron2's own environment, two to a GPU; other detectors' in this one, sharing GPUs as DPT's do."""
    det, depth = "labels/det", "labels/depth"
    stages = project.ray.stages
    share = before = stages.get(det) or stages.get("labels") or StageShare()
    is_vitdet = isinstance(project.labellers["det"], VitDetConfig)
    if not is_vitdet and isinstance(base.labellers["det"], VitDetConfig):
        share = stages.get(depth, share)
    python = {"py_executable": DETECTRON2_PYTHON} if is_vitdet and find_spec("detectron2") is None else None
    share = share.model_copy(update={"runtime_env": python})
    if share == before:
        return project
    return project.model_copy(update={"ray": project.ray.model_copy(update={"stages": {**stages, det: share}})})
