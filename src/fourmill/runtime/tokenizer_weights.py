"""Imported tokenizers that serve without training: put into the store, into a project, and looked for before a run."""

import json
from functools import partial
from pathlib import Path

from fourmill.core.store import open_store
from fourmill.runtime.launch import run_warm
from fourmill.runtime.models import current, pointer_path
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.tokenize.released import PREFIX, RELEASED, TEXT, TEXT_FILE, add_command, label_of_name


def add_tokenizer(store_root: str, name: str, source: Path, origin: str, licence: str | None) -> str:
    """Verify a public tokenizer, image or text, and keep it; returns its digest.

    Raises:
        ValueError: it is not one that works here; keys and values are named.
        FileNotFoundError: nothing at `source`.
    """
    from fourmill.tokenize.exchange import Origin, import_image_tokenizer, import_text_tokenizer

    store, known = open_store(store_root), Origin(origin, licence or "not stated")
    if name == TEXT:
        return import_text_tokenizer(store, source, known).digest
    return import_image_tokenizer(store, name, source, known).digest


def with_tokenizer(project: Project, name: str, digest: str) -> Project:
    """The project with an imported tokenizer in the place of one that is trained.

    Crops and training stay the project's; networks, grid and vocabulary are the imported tokenizer's.

    Raises:
        ValueError: its patches do not fit the project's crops, or those of its other tokenizers.
    """
    served = {**project.served_tokenizers, name.removeprefix(PREFIX): digest}
    values = project.model_dump() | {"served_tokenizers": served}
    store = open_store(project.store)
    if name == TEXT:
        from fourmill.core.sequences import TextTokenizer

        size = TextTokenizer(store.read(f"models/{TEXT}/{digest}/{TEXT_FILE}")).vocab_size
        values["text"] = project.text.model_dump() | {"vocab_size": size}
    else:
        label = label_of_name(name)
        found = json.loads(store.read(f"models/{name}/{digest}/config.json"))["tokenizer"]
        here = project.tokenizers[label].model_dump(include={"input_px", "training", "earlier_stages"})
        values["tokenizers"] = {**project.tokenizers, label: found | here}
    return Project.model_validate(values)


def missing_tokenizers(project: Project) -> dict[str, str]:
    """By label: what is missing of an imported tokenizer, and the command that mends it."""
    store = open_store(project.store)
    found: dict[str, str] = {}
    for label, digest in project.served_tokenizers.items():
        name = TEXT if label == TEXT else f"{PREFIX}{label}"
        file = TEXT_FILE if label == TEXT else "model.safetensors"
        if not store.exists(f"models/{name}/{digest}/{file}"):
            command = add_command(name, project.store)
            found[label] = f"no {name} {digest[:12]} in the store {project.store}. Put it there with `{command}`"
    return found


def score_tokenizer(session: Session, label: str) -> str:
    """Score an imported tokenizer on the held-out samples of the training set; returns the store path of its report."""
    train_set = current(session.store, session.project.dataset, "train_set", "tokenizers/train_set")
    work = partial(_score, label=label, train_set=train_set.path, train_set_digest=train_set.digest)
    return run_warm(work, session)


def _score(session: Session, label: str, train_set: str, train_set_digest: str) -> str:
    from fourmill.tokenize.served import report_tokenizer

    p = session.project
    name = f"{PREFIX}{label}"
    folder = f"models/{name}/{p.served_tokenizers[label_of_name(name)]}"
    return report_tokenizer(session.store, name, folder, p.tokenizers[label_of_name(name)], train_set, train_set_digest)


def export_tokenizer(project: Project, name: str, target: Path) -> None:
    """Write the tokenizer that serves, of an image label or of texts, as the public 4M's files.

    Raises:
        ValueError: no such name, or none serves yet.
        FileExistsError: the target holds other files.
    """
    from fourmill.tokenize.exchange import export_image_tokenizer, export_text_tokenizer

    label, store = TEXT if name == TEXT else label_of_name(name), open_store(project.store)
    ref = current(store, project.dataset, label, f"tokenizers/{label}")
    export = export_text_tokenizer if name == TEXT else export_image_tokenizer
    export(store, ref.path, target)


def trained_tokenizers(project: Project) -> dict[str, str]:
    """By name: digests of the tokenizers that serve a project, and that it has trained itself."""
    store, found = open_store(project.store), dict[str, str]()
    for name in RELEASED:
        label = name.removeprefix(PREFIX)
        if label not in project.served_tokenizers and store.exists(pointer_path(project.dataset, label)):
            found[name] = current(store, project.dataset, label, f"tokenizers/{label}").digest
    return found


def stored_tokenizers(store_root: str) -> dict[str, list[dict[str, str]]]:
    """By name: the imported tokenizers in a store, each with digest, source and licence."""
    store = open_store(store_root)
    found: dict[str, list[dict[str, str]]] = {}
    for name in RELEASED:
        paths = [path for path in store.list(f"models/{name}") if path.endswith("/origin.json")]
        found[name] = [{"digest": path.split("/")[2], **json.loads(store.read(path))} for path in sorted(paths)]
    return found
