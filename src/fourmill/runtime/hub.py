"""Public weights from the Hugging Face hub, for `fourmill weights add NAME hf:ID`: the one thing here that downloads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

_SETS = (("config.json", "*.safetensors"), ("config.json", "pytorch_model*.bin"))
_ALONE = ("*.ckpt", "*.pth", "*.pkl")


class HubError(ValueError):
    """Weights that the hub does not give; says how to add them without it."""


@dataclass(frozen=True)
class HubWeights:
    """What was downloaded."""

    path: Path  # a folder, or the one file of weights that the repository consists of
    commit: str
    licence: str | None


def fetch_weights(
    repo: str, revision: str | None = None, endpoint: str | None = None, cache: Path | None = None
) -> HubWeights:
    """Download a network's config and weights, safetensors where there are such.

    Args:
        repo: owner/name.
        revision: branch, tag or commit; None: the main branch.
        endpoint: of another hub than the public one.
        cache: folder of downloads; None: the hub client's own.

    Raises:
        HubError: it cannot be reached, has no such repository, or none of the files that are known here.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, disable_progress_bars

    disable_progress_bars()
    # OSError and the class of the HTTP library's errors, whichever that is: a hub that is not reached is told by that alone.
    failures = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision)
        wanted = choose_files([sibling.rfilename for sibling in info.siblings or []])
        if not wanted:
            raise HubError(
                f"hf:{repo} has no config.json with weights beside it, and no single {', '.join(_ALONE)} file"
            )
        paths = [
            Path(hf_hub_download(repo, name, revision=info.sha, endpoint=endpoint, cache_dir=cache)) for name in wanted
        ]
    except (*failures, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"hf:{repo} cannot be had ({reason}). Download it where there is a way to the hub, and give the path of the folder"
        ) from error
    licence = info.card_data.get("license") if info.card_data else None
    return HubWeights(paths[0] if len(paths) == 1 else paths[0].parent, str(info.sha), licence)


def choose_files(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that are needed: config and weights, or the one file of weights; none when unclear."""
    top = [name for name in names if "/" not in name]
    for patterns in _SETS:
        found = [[name for name in top if fnmatch(name, pattern)] for pattern in patterns]
        if all(found):
            index = [name for name in top if name.endswith(f"{patterns[1].rpartition('.')[2]}.index.json")]
            return sorted(
                {name for names in found for name in names} | set(index), key=lambda n: (n != "config.json", n)
            )
    alone = [name for name in top if any(fnmatch(name, pattern) for pattern in _ALONE)]
    return alone if len(alone) == 1 else []
