"""Starting from a trained 4M: what two models share is copied, what is new starts at random or from its twin.

A fine-tune may know modalities that the model it starts from does not (a second resolution), and may see or predict fewer
of that one's; nothing else may differ. Handled by name: embeddings of a modality that the source does not have on a side
are new, and the source's embeddings of a modality that takes no part on a side are left behind.
"""

import torch

from fourmill.train.load import ModelError
from fourmill.train.model import Embedding, FourM

_SIDES = ("encoder_embeddings", "decoder_embeddings")


def start_from(model: FourM, source: FourM, copy_tables: bool, where: str) -> None:
    """Copy a trained model's weights into a new one.

    Args:
        copy_tables: start the token table (or pixel projection) of a new modality from the same label's at the other
            resolution, instead of at random.
        where: what the source is called in errors.

    Raises:
        ModelError: the two differ in more than modalities may, each difference named.
    """
    problems = _differences(model, source)
    if problems:
        raise ModelError(f"{where} cannot be fine-tuned with this config and manifest: {'; '.join(problems)}")
    new, old = model.state_dict(), source.state_dict()
    added = {f"{side}.{name}." for side in _SIDES for name in _names(model, side) - _names(source, side)}
    assert all(any(key.startswith(prefix) for prefix in added) for key in new.keys() - old.keys())
    model.load_state_dict({**new, **{key: old[key] for key in new.keys() & old.keys()}})
    if copy_tables:
        for side in _SIDES:
            _copy_tables(model, source, side)


def _differences(model: FourM, source: FourM) -> list[str]:
    """What must be equal and is not: found in the source, and asked for."""
    asked, found = model.config.model_dump(), source.config.model_dump()
    problems = [f"{key} is {found[key]}, the config says {asked[key]}" for key in asked if found[key] != asked[key]]
    if model.patch_px != source.patch_px:
        problems.append(f"patch_px is {source.patch_px}, the manifest says {model.patch_px}")
    for name in sorted(source.by_name.keys() & model.by_name.keys()):
        known, wanted = source.by_name[name], model.by_name[name]
        if known != wanted:
            problems.append(f"it knows {known}, here is {wanted}: train it from this manifest")
    return problems


def _names(model: FourM, side: str) -> set[str]:
    return set(getattr(model, side))


@torch.no_grad()
def _copy_tables(model: FourM, source: FourM, side: str) -> None:
    """Tables of one side's new modalities from their twins; what tells the two apart, `mod_emb`, stays as it is."""
    for name in sorted(_names(model, side) - _names(source, side)):
        label = model.by_name[name].label
        twin = next((n for n in sorted(_names(source, side)) if source.by_name[n].label == label), None)
        if twin is None:
            continue
        to, of = getattr(model, side)[name], getattr(source, side)[twin]
        assert isinstance(to, Embedding) and isinstance(of, Embedding)
        part = "proj" if hasattr(of, "proj") else "token_emb"
        getattr(to, part).weight.copy_(getattr(of, part).weight)
