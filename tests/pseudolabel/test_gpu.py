"""Labellers on a GPU: two batches at a time, each on a stream of its own, are the labels of one after the other."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fourmill.core.flow import Threads, ahead
from fourmill.core.labels import Picture
from fourmill.core.names import sample_key
from fourmill.core.process import keep_to_share_of_gpu
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.config import ClipConfig
from fourmill.pseudolabel.items import label_items
from fourmill.pseudolabel.labeller import Labelled
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.members import FORMATS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZES = [(64, 64), (40, 90), (130, 50), (64, 64), (96, 64), (40, 90)] * 6
SMALL = {
    label: config.model_copy(update={"batch_size": 2} | ({"longer_px": 96} if hasattr(config, "longer_px") else {}))
    for label, config in seeded_labellers(1).items()
}
LABELS = ("depth", "normal", "semseg", "det")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("label", LABELS)
def test_two_streams_give_the_labels_of_one(
    label: str, precision: str, photo: Callable[..., np.ndarray], jpeg: Callable[..., bytes]
):
    labeller = make_labeller(label, SMALL[label].model_copy(update={"precision": precision}))
    data = [(sample_key(i), jpeg(photo(*size, i))) for i, size in enumerate(SIZES)]
    made = []
    for networks in (1, 2, 2):
        threads = Threads(4, networks)
        made.append([(item.key, item.data) for item in label_items(threads, iter(data), labeller, FORMATS[label])])
        threads.close()
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("label", ["depth", "normal", "semseg"])
def test_labels_are_those_of_a_cpu(label: str, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch):
    pictures = [Picture(photo(*size, i)) for i, size in enumerate(SIZES[:4])]
    there = make_labeller(label, SMALL[label]).label_pictures(pictures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = make_labeller(label, SMALL[label]).label_pictures(pictures)
    for a, b in zip(there, here, strict=True):
        a, b = (one.label if isinstance(one, Labelled) else one for one in (a, b))
        assert isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        assert (a == b).mean() > 0.98 if label == "semseg" else np.abs(a - b).mean() < 2e-3


def test_features_on_the_device_are_those_on_the_host(photo: Callable[..., np.ndarray]):
    features = make_features(ClipConfig(weights="seeded:0", patch_px=8, channels=64))
    crops = np.stack([photo(64, 64, seed) for seed in range(5)])
    there = features.on_device(crops)  # type: ignore[attr-defined]
    assert there.is_cuda and np.array_equal(there.cpu().numpy(), features(crops))


def test_features_of_many_crops_take_little_more_memory_than_they_are(photo: Callable[..., np.ndarray]):
    features = make_features(ClipConfig(weights="seeded:0", precision="bf16", batch_size=64))
    crops = np.stack([photo(224, 224, 0)] * 64)
    threads = Threads(1, 2)
    features(crops)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in ahead(threads.network, features, [crops] * 40, num=4):  # more batches than torch has streams to give
        pass
    threads.close()
    assert torch.cuda.max_memory_reserved() < 2e9


def test_a_share_of_the_gpu_bounds_its_memory():
    """What is kept for later is freed at the bound, and what is then too much is out of memory, so that a batch is halved."""
    total = torch.cuda.get_device_properties(0).total_memory
    keep_to_share_of_gpu(0.25)
    try:
        for _ in range(3):  # freed each time, and not of one size
            torch.empty(int(total * 0.15), dtype=torch.uint8, device="cuda")
            torch.empty(int(total * 0.2), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(total * 0.3), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
