"""torch.compile is a setting: labels stay those of the network as it is, also at the second size and beyond torch's limit.

Real compiling (inductor) takes minutes a network on a busy machine, but for CLIP; DPT and Mask2Former are traced, and run as
traced. The detector's tracing alone takes as long; docs/benchmarks.md has what all of them gave once.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourmill.core.labels import Picture
from fourmill.pseudolabel import dpt
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.labeller import Labelled
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.mask2former import by_size

pytestmark = pytest.mark.usefixtures("one_thread")
Photo = Callable[..., np.ndarray]
SMALL = {
    "depth": {"longer_px": 96},
    "normal": {"longer_px": 96},
    "semseg": {"shorter_px": 64, "longer_px": 96},
}
SAME = 1e-5  # of outputs of about 1


@pytest.fixture
def fresh() -> None:
    """Without what earlier tests have traced: torch counts it against its limit."""
    torch.compiler.reset()


def seeded(label: str, change: dict[str, Any]) -> Any:
    return seeded_labellers(1)[label].model_copy(update=SMALL.get(label, {}) | change)


def both(label: str, batches: list[list[Picture]], backend: str) -> list[tuple[Any, Any]]:
    """Every label by a network as it is and by a compiled one, which sees the batches after each other."""
    made: list[list[Any]] = []
    for change in ({}, {"compile_backend": backend}):
        labeller: Any = make_labeller(label, seeded(label, change))
        answers = [answer for batch in batches for answer in labeller.label_pictures(batch)]
        made.append([one.label if isinstance(one, Labelled) else one for one in answers])
    return list(zip(*made, strict=True))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("label", ["depth", "normal"])
def test_traced_depth_and_normals_are_the_same_at_every_size(label: str, photo: Photo) -> None:
    """From the second size on, sizes are symbols."""
    sizes = [(64, 96), (96, 64), (96, 96), (64, 64)]
    batches = [[Picture(photo(*size, seed)) for seed in range(2)] for size in sizes]
    for plain, traced in both(label, batches, "eager"):
        assert np.abs(plain - traced).max() < SAME


@pytest.mark.usefixtures("fresh")
def test_traced_classes_are_the_same_at_every_size(photo: Photo) -> None:
    batches = [[Picture(photo(*size, 0))] for size in [(64, 96), (96, 64), (64, 96)]]
    for plain, traced in both("semseg", batches, "eager"):
        assert np.mean(plain != traced) < 0.001


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor wants a C++ compiler (apt-get install g++)")
def test_compiled_features_are_the_same_at_every_size(
    photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = (make_features(seeded("clip", how)) for how in ({}, {"compile_backend": "inductor"}))
    for side in (64, 96):
        crops = np.stack([photo(side, side, seed) for seed in range(3)])
        exact = plain(crops)
        assert np.abs(exact - compiled(crops)).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("size", [(32, 32), (32, 96), (96, 64), (736, 32), (160, 224)])
def test_the_stems_padding_by_constants_is_the_one_that_transformers_computes(size: tuple[int, int]) -> None:
    computed, constant = (
        make_labeller("depth", seeded("depth", how))._network  # pyright: ignore[reportAttributeAccessIssue]
        for how in ({}, {"compile_backend": "eager"})
    )
    assert any(isinstance(module, torch.nn.ConstantPad2d) for module in constant.modules())
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(dpt.forward(computed, pixels), dpt.forward(constant, pixels))


@pytest.mark.usefixtures("fresh")
def test_a_function_is_compiled_for_eight_sizes_at_most_and_right_for_all() -> None:
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(inputs)
        return graph.forward

    def function(x_BCHW: Tensor) -> tuple[Tensor, int]:
        return x_BCHW * 2 + x_BCHW.shape[3], x_BCHW.shape[2]

    asked: Any = by_size(function, backend)  # pyright: ignore[reportArgumentType]  # torch takes functions too
    for side in [*range(4, 16), 4, 15]:
        for num in (2, 3):
            x = torch.rand(num, 3, side, side + 1)
            output, height = asked(x)
            assert torch.equal(output, x * 2 + (side + 1)) and height == side
    assert 0 < len(compiled) <= 8
    images = [x for inputs in compiled for x in inputs if isinstance(x, Tensor)]
    assert not any(isinstance(side, torch.SymInt) for image in images for side in image.shape[2:])
