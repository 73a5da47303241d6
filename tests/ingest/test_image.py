import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from fourmill.ingest.image import ImageError, normalise


def encode(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image).astype(int)


def scene(width: int = 40, height: int = 24) -> Image.Image:
    """Red upper left quarter on a blue to green ramp."""
    ramp = np.linspace(0, 255, width)
    rgb_HWC = np.zeros((height, width, 3), np.uint8)
    rgb_HWC[..., 1], rgb_HWC[..., 2] = ramp, 255 - ramp
    rgb_HWC[: height // 2, : width // 2] = (255, 0, 0)
    return Image.fromarray(rgb_HWC)


def close(one: np.ndarray, other: np.ndarray, within: float = 6) -> bool:
    return one.shape == other.shape and float(np.abs(one - other).mean()) < within


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b'{"scene": 1}'}, {"quality": 40}])
def test_a_plain_jpeg_keeps_its_bytes(quick_config, options) -> None:
    data = encode(scene(), "JPEG", **options)
    got = normalise(data, quick_config())
    assert got.jpeg == data
    assert (got.width, got.height, got.original_width, got.original_height) == (40, 24, 40, 24)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_other_formats_become_jpeg(quick_config, kind) -> None:
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    )
    got = normalise(encode(scene(), kind, **options), quick_config())
    assert close(pixels(got.jpeg), np.asarray(scene()).astype(int))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_modes_become_rgb(quick_config, mode) -> None:
    image = scene().convert(mode)
    got = normalise(encode(image, "TIFF"), quick_config())
    assert close(pixels(got.jpeg), np.asarray(image.convert("RGB")).astype(int), 12)


def test_cmyk_jpeg(quick_config) -> None:
    got = normalise(encode(scene().convert("CMYK"), "JPEG", quality=95), quick_config())
    assert close(pixels(got.jpeg), np.asarray(scene()).astype(int))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(quick_config, kind) -> None:
    deep_HW = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    got = normalise(encode(Image.fromarray(deep_HW), kind), quick_config())
    assert close(pixels(got.jpeg)[..., 0], np.rint(deep_HW / 257).astype(int), 2)


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize("opaque", [False, True], ids=["rgb", "rgba"])
def test_sixteen_bit_colours_become_eight(quick_config, ending, opaque) -> None:
    deep_HWC = np.asarray(scene()).astype(np.uint16)[..., ::-1] * 257  # OpenCV's order
    if opaque:
        deep_HWC = np.dstack([deep_HWC, np.full(deep_HWC.shape[:2], 65535, np.uint16)])
    got = normalise(cv2.imencode(ending, deep_HWC)[1].tobytes(), quick_config())
    assert close(pixels(got.jpeg), np.asarray(scene()).astype(int))


def test_floats_become_eight_bits(quick_config) -> None:
    depth_HW = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    got = normalise(encode(Image.fromarray(depth_HW), "TIFF"), quick_config())
    assert close(pixels(got.jpeg)[..., 0], np.rint(depth_HW * 255).astype(int), 2)


def test_transparency_is_laid_over_white(quick_config) -> None:
    image = scene().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(40) < 20, 0, 255).astype(np.uint8)[None].repeat(24, 0)))
    palette = scene().convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True)):
        got = pixels(normalise(data, quick_config()).jpeg)
        assert got[:, :16].min() > 245 and close(got[:, 24:], np.asarray(scene())[:, 24:].astype(int))
    got = pixels(normalise(encode(palette, "PNG", transparency=palette.getpixel((0, 0))), quick_config()).jpeg)
    assert got[:8, :16].min() > 240 and got[14:, 30:].min() < 100


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(quick_config, orientation) -> None:
    turns = Image.Transpose
    stored_by = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    upright = scene()
    stored = upright.transpose(stored_by[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    got = normalise(data, quick_config())
    assert close(pixels(got.jpeg), np.asarray(upright).astype(int))
    assert (got.width, got.height, got.original_width, got.original_height) == (40, 24, 40, 24)
    assert (got.jpeg == data) == (orientation == 1)
    assert not Image.open(io.BytesIO(got.jpeg)).getexif() or orientation == 1


def test_the_first_frame_is_kept(quick_config) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        got = normalise(encode(frames[0], kind, save_all=True, append_images=frames[1:]), quick_config())
        assert close(pixels(got.jpeg), np.asarray(frames[0]).astype(int))


@pytest.mark.parametrize("size", [(200, 50), (50, 200), (3000, 1)])
def test_the_longer_side_is_bounded(quick_config, size) -> None:
    got = normalise(
        encode(scene(*size) if min(size) > 1 else Image.new("RGB", size), "JPEG"), quick_config(max_side_px=64)
    )
    assert max(got.width, got.height) == 64 and min(got.width, got.height) == max(1, round(min(size) * 64 / max(size)))
    assert (got.original_width, got.original_height) == size
    assert pixels(got.jpeg).shape == (got.height, got.width, 3)


def test_nothing_is_enlarged(quick_config) -> None:
    got = normalise(encode(scene(), "PNG"), quick_config(max_side_px=4000))
    assert (got.width, got.height) == (40, 24)


def test_colour_profiles(quick_config) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    kept = encode(scene(), "JPEG", icc_profile=srgb)
    assert normalise(kept, quick_config()).jpeg == kept
    broken = encode(scene(), "JPEG", icc_profile=b"not a profile")
    assert normalise(broken, quick_config()).jpeg == broken
    misfit = normalise(encode(scene(), "PNG", icc_profile=lab), quick_config())
    assert close(pixels(misfit.jpeg), np.asarray(scene()).astype(int))


def test_a_wide_profile_changes_the_colours(quick_config) -> None:
    # sRGB with its red and blue primaries exchanged, under another name: applied, it exchanges the channels
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = bytes(profile).replace("sRGB".encode("utf-16-be"), "xBGR".encode("utf-16-be"))
    got = pixels(normalise(encode(scene(), "PNG", icc_profile=swapped), quick_config()).jpeg)
    assert close(got, np.asarray(scene())[..., ::-1].astype(int), 10)


def failure(data: bytes, config) -> str:
    with pytest.raises(ImageError) as caught:
        normalise(data, config)
    assert caught.value.reason == str(caught.value) != ""
    return caught.value.status


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"<!doctype html><p>gone", b"\xff\xd8", b"%PDF-1.4", b"GIF89", b"II+\0" + bytes(60)]
)
def test_what_is_no_image(quick_config, data) -> None:
    assert failure(data, quick_config()) == "not_an_image"


def test_broken_inside(quick_config) -> None:
    data = bytearray(encode(scene(), "PNG"))
    where = data.find(b"IDAT")
    data[where + 4 : where + 20] = bytes(16)
    assert failure(bytes(data), quick_config()) in ("decode_error", "truncated")


def test_too_many_pixels_are_not_decoded(quick_config) -> None:
    assert failure(encode(scene(), "PNG"), quick_config(max_pixels=959)) == "too_many_pixels"
    assert normalise(encode(scene(), "PNG"), quick_config(max_pixels=960)).width == 40
    header = encode(Image.new("L", (1, 1)), "BMP")
    bomb = header[:18] + (40_000).to_bytes(4, "little") + (40_000).to_bytes(4, "little") + header[26:]
    assert failure(bomb, quick_config()) == "too_many_pixels"


def test_equal_bytes_give_equal_bytes(quick_config) -> None:
    data = encode(scene(300, 200), "PNG")
    config = quick_config(max_side_px=100)
    assert normalise(data, config) == normalise(data, config)
