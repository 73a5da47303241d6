"""4M and the tokenizers together: tokens that 4M generates, decoded to maps, boxes and sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.labels import Box
from fourmill.core.modality import IMAGE_TOKENS, TEXTS, tokens_name
from fourmill.core.sequences import TextTokenizer, parse_detection
from fourmill.runtime.models import ModelRef, current
from fourmill.runtime.session import Session
from fourmill.runtime.token_assets import token_assets
from fourmill.tokenize.released import TEXT_FILE

if TYPE_CHECKING:
    from fourmill.tokenize.image_tokenizer import ImageTokenizer
    from fourmill.train.model import FourM


@dataclass(frozen=True)
class Generated:
    """What 4M made of B inputs."""

    maps: dict[str, NDArray[Any]]  # by label, as tokenizers give them back
    boxes: list[list[Box]]
    captions: list[str]


def joined(parts: Sequence[Generated]) -> Generated:
    """What was made of parts, in their order."""
    return Generated(
        {label: np.concatenate([part.maps[label] for part in parts]) for label in parts[0].maps},
        [boxes for part in parts for boxes in part.boxes],
        [caption for part in parts for caption in part.captions],
    )


class Generator:
    """The models that serve in a project, loaded when first used.

    Args:
        instead: models of 4M by name, to be used in the place of those that serve.
    """

    def __init__(self, session: Session, instead: Mapping[str, ModelRef] | None = None) -> None:
        self._session = session
        self._instead = instead or {}
        self._store = session.store
        self._dataset = session.project.dataset
        self.seed = session.project.samples.seed

    @cached_property
    def tokenizers(self) -> "dict[str, ImageTokenizer]":
        """Image tokenizers by label."""
        from fourmill.tokenize.load import load_image_tokenizer

        refs = {label: current(self._store, self._dataset, label, f"tokenizers/{label}") for label in IMAGE_TOKENS}
        return {label: load_image_tokenizer(self._store, ref.path, _device()) for label, ref in refs.items()}

    @cached_property
    def text(self) -> TextTokenizer:
        """The joint vocabulary."""
        ref = current(self._store, self._dataset, "text", "tokenizers/text")
        return TextTokenizer(self._store.read(f"{ref.path}/{TEXT_FILE}"))

    def model(self, name: str, asset: str) -> "FourM":
        """A trained 4M."""
        from fourmill.train.load import load_fourm

        ref = self._instead.get(name) or current(self._store, self._dataset, name, asset)
        return load_fourm(self._store, ref.path, _device())

    def reconstruct(self, tokens: dict[str, NDArray[np.int16]]) -> dict[str, NDArray[Any]]:
        """Tokens back to maps, by label."""
        seed = self._session.project.samples.seed
        return {label: self.tokenizers[label].detokenize(ids, seed) for label, ids in tokens.items()}

    def from_rgb(self, rgb_BHWC: NDArray[np.uint8], first_row: int = 0) -> Generated:
        """Every other modality from pixels alone, each from the pixels and not from one another.

        Args:
            first_row: number of the first image, where these are a part of more.
        """
        from fourmill.train.generate import generate_from_rgb

        config = self._session.project.samples
        assets = token_assets(self._session.project)
        names = {label: assets[label].modality for label in (*IMAGE_TOKENS, *TEXTS)}
        made = generate_from_rgb(
            self.model("fourm", "fourm/pretrain"),
            rgb_BHWC,
            targets=list(names.values()),
            steps=config.decoding_steps,
            temperature=config.temperature,
            seed=config.seed,
            first_row=first_row,
        )
        maps = self.reconstruct({label: np.asarray(made[names[label]]) for label in IMAGE_TOKENS})
        return Generated(
            maps=maps,
            boxes=[parse_detection(self.text.decode(ids)) for ids in made["det"]],
            captions=[self.text.decode(ids) for ids in made["caption"]],
        )

    def superres(self, low: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The higher resolution of RGB from the lower one, by the super-resolution fine-tune.

        Args:
            low: tokens (B, L) of the lower resolution, or images of its side.

        Returns:
            Tokens of the higher resolution, (B, L'), and what the tokenizer makes of them.

        Raises:
            ValueError: the project has one resolution only, or `low` is of another size.
        """
        from fourmill.train.generate import super_resolve

        project = self._session.project
        if project.second_px is None:
            raise ValueError("this project has one resolution only; give second_px, second_labels and superres")
        low_px, high_px = sorted((project.input_px, project.second_px))
        tokens = low if low.ndim == 2 else self.tokenizers["rgb"].tokenize(low)
        target, config = tokens_name("rgb", high_px), project.samples
        made = super_resolve(
            self.model("superres", "fourm/superres"),
            {tokens_name("rgb", low_px): tokens},
            targets=[target],
            steps=config.superres_steps,
            temperature=config.temperature,
            seed=config.seed,
        )
        high = np.asarray(made[target])
        return high, self.tokenizers["rgb"].detokenize(high, config.seed)

    def from_captions(self, captions: list[str]) -> NDArray[np.uint8]:
        """Pictures from sentences alone, by the text-to-image fine-tune. (B, S, S, 3) uint8."""
        from fourmill.train.generate import generate_from_caption

        config = self._session.project.samples
        name = token_assets(self._session.project)["rgb"].modality
        made = generate_from_caption(
            self.model("text2im", "fourm/text2im"),
            self.text.encode_batch(captions),
            targets=[name],
            steps=config.decoding_steps,
            temperature=1.0,
            seed=config.seed,
        )
        return self.tokenizers["rgb"].detokenize(np.asarray(made[name]), config.seed)


def _device() -> str:
    """The first GPU when there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
