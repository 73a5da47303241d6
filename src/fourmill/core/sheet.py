"""Pictures side by side: a grid with titles as one small PNG, and text as a picture."""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_INK = (34, 34, 40)
_GAP = 6
_TITLE_PX = 13


def fit_picture(rgb_HWC: NDArray[np.uint8], longer_px: int) -> NDArray[np.uint8]:
    """A picture with its longer side at most `longer_px`: enlarged by whole pixels (nearest), or reduced smoothly."""
    height, width = rgb_HWC.shape[:2]
    longer = max(height, width)
    if longer <= longer_px:
        times = longer_px // longer
        return np.ascontiguousarray(np.repeat(np.repeat(rgb_HWC, times, 0), times, 1))
    size = (max(1, round(width * longer_px / longer)), max(1, round(height * longer_px / longer)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb_HWC)).resize(size, Image.Resampling.LANCZOS))


def text_picture(text: str, width: int, height: int) -> NDArray[np.uint8]:
    """Text, dark on white, broken into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    lines, room = _wrap(text, width - 4, 11), max(1, (height - 2) // 14)
    if len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1].rstrip() + " …"]
    for row, line in enumerate(lines):
        draw_text(draw, (2, 1 + row * 14), line, 11)
    return np.asarray(image)


def grid_png(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None = None,
    cell_px: int = 128,
    colours: int | None = None,
) -> bytes:
    """Pictures in rows and columns as one PNG, titles dark on white.

    Args:
        rows: pictures (H, W, 3) uint8 of any size, or None for an empty cell; rows may be shorter than the titles.
        column_titles: one a column, shown above.
        row_titles: one a row, shown at the left.
        cell_px: side of a cell; smaller pictures are enlarged by whole pixels, larger ones reduced.
        colours: size of a palette, 2..256: a third of the bytes, with steps in smooth surfaces. By default all colours.

    Raises:
        ValueError: a row is longer than the column titles, or titles and rows differ in number.
    """
    sheet = _grid(rows, column_titles, row_titles, cell_px)
    sink = io.BytesIO()
    if colours is not None:
        # Of Pillow's methods the one that keeps small bright areas; dithering would double the bytes.
        sheet = sheet.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    sheet.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def grid_jpeg(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    column_titles: Sequence[str],
    cell_px: int = 128,
    quality: int = 85,
    captions: Sequence[Sequence[str]] | None = None,
) -> bytes:
    """The same as one JPEG: photographs in a fifth of the bytes. Colours are kept at full resolution, for small text's sake.

    Args:
        captions: one line for each picture of each row, shown under it; empty where there is nothing to say.

    Raises:
        ValueError: a row is longer than the column titles, or captions and pictures differ in number.
    """
    sink = io.BytesIO()
    sheet = _grid(rows, column_titles, None, cell_px, captions)
    try:
        sheet.save(sink, "JPEG", quality=quality, subsampling=0, optimize=True)
    except OSError:  # Pillow's buffer for optimizing holds a byte a pixel, and noise takes more
        sink = io.BytesIO()
        sheet.save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()


def _grid(
    rows: Sequence[Sequence[NDArray[np.uint8] | None]],
    column_titles: Sequence[str],
    row_titles: Sequence[str] | None,
    cell_px: int,
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError(f"captions of {sum(map(len, captions))} pictures for {sum(map(len, rows))} pictures in rows")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"{len(row_titles)} row titles for {len(rows)} rows")
    longest = max((len(row) for row in rows), default=0)
    if longest > len(column_titles):
        raise ValueError(f"a row of {longest} pictures under {len(column_titles)} column titles")
    heads = [_wrap(title, cell_px, _TITLE_PX) for title in column_titles]
    sides = [_wrap(title, 110, _TITLE_PX) for title in row_titles or [""] * len(rows)]
    left = max((text_width(line, _TITLE_PX) for side in sides for line in side), default=0) + (
        _GAP if row_titles else 0
    )
    top = max((len(head) for head in heads), default=0) * (_TITLE_PX + 3) + _GAP
    step = cell_px + _GAP
    row_step = step + (_TITLE_PX + 3 if captions else 0)
    sheet = Image.new("RGB", (left + _GAP + step * len(column_titles), top + row_step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        _draw_lines(draw, (left + _GAP + column * step, 2), head)
    for index, (side, row) in enumerate(zip(sides, rows, strict=True)):
        _draw_lines(draw, (_GAP, top + index * row_step + 2), side)
        for column, picture in enumerate(row):
            if picture is not None:
                at = left + _GAP + column * step, top + index * row_step
                bottom = _paste(sheet, at, picture, cell_px)
                caption = captions[index][column] if captions else ""
                draw_text(
                    draw, (at[0] + (cell_px - text_width(caption, _TITLE_PX)) // 2, bottom + 1), caption, _TITLE_PX
                )
    return sheet


def _paste(sheet: Image.Image, at: tuple[int, int], picture: NDArray[np.uint8], cell_px: int) -> int:
    """A picture in the middle of a cell; the row of pixels below it."""
    fitted = Image.fromarray(fit_picture(picture, cell_px))
    left, top = at[0] + (cell_px - fitted.width) // 2, at[1] + (cell_px - fitted.height) // 2
    sheet.paste(fitted, (left, top))
    return top + fitted.height


def draw_text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: str | tuple[int, int, int] = _INK
) -> None:
    """Draw one line with its upper left corner at `at`, `size` pixels high."""
    draw.text(at, text, fill=ink, font=_font(size))


def text_width(text: str, size: int) -> int:
    """Pixels that one line takes."""
    return int(_font(size).getlength(text)) + 1 if text else 0


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
    for row, line in enumerate(lines):
        draw_text(draw, (at[0], at[1] + row * (_TITLE_PX + 3)), line, _TITLE_PX)


def _wrap(text: str, width: int, size: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and text_width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
