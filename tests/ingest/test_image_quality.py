"""What reduced decoding costs in quality, against a full decode by Pillow reduced over exact areas."""

import io
from functools import lru_cache

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fourmill.ingest import jpeg
from fourmill.ingest.jpeg import decode_reduced, read_header
from fourmill.ingest.pixels import reduced_size
from fourmill.ingest.reduce import Detail, reduce_to

AIM_DB = 38
SIZES = [(600, 450), (799, 533), (1023, 681), (1600, 1200)]
BOUNDS = [128, 256, 512, 768]
OPTIONS = [{"quality": 90, "subsampling": 2}, {"quality": 75, "subsampling": 0}]


@lru_cache(maxsize=4)
def photo(width: int, height: int, fall: float) -> np.ndarray:
    """Noise whose amplitude falls with frequency to the power of `fall`; photographs lie between 1.2 and 2."""
    rng = np.random.default_rng(width)
    spectrum = np.fft.rfft2(rng.standard_normal((height, width), np.float32))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    grey = np.fft.irfft2(spectrum / np.maximum(1, frequency) ** fall, s=(height, width))
    grey = (grey - grey.mean()) / grey.std() * 50 + 128
    rgb = np.stack([grey, np.roll(grey, width // 7, 1) * 0.7 + 40, 255 - grey], -1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def gradient(width: int, height: int) -> np.ndarray:
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


def edges(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        side = int(rng.integers(3, width // 4))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([x, y, x + side, y + side], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.asarray(image)


def text(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, height // 50))
    for y in range(0, height, max(14, height // 40)):
        draw.text((3, y), "".join(map(chr, rng.integers(33, 127, width // 6))), fill="black", font=font)
    return np.asarray(image)


def half_text(width: int, height: int) -> np.ndarray:
    rgb = photo(width, height, 1.7).copy()
    rgb[height // 2 :] = text(width, height)[height // 2 :]
    return rgb


PICTURES = {
    "photo 1.2": lambda width, height: photo(width, height, 1.2),
    "photo 1.5": lambda width, height: photo(width, height, 1.5),
    "photo 2": lambda width, height: photo(width, height, 2.0),
    "noise": noise,
    "gradient": gradient,
    "edges": edges,
    "text": text,
    "half text": half_text,
}


def encoded(rgb: np.ndarray, **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(rgb).save(sink, "JPEG", **options)
    return sink.getvalue()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    square = float(np.mean((one.astype(np.float32) - other) ** 2))
    return 10 * np.log10(255**2 / square) if square else np.inf


def in_full(data: bytes, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    whole = np.asarray(Image.open(io.BytesIO(data)))
    return [cv2.resize(whole, size, interpolation=cv2.INTER_AREA) for size in sizes]


def check(data: bytes, bounds: list[int]) -> None:
    header = read_header(data)
    assert header is not None
    sizes = [reduced_size(header.width, header.height, bound) for bound in bounds]
    for size, expected in zip(sizes, in_full(data, sizes), strict=True):
        found = decode_reduced(data, header, size)
        assert found.shape == expected.shape
        assert psnr(found, expected) >= AIM_DB, size


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_reduced_decoding_is_as_good_as_full(kind: str, size: tuple[int, int]) -> None:
    options = OPTIONS[(SIZES.index(size) + list(PICTURES).index(kind)) % 2]
    check(encoded(PICTURES[kind](*size), **options), [bound for bound in BOUNDS if bound < max(size)])


@pytest.mark.parametrize("kind", ["photo 1.5", "edges", "text"])
def test_large_pictures_too(kind: str) -> None:
    check(encoded(PICTURES[kind](2501, 1667), **OPTIONS[1]), BOUNDS)
    check(encoded(np.tile(PICTURES[kind](2000, 1500), (2, 2, 1)), **OPTIONS[0]), [256, 768])


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("ratio", [1.02, 1.3, 1.7, 2.0, 2.4, 2.8, 3.1, 3.6])
def test_cheaper_averaging_is_as_good(kind: str, ratio: float) -> None:
    for width, height in ((400, 300), (733, 551), (1023, 681)):
        rgb = np.ascontiguousarray(PICTURES[kind](width, height))
        size = round(width / ratio), round(height / ratio)
        expected = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        assert psnr(reduce_to(rgb, size), expected) >= AIM_DB, (width, height)


def test_sharp_pictures_are_averaged_exactly_and_soft_ones_cheaply() -> None:
    for rgb, is_exact in ((text(600, 450), True), (noise(600, 450), True), (photo(600, 450, 1.7), False)):
        expected = cv2.resize(np.ascontiguousarray(rgb), (256, 192), interpolation=cv2.INTER_AREA)
        assert np.array_equal(reduce_to(rgb, (256, 192)), expected) is is_exact


def test_detail_of_rows_that_differ_is_no_less_than_nothing() -> None:
    assert all(Detail.of(text(600, height)).sharpness > 1000 for height in (400, 450, 533))


def decodings(monkeypatch: pytest.MonkeyPatch, rgb: np.ndarray, bound: int) -> list[int]:
    """The factors at which a picture was decoded."""
    factors: list[int] = []
    plain = jpeg._decode

    def counted(data, min_height, min_width, factor, colours):
        factors.append(factor)
        return plain(data, min_height, min_width, factor, colours)

    monkeypatch.setattr(jpeg, "_decode", counted)
    data = encoded(rgb, quality=90)
    header = read_header(data)
    assert header is not None
    decode_reduced(data, header, reduced_size(header.width, header.height, bound))
    monkeypatch.undo()
    return factors


def test_soft_pictures_are_decoded_once_and_small(monkeypatch) -> None:
    assert decodings(monkeypatch, photo(2000, 1500, 2.0), 256) == [4]
    assert decodings(monkeypatch, photo(1600, 1200, 2.0), 768) == [2]
    assert decodings(monkeypatch, photo(2000, 1500, 2.0), 64) == [8]


def test_sharp_pictures_are_decoded_in_full(monkeypatch) -> None:
    assert decodings(monkeypatch, noise(1024, 768), 512) == [1]
    assert decodings(monkeypatch, text(2000, 1500), 256) == [4, 2, 1]


@pytest.mark.parametrize("kind", PICTURES)
def test_at_whole_ratios_every_picture_is_decoded_once_and_small(monkeypatch, kind: str) -> None:
    for width, height, bound, factor in (
        (2048, 1536, 256, 8),
        (1536, 1152, 192, 8),
        (1536, 1152, 256, 2),
        (2040, 1536, 170, 4),
    ):
        rgb = PICTURES[kind](width, height)
        assert decodings(monkeypatch, rgb, bound) == [factor]
        for options in OPTIONS:
            check(encoded(rgb, **options), [bound])


def test_a_ratio_that_is_whole_one_way_only_is_none(monkeypatch) -> None:
    assert decodings(monkeypatch, text(2048, 1530), 256) == [4, 2, 1]
    assert decodings(monkeypatch, text(1024, 768), 256)[-1] == 1  # whole, but areas are small


def test_the_whole_path_equals_its_parts(quick_config) -> None:
    from fourmill.ingest.image import normalise

    data = encoded(photo(1600, 1200, 1.5), quality=90)
    stored = np.asarray(Image.open(io.BytesIO(normalise(data, quick_config(max_side_px=256)).jpeg)))
    sink = encoded(in_full(data, [(256, 192)])[0], quality=95, subsampling=2)
    assert psnr(stored, np.asarray(Image.open(io.BytesIO(sink)))) >= AIM_DB
