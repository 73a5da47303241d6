"""The paper's networks at their own size: files laid out as the authors' go through `fourmill weights add`, and load by digest.

The layouts are written down here as the published code names and shapes them, not made from ours. Values are seeded.
"""

import argparse
import gc
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.labels import Picture
from fourmill.core.safe_load import read_weights
from fourmill.core.store import LocalStore, Store
from fourmill.pipelines.cli import app
from fourmill.pseudolabel import mask2former
from fourmill.pseudolabel.config import ClipConfig, DetectorConfig, DptConfig, Mask2FormerConfig
from fourmill.pseudolabel.labeller import Labelled
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.named_weights import architecture
from fourmill.pseudolabel.omnidata import to_omnidata
from fourmill.pseudolabel.stored import read_pointer
from fourmill.pseudolabel.vitdet_keys import MASK_HEAD, VitDetArchitecture, check_vitdet, vitdet_shapes

Shape = tuple[int, ...]
CHANNELS = {"depth": 1, "normal": 3}
OF_2022 = {
    "model.pixel_level_module.encoder.encoder.layers.2.blocks.17.attention.self.query.weight",
    "model.pixel_level_module.encoder.embeddings.patch_embeddings.projection.weight",
    "model.pixel_level_module.decoder.encoder.layers.5.self_attn.sampling_offsets.weight",
    "model.transformer_module.decoder.layers.8.self_attn.k_proj.weight",
    "class_predictor.weight",
}
"""Some keys of Mask2Former as transformers named them when the public file was made; in part they have other names now."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes with the test: pytest would keep a gigabyte of it for three more runs."""
    folder = tmp_path / "large"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
    gc.collect()


def affine(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def normed(name: str, number: str, *shape: int) -> dict[str, Shape]:
    """A convolution of the stem, without offset, and the norm after it."""
    return {f"{name}conv{number}.weight": shape, **affine(f"{name}norm{number}", shape[0])}


def stem() -> dict[str, Shape]:
    """timm's ResNetV2 with three of four stages, before its vit_base_r50_s16_384."""
    backbone, inputs = "pretrained.model.patch_embed.backbone.", 64
    found = normed(f"{backbone}stem.", "", 64, 3, 7, 7)
    for stage, (blocks, middle) in enumerate(((3, 64), (4, 128), (9, 256))):
        for block in range(blocks):
            name, outputs = f"{backbone}stages.{stage}.blocks.{block}.", 4 * middle
            if block == 0:
                found |= normed(f"{name}downsample.", "", outputs, inputs, 1, 1)
            found |= normed(name, "1", middle, inputs, 1, 1)
            found |= normed(name, "2", middle, middle, 3, 3)
            found |= normed(name, "3", outputs, middle, 1, 1)
            inputs = outputs
    return found


def transformer() -> dict[str, Shape]:
    model = "pretrained.model."
    found: dict[str, Shape] = {f"{model}cls_token": (1, 1, 768), f"{model}pos_embed": (1, 24 * 24 + 1, 768)}
    found |= affine(f"{model}patch_embed.proj", 768, 1024, 1, 1)
    for block in range(12):
        name = f"{model}blocks.{block}."
        found |= affine(f"{name}norm1", 768) | affine(f"{name}norm2", 768)
        found |= affine(f"{name}attn.qkv", 2304, 768) | affine(f"{name}attn.proj", 768, 768)
        found |= affine(f"{name}mlp.fc1", 3072, 768) | affine(f"{name}mlp.fc2", 768, 3072)
    return found | affine(f"{model}norm", 768) | affine(f"{model}head", 1000, 768)


def decoder(channels: int) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for number in (3, 4):
        found |= affine(f"pretrained.act_postprocess{number}.0.project.0", 768, 1536)
        found |= affine(f"pretrained.act_postprocess{number}.3", 768, 768, 1, 1)
    found |= affine("pretrained.act_postprocess4.4", 768, 768, 3, 3)
    for number, inputs in enumerate((256, 512, 768, 768), 1):
        found[f"scratch.layer{number}_rn.weight"] = (256, inputs, 3, 3)
        found |= affine(f"scratch.refinenet{number}.out_conv", 256, 256, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                found |= affine(f"scratch.refinenet{number}.resConfUnit{unit}.conv{conv}", 256, 256, 3, 3)
    found |= affine("scratch.output_conv.0", 128, 256, 3, 3) | affine("scratch.output_conv.2", 32, 128, 3, 3)
    return found | affine("scratch.output_conv.4", channels, 32, 1, 1)


def drawn(shapes: dict[str, Shape], seed: int) -> dict[str, Tensor]:
    """Values at which signals neither vanish nor explode: norms near 1, weights by their number of inputs."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        value = torch.empty(shape).uniform_(-1, 1, generator=generator)
        if len(shape) == 1:
            value = value.mul_(0.02).add_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
        made[key] = value if len(shape) == 1 else value.mul_(value[0].numel() ** -0.5)
    return made


def write_omnidata(path: Path, label: str) -> None:
    """A file as Omnidata's authors (.ckpt of Lightning 1.1) or their mirrors (.pth) have it."""
    state: Any = drawn(stem() | transformer() | decoder(CHANNELS[label]), seed=3)
    if path.suffix == ".ckpt":
        state = {
            "epoch": 4,
            "global_step": 100,
            "pytorch-lightning_version": "1.1.8",
            "hyper_parameters": argparse.Namespace(image_size=384),
            "state_dict": {f"model.{key}": value for key, value in state.items()},
        }
    torch.save(state, path)


def added(name: str, source: Path, store: LocalStore) -> str:
    """The digest under which `fourmill weights add` has put a network into the store."""
    said = CliRunner().invoke(app, ["weights", "add", name, str(source), "--store", store.root], catch_exceptions=False)
    gc.collect()  # labellers refer to themselves, half a gigabyte each
    known = read_pointer(store, name)
    assert said.exit_code == 0 and known is not None
    assert known.origin == f"file {source.name}" and known.digest[:12] in said.output
    return known.digest


@pytest.mark.parametrize(("label", "suffix"), [("depth", "ckpt"), ("normal", "pth")])
def test_omnidatas_network_comes_out_of_the_store_as_it_was_in_the_authors_file(
    label: str, suffix: str, room: Path, photo: Callable[..., np.ndarray]
) -> None:
    path, store = room / f"omnidata_dpt_{label}_v2.{suffix}", LocalStore(room / "store")
    write_omnidata(path, label)
    digest = added(label, path, store)
    labeller: Any = make_labeller(label, DptConfig(weights=f"stored:{label}/{digest}"), store)
    read = torch.load(path, mmap=True, weights_only=False)
    given = {key.removeprefix("model."): value for key, value in read.get("state_dict", read).items()}
    loaded = to_omnidata(labeller._network)  # before its first batch, for which its stem is prepared
    assert given.keys() - loaded.keys() == {"pretrained.model.head.weight", "pretrained.model.head.bias"}
    assert all(torch.equal(value.cpu(), given[key]) for key, value in loaded.items())
    (found,) = labeller.label_pictures([Picture(photo(40, 90))])
    assert isinstance(found, Labelled) and np.asarray(found.label).shape[:2] == (40, 90)


def clip_vision() -> dict[str, Shape]:
    """The image half of ViT-B/16, as transformers names it."""
    found: dict[str, Shape] = {
        "vision_model.embeddings.class_embedding": (768,),
        "vision_model.embeddings.patch_embedding.weight": (768, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (14 * 14 + 1, 768),
        "visual_projection.weight": (512, 768),
    }
    found |= affine("vision_model.pre_layrnorm", 768) | affine("vision_model.post_layernorm", 768)
    for number in range(12):
        layer = f"vision_model.encoder.layers.{number}."
        for name in ("q", "k", "v", "out"):
            found |= affine(f"{layer}self_attn.{name}_proj", 768, 768)
        found |= affine(f"{layer}layer_norm1", 768) | affine(f"{layer}layer_norm2", 768)
        found |= affine(f"{layer}mlp.fc1", 3072, 768) | affine(f"{layer}mlp.fc2", 768, 3072)
    return found


def write_clip(folder: Path) -> dict[str, Tensor]:
    """A folder as the public one: the whole CLIP of 2021, with positions' numbers and a text side. Returns the image half."""
    vision = drawn(clip_vision(), seed=4)
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(1).expand(49408, 512)}  # one number in the file
    text |= {"text_projection.weight": torch.zeros(512, 512), "logit_scale": torch.tensor(2.6592)}
    numbers = {"vision_model.embeddings.position_ids": torch.arange(197)[None]}
    folder.mkdir()
    torch.save(vision | text | numbers, folder / "pytorch_model.bin")
    halves = {
        "text_config": {"model_type": "clip_text_model", "projection_dim": 512},
        "vision_config": {"model_type": "clip_vision_model", "patch_size": 16, "projection_dim": 512},
    }
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512, **halves}
    (folder / "config.json").write_text(json.dumps(config))
    return vision


def test_clips_image_half_comes_out_of_the_public_folder_of_both(room: Path, photo: Callable[..., np.ndarray]) -> None:
    store = LocalStore(room / "store")
    given = write_clip(room / "clip")
    digest = added("clip", room / "clip", store)
    features: Any = make_features(ClipConfig(weights=f"stored:clip/{digest}"), store)
    assert features(np.stack([photo(224, 224)])).shape == (1, 14, 14, 512)
    loaded = features._network.cpu().state_dict()
    assert loaded.keys() == given.keys() and all(torch.equal(value, given[key]) for key, value in loaded.items())


def test_d_fine_the_detector_of_those_without_detectron2_comes_out_as_it_was(
    room: Path, photo: Callable[..., np.ndarray]
) -> None:
    from transformers import DFineConfig, DFineForObjectDetection

    names = {"id2label": dict(enumerate(COCO_THINGS)), "label2id": {name: i for i, name in enumerate(COCO_THINGS)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network: Any = DFineForObjectDetection(DFineConfig(**names)).eval()  # the size of D-FINE-L
    network.save_pretrained(room / "det")
    store = LocalStore(room / "store")
    config = DetectorConfig(weights=f"stored:det/{added('det', room / 'det', store)}", input_px=160)
    assert architecture(config, store) == "d_fine"
    labeller: Any = make_labeller("det", config, store)
    (boxes,) = labeller.label_pictures([Picture(photo(60, 80))])
    assert isinstance(boxes, list)
    given, loaded = network.state_dict(), labeller._network.cpu().state_dict()
    assert loaded.keys() == given.keys() and all(torch.equal(value, given[key]) for key, value in loaded.items())


def test_mask2former_with_swin_b_comes_out_as_it_was(room: Path, photo: Callable[..., np.ndarray]) -> None:
    from safetensors import safe_open
    from transformers import Mask2FormerConfig as NetworkConfig
    from transformers import SwinConfig

    swin: dict[str, Any] = {"image_size": 384, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    swin |= {"window_size": 12, "drop_path_rate": 0.3, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    names = {"id2label": dict(enumerate(COCO_PANOPTIC)), "label2id": {name: i for i, name in enumerate(COCO_PANOPTIC)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        network: Any = mask2former.model_class()(NetworkConfig(backbone_config=SwinConfig(**swin), **names)).eval()
    network.save_pretrained(room / "semseg")
    with safe_open(room / "semseg" / "model.safetensors", "pt") as file:
        assert OF_2022 <= set(file.keys())
    store = LocalStore(room / "store")
    config = Mask2FormerConfig(
        weights=f"stored:semseg/{added('semseg', room / 'semseg', store)}", shorter_px=64, longer_px=96
    )
    labeller: Any = make_labeller("semseg", config, store)
    (ids,) = labeller.label_pictures([Picture(photo(60, 80))])
    assert isinstance(ids, np.ndarray) and ids.shape == (60, 80) and ids.max() <= 132
    given, loaded = network.state_dict(), labeller._network.cpu().state_dict()
    assert loaded.keys() == given.keys() and all(torch.equal(value, given[key]) for key, value in loaded.items())


def test_vitdets_file_of_all_keys_is_read_and_one_that_lacks_a_key_is_refused(room: Path, store: Store) -> None:
    """Equal shapes are one array, which a pickle holds once: 0.2 GB, not 2.7. So nothing is converted here, only checked."""
    head: dict[str, Shape] = {f"{MASK_HEAD}deconv.weight": (256, 256, 2, 2), f"{MASK_HEAD}deconv.bias": (256,)}
    head |= affine(f"{MASK_HEAD}predictor", 80, 256, 1, 1)
    for number in range(1, 5):
        head[f"{MASK_HEAD}mask_fcn{number}.weight"] = (256, 256, 3, 3)
        head |= affine(f"{MASK_HEAD}mask_fcn{number}.norm", 256)
    shapes = vitdet_shapes(VitDetArchitecture()) | head
    assert len(shapes) == 561  # as detectron2 builds it
    arrays = {shape: np.zeros(shape, np.float32) for shape in set(shapes.values())}

    def write(name: str, without: str = "") -> Path:
        state = {key: arrays[shape] for key, shape in shapes.items() if key != without}
        with (room / name).open("wb") as file:
            pickle.dump({"model": state, "__author__": "someone"}, file, protocol=2)
        return room / name

    state = read_weights(write("model_final_f05665.pkl"))
    assert state.keys() == shapes.keys()
    check_vitdet({key: value for key, value in state.items() if key not in head}, VitDetArchitecture(), "it")

    gone = "backbone.net.blocks.31.attn.rel_pos_w"
    short = write("short.pkl", without=gone)
    with pytest.raises(
        ValueError,
        match=rf"short\.pkl does not fit ViTDet\D*: {gone}: missing, expected \(127, 80\)\. Give the weights",
    ):
        CliRunner().invoke(app, ["weights", "add", "vitdet", str(short), "--store", store.root], catch_exceptions=False)
    assert store.list("weights") == []
