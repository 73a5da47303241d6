"""What a tokenizer must reach to serve. No torch: definitions load this."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class TokenizerBounds(BaseModel):
    """Of one tokenizer, on held-out samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    headline: float | None = Field(
        default=None,
        description="Worst headline figure on held-out samples; None: the share of the baseline's error decides.",
    )
    error_share: Annotated[float, Field(gt=0)] | None = Field(
        default=0.7,
        description="Largest share of the baseline's error that may be left (squared error for PSNR, distance to 1 for mIoU and "
        "R2), where there is no `headline`; None: no bound.",
    )
    min_usage: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Least share of the codebook in use on held-out samples; below it the tokenizer collapses.",
    )

    def reaches(self, headline: Mapping[str, Any]) -> bool:
        """Whether a report's headline (name, value, baseline, better) is good enough."""
        value, is_more_better = headline["value"], headline["better"] == "higher"
        if self.headline is not None:
            return value >= self.headline if is_more_better else value <= self.headline
        return self.error_share is None or _error_share(headline) <= self.error_share

    def is_used(self, usage: float) -> bool:
        """Whether enough of the codebook is in use: `usage` is a report's, of held-out samples."""
        return usage >= self.min_usage


def _error_share(headline: Mapping[str, Any]) -> float:
    value, baseline = headline["value"], headline["baseline"]
    if headline["name"] == "psnr_db":
        return 10 ** ((baseline - value) / 10)
    if headline["better"] == "higher":  # at most 1
        return (1 - value) / max(1 - baseline, 1e-6)
    return value / max(baseline, 1e-6)
