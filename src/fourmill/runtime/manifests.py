"""The manifest of a project: gathered from all blocks once, kept under its digest, read by all that trains and scores."""

from fourmill.core.manifest import Manifest, read_manifest, write_manifest
from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.store import Store
from fourmill.ingest.source import read_source
from fourmill.runtime.models import ModelMissingError, ModelRef, current, set_current
from fourmill.runtime.session import Session
from fourmill.runtime.token_assets import token_assets
from fourmill.tokenize.manifest import ManifestError, build_manifest
from fourmill.tokenize.released import TEXT_FILE

MIN_COVERAGE = 0.2  # of the rows of the list; below it something upstream is broken
_NAME, _ASSET = "manifest", "tokens/manifest"


def publish_manifest(session: Session) -> tuple[Manifest, str]:
    """Gather every block into one training set, and keep it; its store path.

    It is what `current_manifest` gives from then on if it covers enough of the list; else the one before it stays.

    Raises:
        ManifestError, MissingShardError: the blocks do not make a training set together.
    """
    p, store = session.project, session.store
    serving = _serving(session)
    manifest = build_manifest(
        store,
        p.dataset,
        p.layout,
        p.layout.block_keys(),
        p.modalities(),
        {asset.modality: serving[asset.tokenizer].digest for asset in token_assets(p).values()},
        _text_file(serving["text"]),
        p.input_px,
        p.patch_px,
        read_source(store, p.dataset).digest,
    )
    path = write_manifest(store, manifest)
    if coverage(manifest) >= MIN_COVERAGE:
        set_current(store, p.dataset, ModelRef(name=_NAME, digest=manifest.digest, path=path))
    return manifest, path


def coverage(manifest: Manifest) -> float:
    """Share of the list's rows that are in the shards."""
    return sum(manifest.num_samples(split) for split in manifest.splits) / max(manifest.rows, 1)


def current_manifest(session: Session) -> tuple[Manifest, str]:
    """The manifest that was published last, and its store path; blocks that were made since are not in it.

    Raises:
        ModelMissingError: there is none.
        ManifestError: its file is gone, damaged or edited, or a tokenizer serves now that did not make its tokens, and could not read
            them back.
    """
    p, store = session.project, session.store
    ref, serving = current(store, p.dataset, _NAME, _ASSET), _serving(session)
    manifest = _read(store, ref)
    for asset in token_assets(p).values():
        entry = manifest.modalities.get(asset.modality)
        then, now = entry.tokenizer if entry else None, serving[asset.tokenizer].digest
        if then != now:
            raise ManifestError(
                f"the manifest's {asset.modality} is of tokenizer {(then or 'none')[:12]}, and {now[:12]} serves: materialize "
                f"tokens/{asset.name}, tokens/shards and {_ASSET} again"
            )
    return manifest, ref.path


def manifest_is_whole(store: Store, dataset: str) -> bool:
    """Whether a data set has a manifest that is what its name says."""
    try:
        _read(store, current(store, dataset, _NAME, _ASSET))
    except (ModelMissingError, ManifestError):
        return False
    return True


def _read(store: Store, ref: ModelRef) -> Manifest:
    try:
        manifest = read_manifest(store, ref.path)
    except (FileNotFoundError, ValueError) as error:
        raise ManifestError(f"{ref.path} is gone or damaged: materialize {_ASSET} again") from error
    if manifest.digest != ref.digest:
        raise ManifestError(f"{ref.path} holds another manifest than its name says: materialize {_ASSET} again")
    return manifest


def _serving(session: Session) -> dict[str, ModelRef]:
    store, dataset = session.store, session.project.dataset
    return {name: current(store, dataset, name, f"tokenizers/{name}") for name in (*IMAGE_TOKENS, "text")}


def _text_file(text: ModelRef) -> str:
    return f"{text.path}/{TEXT_FILE}"
