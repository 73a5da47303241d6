"""Curves and pictures of a training, as TensorBoard reads them: `tensorboard --logdir` on a run folder.

Loss, learning rate, gradient norm, skipped steps, codebook usage and perplexity over windows of tokens, figures and
reconstructions of held-out samples. A training that is resumed, or goes back, tells TensorBoard to forget the steps that are
taken again, so each shows once.
"""

import io
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fourmill.core.metrics import USAGE_WINDOW, codebook_use
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.preview import preview_png
from fourmill.tokenize.score import Scored
from fourmill.tokenize.state import State


class Journal:
    """The log of one training; of several processes only the first one writes."""

    def __init__(self, folder: Path, config: ImageTokenizerConfig, is_writing: bool) -> None:
        self._folder, self._config, self._is_writing = folder, config, is_writing
        self._writer: SummaryWriter | None = None
        self._tokens: list[Tensor] = []  # since usage was noted last
        self._num_tokens = 0

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def open(self, step: int) -> None:
        """Begin, or begin again, after a step: what was written of later ones is void."""
        self._close()
        self._tokens, self._num_tokens = [], 0
        if self._is_writing:
            is_first = not self._folder.exists()
            self._writer = SummaryWriter(str(self._folder), purge_step=None if is_first else step + 1)

    def note(self, state: State, loss: float, gradient_norm: float, tokens: Tensor | None) -> None:
        """Keep a step's tokens, and write its values where it is its turn.

        Args:
            tokens: codebook indices of this process's rows; None of a step that was skipped, whose latents may be no numbers.
        """
        if self._writer is None:
            return
        if tokens is not None:
            self._tokens.append(tokens.flatten())
            self._num_tokens += tokens.numel()
        if self._num_tokens >= USAGE_WINDOW:
            self._note_usage(self._writer, state.step)
        if state.step % self._config.training.log_every == 0:
            values = {"loss": loss, "learning_rate": state.learning_rate, "gradient_norm": gradient_norm}
            for name, value in {**values, "skipped_steps": state.guard.skipped}.items():
                self._writer.add_scalar(f"train/{name}", value, state.step)

    def score(self, step: int, scored: Scored) -> None:
        """Write figures and reconstructions of the held-out samples."""
        if self._writer is None:
            return
        use = codebook_use(scored.tokens, self._config.codebook_size)
        for name, value in {**scored.figures, "usage": use.usage, "perplexity": use.perplexity}.items():
            self._writer.add_scalar(f"held_out/{name}", value, step)
        png = preview_png(self._config.label, scored.true, scored.predicted)
        picture_HWC = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image("held_out/reconstructions", picture_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        """Bring what was written to the disk."""
        if self._writer is not None:
            self._writer.flush()

    def _note_usage(self, writer: SummaryWriter, step: int) -> None:
        tokens = np.concatenate([part.cpu().numpy() for part in self._tokens])
        use = codebook_use(tokens, self._config.codebook_size)
        writer.add_scalar("train/codebook_usage", use.usage, step)
        writer.add_scalar("train/codebook_perplexity", use.perplexity, step)
        self._tokens, self._num_tokens = [], 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
