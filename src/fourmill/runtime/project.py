"""The project: one complete config of everything, made by a profile and kept as JSON beside the store.

Each room owns its own config; this is only where they meet.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fourmill.core.modality import IMAGE_TOKENS, LABELS, Modality, modality_table
from fourmill.core.names import Layout
from fourmill.core.store import LocalStore, is_local
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.pseudolabel.config import LabellerConfig
from fourmill.pseudolabel.members import label_format
from fourmill.runtime.ray_session import RayConfig
from fourmill.tokenize.bounds import TokenizerBounds
from fourmill.tokenize.config import (
    ImageLabel,
    ImageTokenizerConfig,
    TextTokenizerConfig,
    TokenizingConfig,
    TrainingConfig,
    TrainSetConfig,
)
from fourmill.train.config import PretrainConfig

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_NAME = r"^[a-z][a-z0-9_]*$"
# A job of the main data set (index_list), groups of other assets, folders of the store.
_TAKEN_NAMES = frozenset({"list", "labels", "tokenizers", "tokens", "fourm", "source", "models", "weights", "runs"})


class ProjectError(ValueError):
    """A project that cannot be used, said with the next step."""


class SamplesConfig(BaseModel):
    """What is shown and scored at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_shown: Annotated[int, Field(gt=0)] = Field(default=6, description="Held-out samples in the pictures.")
    num_scored: Annotated[int, Field(gt=0)] = Field(default=200, description="Held-out samples behind the figures.")
    decoding_steps: Annotated[int, Field(gt=0)] = Field(default=4, description="MaskGIT steps for each image modality.")
    superres_steps: Annotated[int, Field(gt=0)] = Field(
        default=8, description="MaskGIT steps of super-resolution; 8 as public."
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Sampling temperature; 0 takes the best. Images from captions are drawn at 1.0 all the same, as in public.",
    )
    seed: int = 0


class DatasetConfig(BaseModel):
    """One data set of a project: what it is made of, how it is cut, what its images become."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=_NAME, description="Name in asset keys and store paths.")
    source: SourceConfig
    layout: Layout
    ingest: IngestConfig


class Project(BaseModel):
    """Everything that a materialization depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(description="Name of the profile that this config came from.")
    store: str = Field(description="Root of the store: a folder, or s3://bucket/prefix.")
    scratch: str | None = Field(
        default=None, description="Local folder for training programs' specs, logs and checkpoints; None: the store."
    )
    dataset: str = Field(default="cc12m", pattern=_NAME, description="Name in asset keys and store paths.")
    source: SourceConfig
    layout: Layout
    ingest: IngestConfig
    more_datasets: tuple[DatasetConfig, ...] = Field(
        default=(),
        description="Data sets that are ingested beside the one that 4M is trained on, each as assets of its own.",
    )
    labellers: dict[str, LabellerConfig] = Field(
        description="One each for depth, normal, semseg, det, and clip; more for labels beside 4M's own, such as canny."
    )
    train_set: TrainSetConfig
    more_train_sets: dict[Annotated[str, Field(pattern=_NAME)], TrainSetConfig] = Field(
        default={}, description="Packed sets that stages of tokenizers' trainings name, beside the main one."
    )
    tokenizers: dict[str, ImageTokenizerConfig] = Field(description="One for each image modality.")
    tokenizer_bounds: dict[str, TokenizerBounds] = Field(
        default={},
        description="What an image tokenizer must reach to serve, by modality; the defaults where it is not named.",
    )
    text: TextTokenizerConfig
    served_tokenizers: dict[Literal["rgb", "depth", "normal", "semseg", "clip", "text"], Digest] = Field(
        default={},
        description="Digests of imported tokenizers that serve without training (`fourmill weights add tokenizer_rgb`).",
    )
    tokenizing: TokenizingConfig = TokenizingConfig()
    pretrain: PretrainConfig
    text2im: PretrainConfig
    second_px: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Side of the crops of a second resolution, for super-resolution; None: there is none."
    )
    second_labels: tuple[ImageLabel, ...] = Field(
        default=(), description="Images that are tokenized at the second resolution too; rgb among them."
    )
    superres: PretrainConfig | None = Field(
        default=None, description="The fine-tune from the lower to the higher resolution; None where there is one only."
    )
    samples: SamplesConfig = SamplesConfig()
    ray: RayConfig = RayConfig()
    threads: Annotated[int, Field(gt=0)] = Field(default=1, description="CPU threads of a tokenizer's training.")
    tokenizers_at_once: Annotated[int, Field(gt=0)] = Field(
        default=2, description="Image tokenizers trained at the same time; on CPUs one a core, on GPUs one a machine."
    )
    tokenizer_processes: Annotated[int, Field(gt=0)] = Field(
        default=1, description="Processes that share every batch of a tokenizer's training; on GPUs one each."
    )
    fourm_threads: Annotated[int, Field(gt=0)] = Field(
        default=1,
        description="CPU threads of each process of 4M's training; at the demo's size a second one gains nothing.",
    )
    fourm_processes: Annotated[int, Field(gt=0)] = Field(
        default=1, description="Processes that share every batch of 4M's training."
    )
    fine_tunes_at_once: Annotated[int, Field(gt=0)] = Field(
        default=1, description="Fine-tunes of 4M trained at the same time; they share its processes out among them."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "Project":
        names = [dataset.name for dataset in self.datasets()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two datasets are called {name!r}; asset keys and paths carry the name, so give another"
                )
            if name in _TAKEN_NAMES:
                raise ValueError(f"a dataset cannot be called {name!r}: other assets or folders are; give another name")
        return self

    @model_validator(mode="after")
    def _labels_are_known(self) -> "Project":
        for label in self.labellers:
            if label != "clip":
                label_format(label)
        missing = {*LABELS, "clip"} - self.labellers.keys()
        if missing:
            raise ValueError(f"labellers has none for {', '.join(sorted(missing))}")
        return self

    @model_validator(mode="after")
    def _resolutions_fit(self) -> "Project":
        if self.second_px is None:
            if self.second_labels or self.superres is not None:
                raise ValueError("second_labels and superres need a second resolution; give second_px or drop them")
            return self
        if self.superres is None or "rgb" not in self.second_labels or self.second_px == self.input_px:
            raise ValueError(
                f"second_px {self.second_px} needs a superres config, rgb in second_labels, and another side than input_px "
                f"{self.input_px}"
            )
        for label in self.second_labels:
            multiple = self.tokenizers[label].side_multiple
            if self.second_px % multiple:
                raise ValueError(
                    f"second_px {self.second_px} must be a multiple of {multiple} for the {label} tokenizer"
                )
        return self

    @model_validator(mode="after")
    def _crops_agree(self) -> "Project":
        first, *others = self.tokenizers.items()
        for label, config in others:
            for what in ("patch_px", "input_px"):
                if getattr(config, what) != getattr(first[1], what):
                    name = "patches" if what == "patch_px" else "crops"
                    raise ValueError(
                        f"{first[0]} has {name} of {getattr(first[1], what)} pixels, {label} of {getattr(config, what)}: the "
                        "tokenizers of a project share crops and one patch, since 4M sees their tokens on one grid"
                    )
        return self

    @model_validator(mode="after")
    def _trainings_are_sound(self) -> "Project":
        for label, config in self.tokenizers.items():
            if label not in self.served_tokenizers:
                config.require_sound()
        return self

    @model_validator(mode="after")
    def _train_sets_are_there(self) -> "Project":
        names = {dataset.name for dataset in self.datasets()}
        for name, config in self.more_train_sets.items():
            if config.dataset is not None and config.dataset not in names:
                raise ValueError(f"training set {name} is of {config.dataset}, which is no dataset of this project")
        for label, config in self.tokenizers.items():
            for stage in config.stages:
                self._check_train_set(f"stage {stage.name} of the {label} tokenizer", config, stage)
        return self

    def _check_train_set(self, who: str, config: ImageTokenizerConfig, stage: TrainingConfig) -> None:
        if stage.train_set not in (None, *self.more_train_sets):
            there = ", ".join(self.more_train_sets) or "none"
            raise ValueError(f"{who} sees the training set {stage.train_set}, and more_train_sets has {there}")
        packed = self.train_set_of(stage.train_set)
        if config.label == "clip":
            there = packed.clip_sides(self.input_px)
            lacking = sorted({*(stage.sides_px or (config.input_px,))} - {*there})
            if lacking:
                raise ValueError(
                    f"{who} sees sides of {', '.join(map(str, lacking))} pixels and its training set has CLIP features of "
                    f"{', '.join(map(str, there))}: add them to its clip_px"
                )
            return
        side_px, wanted = packed.side_px or self.input_px, max((config.input_px, *stage.sides_px))
        if side_px < wanted:
            raise ValueError(
                f"{who} sees sides of {wanted} pixels and its training set has {side_px}: raise its side_px"
            )

    @model_validator(mode="after")
    def _scratch_is_local(self) -> "Project":
        if not is_local(self.scratch or self.store):
            raise ValueError(
                f"the store {self.store!r} is no local folder: give `scratch` one, for logs and checkpoints of trainings"
            )
        return self

    def runs_path(self, name: str) -> str:
        """Where the store keeps what a run leaves for people: a page, figures. Projects of other datasets may share the store."""
        return f"{self.dataset}/runs/{name}"

    @property
    def local_folder(self) -> Path:
        """Where training programs keep what need not be shared."""
        return Path((self.scratch or self.store).removeprefix("file://"))

    @property
    def input_px(self) -> int:
        """Side of the crops that are tokenized, at the base resolution."""
        return self.tokenizers["rgb"].input_px

    @property
    def patch_px(self) -> int:
        """Side of the patch behind one token."""
        return self.tokenizers["rgb"].patch_px

    def datasets(self) -> tuple[DatasetConfig, ...]:
        """All data sets, the one that 4M is trained on first."""
        main = DatasetConfig(name=self.dataset, source=self.source, layout=self.layout, ingest=self.ingest)
        return (main, *self.more_datasets)

    def train_blocks_beside(self) -> dict[str, list[str]]:
        """The data sets beside the main one that tokenizers are trained on, which takes labels: their blocks that are named."""
        found: dict[str, set[str]] = {}
        for config in self.more_train_sets.values():
            if config.dataset and config.dataset != self.dataset:
                found.setdefault(config.dataset, set()).update(config.blocks)
        return {name: sorted(blocks) for name, blocks in sorted(found.items())}

    def for_dataset(self, name: str) -> "Project":
        """This project with one of its data sets in the place of the main one: what that set's ingest stages are given.

        Raises:
            ProjectError: there is no such data set.
        """
        if name == self.dataset:
            return self
        for other in self.more_datasets:
            if other.name == name:
                update = {"dataset": name, "source": other.source, "layout": other.layout, "ingest": other.ingest}
                return self.model_copy(update={**update, "more_datasets": ()})
        raise ProjectError(f"no dataset {name!r}; there are {', '.join(dataset.name for dataset in self.datasets())}")

    def train_set_of(self, name: str | None) -> TrainSetConfig:
        """The config of the training set that a stage names."""
        return self.train_set if name is None else self.more_train_sets[name]

    def bounds_of(self, label: str) -> TokenizerBounds:
        """What the tokenizer of a modality must reach to serve."""
        return self.tokenizer_bounds.get(label, TokenizerBounds())

    def stored_labels(self) -> list[str]:
        """The labels that are stored, 4M's own first: all that have a labeller but CLIP's features."""
        return [*LABELS, *(label for label in self.labellers if label not in (*LABELS, "clip"))]

    def modalities(self) -> dict[str, Modality]:
        """The modality table of this project, by name."""
        vocab = {label: self.tokenizers[label].codebook_size for label in IMAGE_TOKENS}
        return modality_table(
            self.input_px, self.patch_px, vocab, self.text.vocab_size, self.second_px, self.second_labels
        )


def problems_of(error: ValidationError) -> list[str]:
    """What is wrong with a config, a line each: the key, and why."""
    own_words = {"extra_forbidden": "there is no such key"}
    return [f"{_key(one['loc'])}: {own_words.get(one['type'], one['msg'])}" for one in error.errors()]


def _key(place: tuple[int | str, ...]) -> str:
    """A place as the file names it, without the marks of the table, and of the kind, that a labeller's config was taken from."""
    marks = {"own": 1, "network": 2}.get(str(place[2]), 0) if place[:1] == ("labellers",) and len(place) > 2 else 0
    return ".".join(map(str, place[:2] + place[2 + marks :]))


def read_project(path: Path) -> Project:
    """Read a project file.

    Raises:
        ProjectError: it is not there, or holds keys or values that no project has; each is named.
    """
    try:
        return Project.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise ProjectError(
            f"no project at {path}; make one with `fourmill demo` or `fourmill run --list ...`"
        ) from None
    except ValidationError as error:
        raise ProjectError(f"{path} is not a project:\n  " + "\n  ".join(problems_of(error))) from error


def write_project(project: Project, path: Path) -> None:
    """Keep a project's config, whole or not at all."""
    LocalStore(path.parent).write(path.name, project.model_dump_json(indent=1).encode())
