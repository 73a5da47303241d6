"""Edges: a label in one file. What it makes, and that the table's entry is all the rest of the project needs."""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fourmill.core.labels import Picture
from fourmill.core.names import Layout
from fourmill.core.shards import Receipt, ShardPlace, read_members
from fourmill.core.store import Store
from fourmill.pseudolabel.canny import CannyConfig, decode_edges, encode_edges
from fourmill.pseudolabel.checks import check_block
from fourmill.pseudolabel.config import DptConfig, LabellerConfig, config_digest, label_version, weights_digest
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.named_weights import require_weights
from fourmill.pseudolabel.preview import contact_sheet, label_preview

CONFIG = TypeAdapter(LabellerConfig)


def test_the_border_between_black_and_white_is_an_edge_and_nothing_else() -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:, 30:] = 255
    (edges,) = make_labeller("canny", CannyConfig()).label_pictures([Picture(rgb)])
    assert isinstance(edges, np.ndarray) and edges.dtype == np.uint8
    found = np.flatnonzero(edges.any(0))
    assert set(found) <= {28, 29, 30, 31} and (edges.max(1) == 255).all()


def test_higher_thresholds_find_less(photo: Callable[..., np.ndarray]) -> None:
    picture = Picture(photo(60, 80))
    shares = [
        float(
            np.mean(
                np.asarray(make_labeller("canny", CannyConfig(low=high / 2, high=high)).label_pictures([picture])[0])
            )
        )
        for high in (20, 60, 2000)
    ]
    assert shares[0] > shares[1] > shares[2] == 0


def test_edge_maps_come_back_as_they_were() -> None:
    edges = (np.random.default_rng(0).random((9, 7)) < 0.3).astype(np.uint8) * np.uint8(255)
    assert np.array_equal(decode_edges(encode_edges(edges)), edges)
    wrongs: list[Any] = [edges // 2, edges.astype(np.float32), edges[:0]]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="edge map"):
            encode_edges(wrong)
    with pytest.raises(ValueError, match="not a readable edge map"):
        decode_edges(b"\x89PNG nothing")


def test_a_file_that_claims_to_be_huge_is_refused_as_any_other() -> None:
    header = struct.pack(">4s2I5B", b"IHDR", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT"]
    data = b"".join(struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    with pytest.raises(ValueError, match="not a readable edge map"):
        decode_edges(b"\x89PNG\r\n\x1a\n" + data)


def test_a_config_from_a_file_is_the_labellers_own() -> None:
    config = CannyConfig(high=150.0)
    assert CONFIG.validate_json(CONFIG.dump_json(config)) == config
    assert type(CONFIG.validate_python({"kind": "dpt", "weights": "seeded:1"})) is DptConfig
    with pytest.raises(ValidationError, match="hihg"):
        CONFIG.validate_python({"kind": "canny", "hihg": 1})
    with pytest.raises(ValidationError, match="kindle"):
        CONFIG.validate_python({"kind": "kindle"})


def test_settings_and_not_the_size_of_batches_are_in_its_version() -> None:
    assert config_digest(CannyConfig()) == config_digest(CannyConfig(batch_size=3)) != config_digest(CannyConfig(low=9))
    with pytest.raises(ValidationError, match="low 200 is above high 100"):
        CONFIG.validate_python({"kind": "canny", "low": 200, "high": 100})
    assert len(weights_digest(CannyConfig())) == 64 and label_version(CannyConfig()) == "canny-1"
    require_weights("canny", CannyConfig())
    with pytest.raises(ValueError, match="a canny labeller does not make depth"):
        require_weights("depth", CannyConfig())


def test_a_block_of_any_shapes_is_labelled_checked_and_shown(
    store: Store,
    layout: Layout,
    fill: Callable[..., None],
    jpeg: Callable[..., bytes],
    photo: Callable[..., np.ndarray],
    label_block: Callable[..., list[Receipt]],
) -> None:
    sizes = {0: (1, 1), 2: (3, 20000), 4: (40, 30), 6: (120, 200), 11: (33, 1)}
    fill("block_00", {row: jpeg(photo(*size, row)) for row, size in sizes.items()})
    label_block("canny", CannyConfig())
    found = {int(key): decode_edges(data) for key, data in read_members(store, ShardPlace("tiny", "train", "canny", 0))}
    assert {row: edges.shape for row, edges in found.items()} == {row: sizes[row] for row in (0, 2, 4, 6)}
    report = check_block(store, "tiny", layout, "block_00", "canny")
    assert report.passed, report.problems
    assert report.figures["images"] == 5 and 0 <= report.figures["share of edges"] < 1  # type: ignore[operator]
    shown = contact_sheet(store, "tiny", layout, "block_00", ["depth", "canny"])
    assert label_preview(store, "tiny", layout, "block_00", "canny")[:2] == shown[:2] == b"\xff\xd8"
