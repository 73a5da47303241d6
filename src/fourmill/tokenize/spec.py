"""What the training program of tokenizers is given: `python -m fourmill.tokenize --spec FILE`. No torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fourmill.core.digest import digest_json
from fourmill.tokenize.config import TRAIN_VERSION, ImageTokenizerConfig, Positive


class StageRecord(BaseModel):
    """A stage that was trained: what reports and cards of the later ones say of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str = Field(description="Of its weights and config.")
    path: str = Field(description="Store path of its model.")
    train_set: str = Field(description="Digest of the packed set that it saw.")
    steps: int
    skipped_steps: int
    headline: str = Field(description="Name of its headline figure.")
    value: float = Field(description="Its headline figure on the held-out samples.")


class TokenizerSpec(BaseModel):
    """All that `python -m fourmill.tokenize --spec FILE` needs to train one image tokenizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(description="Root of the store.")
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_@]*$")] = Field(
        description="Model name: models/{name}/{digest}/."
    )
    config: ImageTokenizerConfig
    train_set: str = Field(description="Store path of the packed training set.")
    train_set_digest: str = Field(description="Digest of its content; training stops when the file has another.")
    earlier: tuple[StageRecord, ...] = Field(
        default=(), description="Stages before this one; it begins with the weights of the last of them."
    )
    run_folder: str = Field(description="Local folder for checkpoints, so that a killed training resumes.")
    threads: Positive = Field(default=2, description="CPU threads of each process.")
    processes: Positive = Field(default=1, description="Processes that share every batch, as torchrun starts them.")

    @property
    def input_digest(self) -> str:
        """Digest of all that the weights depend on: equal inputs, equal tokenizer."""
        config, begun = self.config.weights_depend_on, [stage.digest for stage in self.earlier[-1:]]
        return digest_json([TRAIN_VERSION, config, self.train_set_digest, self.threads, self.processes, begun])
