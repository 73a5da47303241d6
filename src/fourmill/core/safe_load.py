"""Weight files that may be hostile: only arrays come out of them, and nothing that a file names is ever run or imported.

torch's files go through `torch.load(weights_only=True)`. What old Lightning checkpoints carry beside their weights
(callbacks, hyperparameters) is read into inert stand-ins. detectron2's `.pkl` files hold numpy arrays, for which an
unpickler of our own knows the few names that these consist of.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

_PARTS = ("state_dict", "model")  # where training programs keep the weights in what they save
_INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "argparse.Namespace")


class UnsafeFileError(ValueError):
    """A file that asks for more than arrays; nothing of it was run."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file: .safetensors, what torch.save wrote (.ckpt, .pth, .pt, .bin), or detectron2's .pkl.

    Raises:
        UnsafeFileError: a pickle that names anything but arrays.
        ValueError: not such a file, or one without weights.
        FileNotFoundError: no file.
    """
    return read_checkpoint(path).weights


@dataclass(frozen=True)
class Checkpoint:
    """What a training program saved."""

    weights: dict[str, torch.Tensor]
    arguments: dict[str, Any]  # of the program, where it saved its argparse.Namespace as `args`


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file, as `read_weights`, and the arguments beside them, with what it raises."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.suffix == ".safetensors":
        return Checkpoint(_safetensors(path), {})
    content = _arrays(path) if path.suffix == ".pkl" and not zipfile.is_zipfile(path) else _torch(path)
    # Where a pickle says `argparse.Namespace` an inert stand-in was filled, with attributes.
    arguments = (
        dict(vars(content["args"])) if isinstance(content, Mapping) and hasattr(content.get("args"), "__dict__") else {}
    )
    for part in _PARTS:
        if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
            content = content[part]
            break
    found = _tensors(content)
    if not found:
        raise ValueError(f"{path} holds no weights, expected a state dict, alone or as `state_dict` or `model`")
    return Checkpoint(found, arguments)


def refusal(path: Path, error: Exception) -> str:
    """What to say of a file that the unpickler refused."""
    named, unknown = (re.search(pattern, str(error)) for pattern in (r"GLOBAL (\S+)", r"Unsupported [^\n.]+"))
    if named:
        reason = f"it names {named[1]}"
    elif unknown:
        reason = unknown[0]  # no more of torch's words: they tell how to load the file nevertheless
    else:
        reason = str(error) or type(error).__name__
    return (
        f"{path} is refused, and nothing in it was run: it is a pickle that asks for more than arrays ({reason}). Take the "
        "weights from their authors, as safetensors where there are such"
    )


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    arrays = {str(k): torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    return {k: v.detach() for k, v in arrays.items() if isinstance(v, torch.Tensor)}


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again") from error


def _torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
    if not start.startswith((b"\x80", b"PK")):  # a pickle or a zip, as torch writes them
        raise ValueError(f"{path} is neither a safetensors file nor one that torch.save wrote; expected one of these")
    try:
        # The one class that torch's unpickler lets be made, filled and given attributes, whatever it stands for.
        inert: list[Any] = [(OrderedDict, name) for name in _unknown_globals(path) if name.startswith(_INERT)]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(refusal(path, error)) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is no file of weights that torch can read ({reason}). A TorchScript archive holds a program: take the "
            "weights alone, or a Hugging Face folder"
        ) from error


def _unknown_globals(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []  # torch's old format; what it does not know is refused
    return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))


def _arrays(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(refusal(path, error)) from error
    except (EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no pickle of numpy arrays ({error}), or is cut short; copy it again") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what a pickled numpy array consists of, and nothing else."""

    _KNOWN: ClassVar[dict[tuple[str, str], Any]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        known = self._KNOWN.get((module_name.replace("numpy._core", "numpy.core"), global_name))
        if known is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return known


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    """What `numpy.core.multiarray._reconstruct` does for plain arrays; their content is set afterwards."""
    return np.ndarray((0,), np.int8)


def _plain_dtype(code: object, align: object = False, copy: object = True) -> np.dtype:
    if not isinstance(code, str) or len(code) > 3 or code[:1] not in "fiub":
        raise pickle.UnpicklingError(f"it holds arrays of {code!r}, expected numbers")
    return np.dtype(code)


def _buffer_array(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order).copy(order)


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """What protocol 2 writes for an empty string of bytes."""
    return b""


class _ArrayKind:
    """Where a pickle says `numpy.ndarray`; it is passed on, never called."""

    def __init__(self, *args: object) -> None:
        raise pickle.UnpicklingError("it calls numpy.ndarray")


_ArrayUnpickler._KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _buffer_array,
    ("numpy", "ndarray"): _ArrayKind,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
}
