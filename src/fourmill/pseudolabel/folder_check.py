"""What a weights folder may say, checked before transformers reads it: nothing in it is run, and nothing else is fetched.

transformers heeds more of a config.json than sizes: attention from a hub's repository is downloaded and run, backbones and
base networks are fetched by their names, and files outside of the folder are read. Versions differ in what they heed; this
refuses what any from 5.0 on does. generation_config.json and preprocessor_config.json are never read: none of the networks
generates, and labellers prepare images themselves.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fourmill.core.safe_load import UnsafeFileError

_IMPLEMENTATIONS = {
    # Flash attention is not among them: where its package lacks, transformers takes it from a hub.
    "attn_implementation": ("eager", "sdpa", "flex_attention"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}

_PROGRAM, _HUB, _OTHER = "a program of its own", "programs from a hub", "files that are not the folder's"
_REFUSED = {
    "auto_map": _PROGRAM,
    "trust_remote_code": _PROGRAM,
    "use_kernels": _HUB,
    "kernel_config": _HUB,
    "allow_all_kernels": _HUB,
    "quantization_config": "quantised weights, whose loaders fetch programs",
    "compression_config": "quantised weights, whose loaders fetch programs",
    "use_pretrained_backbone": "weights that are not the folder's (false is enough, if they are in it)",
    "transformers_weights": _OTHER,
    "configuration_files": _OTHER,
    "attribute_map": "other names for its entries, behind which any of them could hide",
}
"""Entries that must be absent, null, false or empty, at any depth, and what they name."""

_TIMM = ("timm_backbone", "detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")
"""Networks that take a backbone by its name from timm; others ask a hub for it."""


def check_folder(label: str, folder: Path) -> None:
    """Refuse a folder that would make transformers run a program or fetch anything; what is no config is left to transformers.

    Raises:
        UnsafeFileError: it would; the file and the entry are named.
    """
    problem = next(_problems(folder), None)
    if problem is not None:
        raise UnsafeFileError(f"{label} labeller: {folder} is refused, and nothing in it was run: {problem}")


def _problems(folder: Path) -> Iterator[str]:
    if (folder / "adapter_config.json").exists():
        yield (
            "it holds an adapter (adapter_config.json), which names a network to fetch and is merged only where peft is "
            "installed; merge it and save the whole"
        )
    for said in _said(_read(folder / "config.json")):
        yield f"its config.json names {said}"
    for index in sorted(folder.glob("*.index.json")):
        yield from (f"its {index.name} names {name!r}, {_OTHER}" for name in _outside(_read(index)))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _said(facts: Any, place: str = "") -> Iterator[str]:
    if isinstance(facts, list):
        for one in facts:
            yield from _said(one, place)
    if not isinstance(facts, Mapping):
        return
    for key, value in facts.items():
        entry = f"{place}{key}"
        known = _IMPLEMENTATIONS.get(key.strip("_").removesuffix("_internal"))
        if known is not None:
            yield from (f"{_HUB}: {entry} is {one!r}, expected {' or '.join(known)}" for one in _others(value, known))
        elif key in _REFUSED and value:
            yield f"{_REFUSED[key]}: {entry}"
        elif key == "backbone" and _is_fetched(facts):
            yield f"a backbone to fetch: {entry} is {value!r}"
        else:
            yield from _said(value, f"{entry}.")


def _others(value: Any, known: tuple[str, ...]) -> list[Any]:
    """Of an implementation, or of those by part of the network, those that are not known."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return [one for one in values if one is not None and one not in known]


def _is_fetched(facts: Mapping[str, Any]) -> bool:
    name = facts["backbone"]
    if not name or isinstance(facts.get("backbone_config"), Mapping):
        return False
    is_timm = facts.get("model_type") in _TIMM and facts.get("use_timm_backbone", True)
    is_plain = isinstance(name, str) and not set(name) & set("/\\:")
    return not (is_timm and is_plain and not facts.get("backbone_kwargs"))


def _outside(index: Any) -> list[str]:
    """Files of a sharded network that the folder's digest does not cover: in other folders, or hidden."""
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    found = {str(name) for name in names.values()} if isinstance(names, Mapping) else set[str]()
    return sorted(name for name in found if name.startswith(".") or set(name) & set("/\\"))
