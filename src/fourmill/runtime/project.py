"""The project: one complete config of everything, made by a profile and kept as JSON beside the store.

Each room owns its own config; this is only where they meet.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fourmill.core.modality import IMAGE_TOKENS, Modality, modality_table
from fourmill.core.names import Layout
from fourmill.core.store import is_local
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.pseudolabel.config import LabellerConfig
from fourmill.runtime.ray_session import RayConfig
from fourmill.tokenize.config import ImageLabel, ImageTokenizerConfig, TextTokenizerConfig, TrainSetConfig
from fourmill.train.config import PretrainConfig


class ProjectError(ValueError):
    """A project that cannot be used, said with the next step."""


class SamplesConfig(BaseModel):
    """What is shown and scored at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_shown: Annotated[int, Field(gt=0)] = Field(default=6, description="Held-out samples in the pictures.")
    num_scored: Annotated[int, Field(gt=0)] = Field(default=200, description="Held-out samples behind the figures.")
    decoding_steps: Annotated[int, Field(gt=0)] = Field(default=4, description="MaskGIT steps for each image modality.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Sampling temperature; 0 takes the best."
    )
    seed: int = 0
    superres_steps: Annotated[int, Field(gt=0)] = Field(
        default=8, description="MaskGIT steps of super-resolution; 8 as public."
    )


class Project(BaseModel):
    """Everything that a materialization depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(description="Name of the profile that this config came from.")
    store: str = Field(description="Root of the store: a folder, or s3://bucket/prefix.")
    scratch: str | None = Field(
        default=None, description="Local folder for training programs' specs, logs and checkpoints; None: the store."
    )
    dataset: str = Field(
        default="cc12m", pattern=r"^[a-z][a-z0-9_]*$", description="Name in asset keys and store paths."
    )
    source: SourceConfig
    layout: Layout
    ingest: IngestConfig
    labellers: dict[str, LabellerConfig] = Field(description="One each for depth, normal, semseg, det, and clip.")
    train_set: TrainSetConfig
    tokenizers: dict[str, ImageTokenizerConfig] = Field(description="One for each image modality.")
    text: TextTokenizerConfig
    pretrain: PretrainConfig
    text2im: PretrainConfig
    samples: SamplesConfig = SamplesConfig()
    ray: RayConfig = RayConfig()
    threads: Annotated[int, Field(gt=0)] = Field(default=2, description="CPU threads of a tokenizer's training.")
    fourm_threads: Annotated[int, Field(gt=0)] = Field(
        default=1,
        description="CPU threads of each process of 4M's training; at the demo's size a second one gains nothing.",
    )
    fourm_processes: Annotated[int, Field(gt=0)] = Field(
        default=1, description="Processes that share every batch of 4M's training."
    )

    @model_validator(mode="after")
    def _scratch_is_local(self) -> "Project":
        if not is_local(self.scratch or self.store):
            raise ValueError(
                f"the store {self.store!r} is no local folder: give `scratch` one, for logs and checkpoints of trainings"
            )
    second_px: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Side of the crops of a second resolution, for super-resolution; None: there is none."
    )
    second_labels: tuple[ImageLabel, ...] = Field(
        default=(), description="Images that are tokenized at the second resolution too; rgb among them."
    )
    superres: PretrainConfig | None = Field(
        default=None, description="The fine-tune from the lower to the higher resolution; None where there is one only."
    )
        return self

    @property
    def local_folder(self) -> Path:
        """Where training programs keep what need not be shared."""
        return Path((self.scratch or self.store).removeprefix("file://"))

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

    @property
    def input_px(self) -> int:
        """Side of the crops that are tokenized, at the base resolution."""
        return self.tokenizers["rgb"].input_px

    @property
    def patch_px(self) -> int:
        """Side of the patch behind one token."""
        return self.tokenizers["rgb"].patch_px

    def modalities(self) -> dict[str, Modality]:
        """The modality table of this project, by name."""
        vocab = {label: self.tokenizers[label].codebook_size for label in IMAGE_TOKENS}
        return modality_table(
            self.input_px, self.patch_px, vocab, self.text.vocab_size, self.second_px, self.second_labels
        )


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
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ProjectError(f"{path} is not a project:\n" + "\n".join(lines)) from error


def write_project(project: Project, path: Path) -> None:
    """Keep a project's config, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(project.model_dump_json(indent=1))
    draft.replace(path)
