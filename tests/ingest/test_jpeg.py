import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from fourmill.ingest.image import ImageError, normalise
from fourmill.ingest.jpeg import MAX_SCANS, UnsupportedJpegError, read_header


def picture(width: int = 400, height: int = 300) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def failure(data: bytes, config) -> str:
    with pytest.raises(ImageError) as caught:
        normalise(data, config)
    return caught.value.status


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def with_segment(data: bytes, marker: int, content: bytes) -> bytes:
    return data[:2] + segment(marker, content) + data[2:]


CODINGS = [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 5}, {"subsampling": 0}]


@pytest.mark.parametrize("options", CODINGS, ids=str)
@pytest.mark.parametrize("bound", [64, 4000], ids=["reduced", "kept"])
def test_a_jpeg_cut_anywhere_is_truncated(quick_config, options, bound) -> None:
    data = encode(picture(), quality=93, **options)
    config = quick_config(max_side_px=bound)
    assert normalise(data, config).width == min(bound, 400)
    scan = data.find(b"\xff\xda") + 20
    cuts = {*range(scan, len(data), 1024), *range(len(data) - 20, len(data))}
    assert len(cuts) > 30
    assert {failure(data[:cut], config) for cut in cuts} == {"truncated"}
    for cut in range(2, scan, 50):  # inside the header: cut, or not to be known for a picture
        assert failure(data[:cut], config) in ("truncated", "not_an_image", "decode_error")


def test_a_tail_of_zeros_is_truncated(quick_config) -> None:
    data = encode(picture(), quality=93)
    assert failure(data[: len(data) // 2] + bytes(len(data) // 2), quick_config()) == "truncated"


@pytest.mark.parametrize("bound", [64, 4000], ids=["reduced", "kept"])
def test_damaged_bits_are_refused_or_were_harmless(quick_config, bound) -> None:
    data, rng = encode(picture(), quality=93), np.random.default_rng(0)
    scan, found = data.find(b"\xff\xda") + 20, []
    for _ in range(60):
        at = int(rng.integers(scan, len(data) - 2))
        broken = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            normalise(broken, quick_config(max_side_px=bound))
        except ImageError as error:
            found.append(error.status)
    assert found and set(found) <= {"decode_error", "truncated"}


def test_what_follows_the_picture_is_no_matter(quick_config) -> None:
    data = encode(picture()) + b"and a movie" * 100
    assert normalise(data, quick_config()).jpeg == data
    assert normalise(data, quick_config(max_side_px=64)).width == 64


@pytest.mark.parametrize("bound", [64, 4000], ids=["reduced", "full"])
@pytest.mark.parametrize("kind", ["L", "CMYK"])
def test_other_colour_models_cut_anywhere_are_truncated(quick_config, kind, bound) -> None:
    data = encode(picture().convert(kind), quality=93)
    got = normalise(data, quick_config(max_side_px=bound))
    assert Image.open(io.BytesIO(got.jpeg)).mode == "RGB"
    scan = data.find(b"\xff\xda") + 20
    assert {failure(data[:cut], quick_config()) for cut in range(scan, len(data), 1024)} == {"truncated"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_reduced_pictures_are_turned_upright(quick_config, orientation, order) -> None:
    image = picture(403, 302)
    turns = [None, *(Image.Transpose(t) for t in (0, 3, 1, 5, 2, 6, 4))]  # what a camera does to the upright picture
    turn = turns[orientation - 1]
    plain = encode(image.transpose(turn) if turn is not None else image, quality=95)
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1) + entry + bytes(4)
    got = normalise(with_segment(plain, 0xE1, b"Exif\0\0" + tiff), quick_config(max_side_px=100))
    assert (got.width, got.height, got.original_width, got.original_height) == (100, 75, 403, 302)
    expected = np.asarray(image.resize((100, 75), Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels(got.jpeg) - expected).mean() < 6
    assert np.abs(pixels(got.jpeg)[::-1] - expected).mean() > 20


@pytest.mark.parametrize("exif", [b"", b"II", b"MM\0*\0\0\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"nonsense"])
def test_broken_exif_is_taken_as_none(quick_config, exif) -> None:
    data = with_segment(encode(picture()), 0xE1, b"Exif\0\0" + exif)
    assert normalise(data, quick_config()).jpeg == data


def swapped_profile() -> bytes:
    """The profile of sRGB with red and blue exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.find(b"rXYZ"), profile.find(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "xBGR".encode("utf-16-be"))


@pytest.mark.parametrize("bound", [100, 4000], ids=["reduced", "full"])
def test_profiles_are_applied_to_reduced_pictures(quick_config, bound) -> None:
    config = quick_config(max_side_px=bound)
    got = pixels(normalise(encode(picture(), quality=95, icc_profile=swapped_profile()), config).jpeg)
    plain = pixels(normalise(encode(picture(), "PNG"), config).jpeg)
    assert np.abs(got - plain[..., ::-1]).mean() < 8 < np.abs(got - plain).mean()


def test_several_pictures_in_a_file_become_one(quick_config) -> None:
    data = encode(picture(), "MPO", save_all=True, append_images=[picture(40, 30)])
    got = normalise(data, quick_config())
    assert (got.width, got.height) == (400, 300) and b"MPF\0" in data
    assert b"MPF\0" not in got.jpeg and got.jpeg.count(b"\xff\xd8\xff") == 1


def test_orientation_in_xmp_is_seen(quick_config) -> None:
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    got = normalise(with_segment(encode(picture()), 0xE1, xmp), quick_config())
    assert (got.width, got.height) == (300, 400)


def test_pixels_are_counted_before_decoding(quick_config) -> None:
    data = bytearray(encode(picture()))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert failure(bytes(data), quick_config()) == "too_many_pixels"


def test_bombs_of_scans_are_not_decoded(quick_config) -> None:
    data = encode(picture(), progressive=True)
    header, last = data.find(b"\xff\xda"), data.rfind(b"\xff\xda")
    scan = data[last:-2]
    bomb = data[:header] + data[header:last] + scan * (MAX_SCANS + 1) + b"\xff\xd9"
    assert failure(bomb, quick_config()) == "decode_error"


def test_bounds_of_side_and_shape(quick_config) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(picture(200, 50), kind)
        assert normalise(data, quick_config(min_side_px=50, max_aspect=4.0)).width == 200
        assert failure(data, quick_config(min_side_px=51)) == "too_small"
        assert failure(data, quick_config(max_aspect=3.9)) == "too_elongated"
        assert failure(encode(picture(50, 200), kind), quick_config(max_aspect=3.9)) == "too_elongated"


def test_equal_bytes_from_whatever_thread(quick_config) -> None:
    config = quick_config(max_side_px=128)
    files = [encode(picture(600 + 8 * n, 450), kind) for n in range(4) for kind in ("JPEG", "PNG", "WEBP")]
    alone = [normalise(data, config).jpeg for data in files]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda data: normalise(data, config).jpeg, files * 4)) == alone * 4


def test_what_libjpeg_turbo_declines_is_left_to_pillow(quick_config, monkeypatch) -> None:
    def decline(*args: object) -> None:
        raise UnsupportedJpegError("a sampling of chroma it has no name for")

    data = encode(picture(), quality=95)
    for name in ("check_whole", "decode_reduced"):
        monkeypatch.setattr(f"fourmill.ingest.image.{name}", decline)
    got = normalise(data, quick_config())
    assert (got.width, got.height) == (400, 300) and got.jpeg != data
    assert failure(data[: len(data) // 2], quick_config()) == "truncated"


def test_no_header_in_what_is_no_jpeg() -> None:
    data = encode(picture())
    frame = data.find(b"\xff\xc0")
    assert read_header(data) is not None
    deep = data[: frame + 4] + b"\x0c" + data[frame + 5 :]
    twice = data[:2] + data[frame : frame + 19] + data[2:]
    for broken in (b"", b"\xff\xd8", data[:100], data[:2] + b"\0" + data[2:], deep, twice):
        assert read_header(broken) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "CMYK"])
def test_decoders_write_nothing_to_stderr(quick_config, capfd, kind) -> None:
    data = encode(picture().convert("CMYK")) if kind == "CMYK" else encode(picture(), kind)
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.99):
        with pytest.raises(ImageError):
            normalise(data[: int(len(data) * share)], quick_config())
    for _ in range(30):
        broken = bytearray(data)
        broken[int(rng.integers(30, len(data)))] ^= 0x55
        try:
            normalise(bytes(broken), quick_config())
        except ImageError:
            pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}], ids=["lossy", "lossless"])
def test_formats_that_announce_their_length_are_truncated_when_cut(quick_config, kind, options) -> None:
    data = encode(picture(), kind, **options)
    assert normalise(data, quick_config()).width == 400
    for cut in range(512, len(data), 1024):
        assert failure(data[:cut], quick_config()) == "truncated"


def test_plain_webp_is_exact(quick_config) -> None:
    from fourmill.ingest.pictures import decode_any

    for options in ({"quality": 80}, {"lossless": True}):
        data = encode(picture(), "WEBP", **options)
        rgb, orientation = decode_any(data, quick_config())
        assert orientation == 1 and np.array_equal(rgb, pixels(data))
    transparent = picture().convert("RGBA")
    transparent.putalpha(0)
    assert pixels(normalise(encode(transparent, "WEBP", lossless=True), quick_config()).jpeg).min() > 250


def test_zip_bombs_in_png(quick_config) -> None:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    def png(width: int, height: int, *more: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(50_000_000), 9)
    assert failure(png(100_000, 100_000, chunk(b"IDAT", zeros[:1000])), quick_config()) == "too_many_pixels"
    assert failure(png(16, 16, chunk(b"zTXt", b"a\0\0" + zeros)), quick_config()) in ("decode_error", "not_an_image")
    row = zlib.compress(bytes(16 * 49))
    profile = png(16, 16, chunk(b"iCCP", b"a\0\0" + zeros), chunk(b"IDAT", row))
    try:
        assert normalise(profile, quick_config()).width == 16
    except ImageError as error:
        assert error.status in ("decode_error", "not_an_image")
    assert normalise(png(16, 16, chunk(b"IDAT", zeros)), quick_config()).width == 16


def test_svg_is_no_image(quick_config) -> None:
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect/></svg>'
    assert failure(svg, quick_config()) == "not_an_image"
