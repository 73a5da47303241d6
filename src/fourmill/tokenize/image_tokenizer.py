"""One image tokenizer, whole: labels as stored to tokens, tokens to labels (4M, appendix B.3).

It takes squares of any side that its patches (and its U-Net's levels) divide: one vocabulary at several resolutions.
A VQ-VAE with a plain decoder (semseg, clip), or with a diffusion decoder trained end to end (rgb, depth, normal).
Its state dict has the public names, so that public weights can be loaded at the paper's sizes.
"""

# B batch, C channels, H W pixels, h w token grid, N = h*w tokens, D channels of a codeword, K classes

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.precision import exact_products, fast_products
from fourmill.core.ranks import ALONE, Ranks
from fourmill.core.streams import own_stream, streams_of
from fourmill.tokenize.config import (
    CLASS_CHANNELS,
    NUM_CLASS_ROWS,
    DiffusionDecoderConfig,
    ImageTokenizerConfig,
    Precision,
)
from fourmill.tokenize.conversions import Batch, check_batch, check_tokens, packed, to_network, to_store
from fourmill.tokenize.diffusion import add_noise, sample_ddim, signal_levels
from fourmill.tokenize.quantizer import Quantized, Quantizer
from fourmill.tokenize.samples import Features
from fourmill.tokenize.unet import PatchedUNet
from fourmill.tokenize.vit import PatchEncoder, VitDecoder, VitEncoder, choose_attention

# Images at a time, the last batch filled up: a token must not depend on what else is in its batch. An H100 tokenizes 4,700 a second
# by 32, and 7,000 by 128.
_BATCH = {"cpu": 32, "cuda": 128}
_DECODED = 32  # at a time


class ImageTokenizer(nn.Module):
    """Labels to tokens and back."""

    cls_emb: nn.Embedding  # semseg only
    post_quant_proj: nn.Conv2d  # plain decoders only
    _levels: Tensor  # diffusion decoders only: signal left at each step

    def __init__(
        self,
        config: ImageTokenizerConfig,
        depth_span: tuple[float, float] = (-4.0, 4.0),
        with_decoder: bool = True,
    ) -> None:
        """A new tokenizer.

        Args:
            depth_span: standardised depth that is given back as 0 and as 1; the span of the training set.
            with_decoder: without it tokens can be made and not decoded, in a fraction of the memory.
        """
        super().__init__()
        self.config = config
        self.depth_span = depth_span
        encoder, quantizer, decoder = config.encoder, config.quantizer, config.decoder
        patch_px = 1 if config.label == "clip" else config.patch_px
        if config.label == "semseg":
            self.cls_emb = nn.Embedding(NUM_CLASS_ROWS, CLASS_CHANNELS)
        if encoder.kind == "vit":
            self.encoder = VitEncoder(encoder, config.in_channels, patch_px, config.grid)
        else:
            self.encoder = PatchEncoder(encoder, config.in_channels, patch_px)
        self.quant_proj = nn.Conv2d(encoder.width, quantizer.latent_dim, 1)
        self.quantize = Quantizer(quantizer, config.stale_threshold)
        if not with_decoder:
            pass
        elif isinstance(decoder, DiffusionDecoderConfig):
            self.decoder = PatchedUNet(decoder, config.in_channels, quantizer.latent_dim)
            self.register_buffer("_levels", signal_levels(decoder.train_steps), persistent=False)
        else:
            channels = NUM_CLASS_ROWS if config.label == "semseg" else config.in_channels
            self.post_quant_proj = nn.Conv2d(quantizer.latent_dim, decoder.width, 1)
            self.decoder = VitDecoder(decoder, channels, patch_px, config.grid)
        self._suit(torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_proj.weight.device

    @property
    def batch_size(self) -> int:
        """Images that are tokenized at a time."""
        return _BATCH.get(self.device.type, _BATCH["cpu"])

    @property
    def streams(self) -> int:
        """Batches that may be tokenized at a time, each from a thread; see `core.streams`."""
        return streams_of(self.device)

    def to_device(self, device: torch.device) -> "ImageTokenizer":
        """Move to a device and choose its kernels."""
        self.to(device)
        self._suit(device)
        return self

    def _suit(self, device: torch.device) -> None:
        choose_attention(self, device)
        decoder = getattr(self, "decoder", None)
        if isinstance(decoder, PatchedUNet):
            decoder.choose_layout(device, self.config.training.precision == "bf16")

    def encode(self, x: Tensor, generator: torch.Generator | None = None, ranks: Ranks = ALONE) -> Quantized:
        """Network input (see `conversions`) to codewords; moves the codebook in training mode."""
        return self.quantize(self.quant_proj(self.encoder(self._embedded(x))), generator, ranks)

    def _embedded(self, x: Tensor) -> Tensor:
        return self.cls_emb(x).movedim(-1, 1) if self.config.label == "semseg" else x

    def loss(self, x: Tensor, generator: torch.Generator, ranks: Ranks = ALONE) -> tuple[Tensor, Quantized]:
        """Training loss on a batch of network input: reconstruction plus weighted commitment.

        Args:
            x: this process's rows of the batch.
            generator: on the CPU, equal on all processes; noise, steps, scored tokens and codebook restarts follow from it. What
                a row draws does not depend on how many processes there are.
            ranks: the processes that share the batch.
        """
        seeds = torch.randint(2**62, (len(x) * ranks.size,), generator=generator)[ranks.rank :: ranks.size]
        draws = [torch.Generator(x.device).manual_seed(int(seed)) for seed in seeds]
        quantized = self.encode(x, generator, ranks)
        if isinstance(self.decoder, VitDecoder):
            features_BND = self.decoder.features(self.post_quant_proj(quantized.latent_BDhw))
            reconstruction = self._plain_loss(self.decoder, features_BND, x, draws)
        else:
            predicted = self._denoised(x, quantized.latent_BDhw, draws)
            reconstruction = _LOSSES[self.config.training.loss](predicted.float(), x)
        return reconstruction + self.config.quantizer.commitment_weight * quantized.commitment, quantized

    def _plain_loss(
        self, decoder: VitDecoder, features_BND: Tensor, x: Tensor, draws: Sequence[torch.Generator]
    ) -> Tensor:
        """Loss of a plain decoder on a share of each image's tokens, drawn anew for each batch."""
        target_BN = _by_token(x, decoder.patch_px)
        num = max(1, round(self.config.training.scored_share * target_BN.shape[1]))
        if num < target_BN.shape[1]:
            ranking_BN = torch.stack([torch.rand(target_BN.shape[1], generator=g, device=g.device) for g in draws])
            picks_Bn = ranking_BN.argsort(1)[:, :num]
            rows_B1 = torch.arange(len(x), device=x.device)[:, None]
            features_BND, target_BN = features_BND[rows_B1, picks_Bn], target_BN[rows_B1, picks_Bn]
        values = decoder.pixel_values(features_BND).float()
        if self.config.label == "semseg":
            return F.cross_entropy(values.flatten(0, 2), target_BN.flatten())
        return _LOSSES[self.config.training.loss](values, target_BN)

    def _denoised(self, x_BCHW: Tensor, latent_BDhw: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        num, shape = len(self._levels), x_BCHW.shape[1:]
        step_B = torch.cat([torch.randint(num, (1,), generator=g, device=g.device) for g in draws])
        noise_BCHW = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in draws])
        noised_BCHW = add_noise(x_BCHW, noise_BCHW, self._levels[step_B])
        return self.decoder(noised_BCHW, step_B, latent_BDhw)

    def check(self, batch: Batch | Tensor) -> None:
        """See that a batch is what this tokenizer's label is stored as.

        Raises:
            LabelError: it is not; what was found and what is expected.
        """
        check_batch(batch, self.config)

    def tokenize_features(
        self, features: Features, crops_BSSC: NDArray[np.uint8], precision: Precision = "fp32"
    ) -> NDArray[np.int16]:
        """`tokenize` of the features of crops, which stay on the device where they can; rounded to 16 bits, as training sets
        hold them.
        """
        on_device = getattr(features, "on_device", None)
        with own_stream(self.device):
            if on_device is None:
                return self.tokenize(features(crops_BSSC).astype(np.float16).astype(np.float32), precision)
            return self.tokenize(on_device(crops_BSSC).half().float(), precision)

    @torch.no_grad()
    def tokenize(self, batch: Batch | Tensor, precision: Precision = "fp32") -> NDArray[np.int16]:
        """Labels as the store holds them to codebook indices.

        Args:
            batch: of any length; type, shape and range by label as in `conversions`, of any side that fits. Features may be a
                tensor on any device.
            precision: of the encoder's blocks; latents are made and compared in float32.

        Returns:
            Tokens (B, N) int16 in raster order; N follows from the side.

        Raises:
            LabelError: the batch is not what this tokenizer's label is stored as.
            ValueError: latents that are no numbers also in float32: the weights are damaged.
        """
        self.check(batch)
        was_training = self.training
        if was_training:
            self.eval()
        grid = batch.shape[1] if self.config.label == "clip" else batch.shape[1] // self.config.patch_px
        tokens = np.zeros((len(batch), grid**2), np.int16)
        try:
            with own_stream(self.device):
                for start in range(0, len(batch), self.batch_size):
                    part = batch[start : start + self.batch_size]
                    x = to_network(part, self.config.label, self.device)
                    x = torch.cat([x, x[:1].expand(self.batch_size - len(x), *x.shape[1:])])
                    tokens[start : start + len(part)] = self._told_apart(x, precision)[: len(part)]
        finally:
            if was_training:
                self.train()
        return tokens

    def _told_apart(self, x: Tensor, precision: Precision) -> NDArray[np.int64]:
        """`tokens` (B, N) of a batch; where half precision cannot hold some images, theirs are those of the batch in float32.

        The whole batch, since kernels are chosen by its size: a sample's tokens would depend on how many others overflow.
        """
        tokens_BN = self.tokens(x, precision).flatten(1).cpu().numpy()
        unfit_B = tokens_BN.min(1) < 0
        if precision != "fp32" and unfit_B.any():
            return np.where(unfit_B[:, None], self._told_apart(x, "fp32"), tokens_BN)
        if unfit_B.any():
            raise ValueError(
                f"latents of the {self.config.label} tokenizer are no numbers, also in float32: its weights are damaged; "
                "train or import it again"
            )
        return tokens_BN

    def tokens(self, x: Tensor, precision: Precision = "fp32") -> Tensor:
        """Codebook indices (B, h, w) int64 of network input (see `conversions`); -1 where a latent is no number."""
        is_half = precision != "fp32"
        kind = torch.float16 if precision == "fp16" else torch.bfloat16
        # Ten bits of the last layer are plenty beside eight or ten, and seven, bfloat16's, are too few: codewords are told apart by
        # it. A GPU multiplies with ten as float16, twice as fast as in float32 (TF32). Past a norm and a tanh nothing is too large.
        last_kind = torch.float16 if is_half and x.is_cuda else torch.float32
        with fast_products(is_half), torch.autocast(x.device.type, kind, enabled=is_half):
            features_BDhw = self.encoder(self._embedded(x), last_kind)
        with exact_products():
            latent_BDhw = self.quant_proj(features_BDhw.float())
            return self.quantize.nearest(latent_BDhw).where(latent_BDhw.isfinite().all(1), -1)

    @torch.no_grad()
    def detokenize(
        self,
        tokens_BN: NDArray[np.integer],
        seed: int = 0,
        sample_steps: int | None = None,
        as_stored: bool = False,
    ) -> Batch:
        """Codebook indices to labels of the kind that `tokenize` takes.

        Depth is relative: each map's own scale and shift are not in its tokens.

        Args:
            tokens_BN: (B, N) of any integer type; N is a square.
            seed: of the diffusion decoder's noise; the same tokens and seed give the same label.
            sample_steps: DDIM steps of a diffusion decoder; the config's by default.
            as_stored: as files hold it: depth as uint16 and normals as uint8, which `core.labels` would encode to. All else is
                stored as it is. See the table in `conversions`.

        Returns:
            Labels of B squares; type, shape and range by label as in `conversions`.

        Raises:
            LabelError: tokens that are no integers, of no square grid, of a size that does not fit, or outside the codebook.
            ValueError: the tokenizer was loaded without its decoder; sampling steps of none or of more than its schedule has; or
                what is decoded are no numbers: the weights are damaged.
        """
        if not hasattr(self, "decoder"):
            raise ValueError(f"this {self.config.label} tokenizer was loaded without its decoder; load all of it")
        grid = check_tokens(tokens_BN, self.config)
        side_px = grid * self.config.patch_px
        was_training = self.training
        self.eval()
        tokens_Bhw = torch.from_numpy(tokens_BN.astype(np.int64)).view(-1, grid, grid)
        # Networks take no empty batch.
        some_Bhw = tokens_Bhw if len(tokens_Bhw) else tokens_Bhw.new_zeros(1, grid, grid)
        generator = torch.Generator().manual_seed(seed)
        # The same noise for every image of a batch: what is decoded depends on its own tokens and the seed only.
        noise = torch.randn((1, self.config.in_channels, side_px, side_px), generator=generator)
        try:
            parts = [self._decoded(part, noise, sample_steps) for part in some_Bhw.split(_DECODED)]
        finally:
            self.train(was_training)
        labels = np.concatenate(parts)[: len(tokens_BN)]
        return packed(labels, self.config.label) if as_stored else labels

    def _decoded(self, tokens_Bhw: Tensor, noise_1CHW: Tensor, sample_steps: int | None) -> Batch:
        x_BCHW = self._decode(tokens_Bhw.to(self.device), noise_1CHW, sample_steps)
        if not bool(x_BCHW.isfinite().all()):
            raise ValueError(
                f"the {self.config.label} tokenizer decodes to no numbers: its weights are damaged; train or import it again"
            )
        return to_store(x_BCHW, self.config.label, self.depth_span)

    def _decode(self, tokens_Bhw: Tensor, noise_1CHW: Tensor, sample_steps: int | None) -> Tensor:
        latent_BDhw = self.quantize.lookup(tokens_Bhw)
        decoder = self.config.decoder
        if not isinstance(decoder, DiffusionDecoderConfig):
            return self.decoder(self.post_quant_proj(latent_BDhw))
        return sample_ddim(
            lambda x_BCHW, step_B: self.decoder(x_BCHW, step_B, latent_BDhw),
            noise_1CHW.to(self.device).expand(len(tokens_Bhw), -1, -1, -1),
            self._levels,
            decoder.sample_steps if sample_steps is None else sample_steps,
            decoder.clamp,
        )


_LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


def _by_token(x: Tensor, patch_px: int) -> Tensor:
    """Network input by token: (B, N, patch pixels) classes, or (B, N, patch pixels, C) values."""
    last = x if x.ndim == 3 else x.movedim(1, -1)
    patches = last.unflatten(2, (-1, patch_px)).unflatten(1, (-1, patch_px))
    return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)
