"""Whole images squeezed to squares, as training sets pack them: rows of one shape, from which any crop of an image can be taken."""

from typing import Any

from numpy.typing import NDArray

from fourmill.core.crops import CROPPERS, CropBox, CropRow


def whole_image(width: int, height: int) -> CropRow:
    """The crop that is all of an image: resized to a square, as croppers do, it is squeezed."""
    return 0, 0, height, width, 0


def crop_squeezed(
    label: str, square: NDArray[Any], row: CropRow, width: int, height: int, size_px: int
) -> NDArray[Any]:
    """A crop of an image, cut out of the square that the image was squeezed to: what it shows has the crop's own proportions again.

    Args:
        square: (S, S) or (S, S, 3), as the label's cropper takes it.
        row: in pixels of the image.
        width: of the image in pixels, as its height; of the square itself where nothing was squeezed.

    Returns:
        (size_px, size_px) or (size_px, size_px, 3) of the square's type.
    """
    return CROPPERS[label](square, _on_square(row, width, height, len(square)), size_px)


def _on_square(row: CropRow, width: int, height: int, side_px: int) -> CropBox:
    top, left, crop_height, crop_width, hflip = row
    return (
        top * side_px / height,
        left * side_px / width,
        crop_height * side_px / height,
        crop_width * side_px / width,
        hflip,
    )
