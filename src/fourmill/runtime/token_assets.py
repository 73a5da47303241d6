"""The assets `tokens/*` of a project: what each is called, which modality it makes, by which tokenizer, of which crops.

The base resolution has the label's name (`tokens/rgb`), the second one its size too (`tokens/rgb_448`).
"""

from dataclasses import dataclass

from fourmill.core.modality import IMAGE_TOKENS, TEXTS, tokens_name
from fourmill.runtime.project import Project


@dataclass(frozen=True)
class TokenAsset:
    """One asset of the tokens group."""

    name: str  # `tokens/{name}`
    label: str  # rgb, depth, normal, semseg, clip, caption or det
    modality: str  # tok_rgb@448
    tokenizer: str  # `tokenizers/{tokenizer}`
    px: int  # side of the crops; texts are cropped as the base resolution


def token_assets(project: Project) -> dict[str, TokenAsset]:
    """Every one of them by name: image labels, those of the second resolution, texts."""
    base, second = project.input_px, project.second_px
    found = [TokenAsset(label, label, tokens_name(label, base), label, base) for label in IMAGE_TOKENS]
    if second is not None:
        found += [
            TokenAsset(f"{label}_{second}", label, tokens_name(label, second), label, second)
            for label in project.second_labels
        ]
    found += [TokenAsset(text, text, text, "text", base) for text in TEXTS]
    return {asset.name: asset for asset in found}
