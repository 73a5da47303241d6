"""Weights as their authors publish them, to what labellers load: model.safetensors and config.json, verified, in the store.

A file that is not exactly the network's is refused by the names of its keys. Equal weights give equal digests, from
whichever file they came.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from fourmill.core.digest import digest_file
from fourmill.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fourmill.core.safe_load import read_weights
from fourmill.core.store import Store
from fourmill.core.weights import shown_problems
from fourmill.pseudolabel import clip, detector, dpt, mask2former
from fourmill.pseudolabel.choices import clip_config
from fourmill.pseudolabel.config import DetectorConfig, DptConfig, Mask2FormerConfig
from fourmill.pseudolabel.folders import read_facts
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.members import OWN
from fourmill.pseudolabel.network import from_folder
from fourmill.pseudolabel.omnidata import from_omnidata, omnidata_config
from fourmill.pseudolabel.stored import (
    CARD,
    CONFIG_FILE,
    ORIGINS,
    WEIGHTS_FILE,
    Origin,
    Pointer,
    StoredRef,
    digest_folder,
    origins,
    pointer_path,
)
from fourmill.pseudolabel.vitdet_keys import MASK_HEAD, VitDetArchitecture, check_vitdet, read_architecture

_OF_THE_MAKER = ("transformers_version", "_name_or_path")  # facts of config.json that are not the network's


def add_weights(
    store: Store, name: str, source: Path, origin: str, licence: str | None = None, architecture: Any = None
) -> Pointer:
    """Verify and convert weights, keep them under their digest, and let them serve by their name from now on.

    Args:
        name: one of `stored.origins`.
        source: a Hugging Face folder, or for depth, normal and vitdet the authors' file.
        origin: where it came from, for people.
        licence: of the weights; None: it is not known.
        architecture: of a file, where it is not the public one's.

    Raises:
        ValueError: no such name, or not such weights.
        NetworkError: a key is missing, unknown, of another shape, or holds NaN; it is named.
        FileNotFoundError: nothing at `source`.
    """
    if name not in (known := origins()):
        raise ValueError(f"no weights are called {name!r}; names are {', '.join(known)}")
    if not source.exists():
        raise FileNotFoundError(f"nothing at {source}; give a file, a folder, or hf:ID")
    with TemporaryDirectory(prefix="fourmill-weights-") as temporary:
        made = Path(temporary)
        _convert(name, source, made, architecture)
        _check_numbers(made / WEIGHTS_FILE, source)
        pointer = Pointer(
            name=name,
            digest=digest_folder(made),
            kind=known[name].kind,
            origin=origin,
            licence=licence or "not stated",
        )
        _publish(store, pointer, made, _card(pointer, known[name], source))
    store.write(pointer_path(name), pointer.model_dump_json(indent=1).encode())
    return pointer


def _convert(name: str, source: Path, target: Path, architecture: Any) -> None:
    own = OWN[name].weights if name in OWN else None
    if own is None:
        _CONVERTERS[ORIGINS[name].kind](name, source, target, architecture)
    else:
        own.convert(source, target)
        make_labeller(name, OWN[name].config.model_validate({"weights": str(target)}))


def _check_numbers(made: Path, source: Path) -> None:
    """Miss numbers here, not in the first batch on a GPU. Infinite ones may be meant: some networks keep masks of them."""
    from safetensors import safe_open

    with safe_open(made, "pt") as file:
        broken = [key for key in file.keys() if bool(file.get_tensor(key).isnan().any())]
    if broken:
        raise NetworkError(f"{source} holds NaN in {shown_problems(broken)}: a training that failed, or a damaged file")


def _publish(store: Store, known: Pointer, made: Path, card: str) -> None:
    folder = StoredRef(known.name, known.digest).folder
    store.write(f"{folder}/{CARD}", card.encode())
    for name in (CONFIG_FILE, WEIGHTS_FILE):  # the weights last: with them the folder is whole
        if not store.exists(f"{folder}/{name}"):
            with (made / name).open("rb") as file, store.create(f"{folder}/{name}") as target:
                while part := file.read(1 << 22):
                    target.write(part)


def _card(known: Pointer, public: Origin, source: Path) -> str:
    lines = [f"# {known.name}", "", f"- digest of weights and config: {known.digest}", f"- network: {known.kind}"]
    lines += [f"- origin: {known.origin}"]
    if source.is_file():
        lines += [f"- sha256 of the file it was made from: {digest_file(source)}"]
    lines += [f"- licence: {known.licence}"]
    lines += [f"- the public weights of this name: {public.about}; licence: {public.licence}", ""]
    return "\n".join(lines)


def _dpt(name: str, source: Path, target: Path, architecture: Any) -> None:
    channels = 3 if name == "normal" else 1
    if source.is_dir():
        network = from_folder(name, source, dpt.model_class(channels))
    else:
        network = from_omnidata(read_weights(source), channels, architecture or omnidata_config(), str(source))
    _save(network, target)
    del network  # it is as large as the one that is made next
    make_labeller(name, DptConfig(weights=str(target)))


def _mask2former(name: str, source: Path, target: Path, architecture: Any) -> None:
    _save(from_folder(name, _folder(name, source), mask2former.model_class()), target)
    make_labeller(name, Mask2FormerConfig(weights=str(target)))


def _detector(name: str, source: Path, target: Path, architecture: Any) -> None:
    _save(from_folder(name, _folder(name, source), detector.model_class()), target)
    # Threshold and colours are for the project to say, not for the weights.
    make_labeller(name, DetectorConfig(weights=str(target), score_threshold=0.5, mean=IMAGENET_MEAN, std=IMAGENET_STD))


def _clip(name: str, source: Path, target: Path, architecture: Any) -> None:
    _save(from_folder(name, _folder(name, source), clip.model_class()), target)
    make_features(clip_config(str(target), read_facts(target), grid=1))


def _vitdet(name: str, source: Path, target: Path, architecture: Any) -> None:
    from safetensors.torch import save_file

    found = architecture or (read_architecture(source) if source.is_dir() else VitDetArchitecture())
    state = read_weights(source / WEIGHTS_FILE if source.is_dir() else source)
    state = {key: value for key, value in sorted(state.items()) if not key.startswith(MASK_HEAD)}
    check_vitdet(state, found, str(source))
    save_file({key: value.float().contiguous() for key, value in state.items()}, target / WEIGHTS_FILE)
    (target / CONFIG_FILE).write_text(json.dumps(found.model_dump(mode="json"), indent=1, sort_keys=True))


_CONVERTERS: dict[str, Callable[[str, Path, Path, Any], None]] = {
    "dpt": _dpt,
    "mask2former": _mask2former,
    "detector": _detector,
    "clip": _clip,
    "vitdet": _vitdet,
}


def _folder(name: str, source: Path) -> Path:
    if source.is_dir():
        return source
    raise ValueError(
        f"{name}: {source} is a file, expected a Hugging Face folder with config.json and model.safetensors; the public one is "
        f"{ORIGINS[name].source}"
    )


def _save(network: nn.Module, target: Path) -> None:
    saved: Any = network
    saved.save_pretrained(target, max_shard_size="1TB")
    facts = json.loads((target / CONFIG_FILE).read_text())
    kept = {key: value for key, value in facts.items() if key not in _OF_THE_MAKER}
    (target / CONFIG_FILE).write_text(json.dumps(kept, indent=1, sort_keys=True))
