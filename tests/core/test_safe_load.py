"""Files that may be hostile: nothing in them is run, and what they hold beside arrays does not come out."""

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as some_numpy

from fourmill.core.safe_load import UnsafeFileError, read_weights


class Evil:
    """Runs a program when it is unpickled the usual way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "it ran"))


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


WEIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.pth", "evil.pkl"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, name: str, is_whole: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    content: Any = Evil(marker) if is_whole else {"model": {"weight": np.zeros(2)}, "more": Evil(marker)}
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UnsafeFileError, match=r"is refused, and nothing in it was run"):
        read_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"# A page of text\n", b"", b"\x89PNG\r\n"])
def test_a_file_of_another_kind_is_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"README\.md is neither a safetensors file nor one that torch\.save wrote"):
        read_weights(tmp_path / "README.md")


def test_what_is_said_of_a_refused_file_does_not_tell_how_to_load_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    path.write_bytes(b"\x80\x02#" + bytes(40))
    with pytest.raises(UnsafeFileError) as refused:
        read_weights(path)
    assert "Unsupported operand" in str(refused.value) and "weights_only" not in str(refused.value)


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, np.load, np.frombuffer, bytearray])
def test_a_pickle_of_arrays_may_call_nothing_else(tmp_path: Path, function: Any) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": Calls(function, "1+1")}}))
    with pytest.raises(UnsafeFileError, match=rf"it names .*{function.__name__}"):
        read_weights(path)


def test_a_pickle_may_not_make_a_huge_array_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": Calls(np.ndarray, (10**15,))}}))
    with pytest.raises(UnsafeFileError, match=r"it calls numpy\.ndarray"):
        read_weights(path)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": np.array([{"a": 1}], object)}}))
    with pytest.raises(UnsafeFileError, match=r"arrays of 'O8', expected numbers"):
        read_weights(path)


@given(
    array=some_numpy.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint8]),
        some_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    protocol=st.integers(2, 5),
    is_fortran=st.booleans(),
)
def test_detectron2s_arrays_come_back(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, protocol: int, is_fortran: bool
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "model.pkl"
    stored = np.array(array, order="F" if is_fortran else "C")
    path.write_bytes(pickle.dumps({"model": {"a.b": stored}, "__author__": "d2", "step": np.float64(3)}, protocol))
    (key,) = found = read_weights(path)
    assert key == "a.b" and np.array_equal(found[key].numpy(), array, equal_nan=True)


def test_a_flat_state_dict_and_one_in_a_checkpoint_are_the_same(tmp_path: Path) -> None:
    torch.save(OrderedDict(weight=WEIGHT), tmp_path / "flat.pth")
    torch.save({"state_dict": {"weight": WEIGHT}, "epoch": 3, "lr": [0.1]}, tmp_path / "light.ckpt")
    torch.save({"weight": WEIGHT}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("flat.pth", "light.ckpt", "old.pth"):
        assert torch.equal(read_weights(tmp_path / name)["weight"], WEIGHT)


def test_lightnings_callbacks_and_hyperparameters_are_read_into_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lightning 1.1 wrote them: callbacks by their class, hyperparameters in a dict class of its own."""
    callbacks, parsing = (types.ModuleType(f"pytorch_lightning.{name}") for name in ("callbacks", "parsing"))
    for module, name, base in ((callbacks, "ModelCheckpoint", object), (parsing, "AttributeDict", dict)):
        made = type(name, (base,), {"__module__": module.__name__})
        setattr(module, name, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    parameters = parsing.AttributeDict(lr=0.1)
    parameters.more = "state"
    checkpoint = {
        "state_dict": {"model.weight": WEIGHT},
        "callbacks": {callbacks.ModelCheckpoint: {"best": 0.3}},
        "hyper_parameters": parameters,
    }
    torch.save(checkpoint, tmp_path / "light.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.parsing"):
        monkeypatch.delitem(sys.modules, name)  # it is not installed where weights are added
    assert torch.equal(read_weights(tmp_path / "light.ckpt")["model.weight"], WEIGHT)
    assert not any("pytorch_lightning" in str(allowed) for allowed in torch.serialization.get_safe_globals())


def test_what_holds_no_weights_or_is_damaged_says_so(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="holds no weights, expected a state dict"):
        read_weights(tmp_path / "none.ckpt")
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        read_weights(tmp_path / "cut.pth")
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(1000)}})[:500])
    with pytest.raises(ValueError, match=r"cut\.pkl is"):
        read_weights(tmp_path / "cut.pkl")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no file at .*gone\.pth"):
        read_weights(tmp_path / "gone.pth")


def test_a_program_in_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="TorchScript archive holds a program"):
        read_weights(tmp_path / "clip.pt")
