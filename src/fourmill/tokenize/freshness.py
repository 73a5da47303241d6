"""Whether labels are of the images that are there now: pictures of one kind are never paired with labels of another."""

from dataclasses import replace

from fourmill.core.modality import IMAGES
from fourmill.core.names import SampleKey
from fourmill.core.shards import Receipt, ShardPlace, read_rows
from fourmill.core.store import Store


class StaleLabelsError(ValueError):
    """Labels of other images than there are now; says which block's to make again."""


def check_fresh(place: ShardPlace, asset: str, labels: Receipt, images: Receipt) -> None:
    """See that a shard of labels is of the images there are now; images are of themselves.

    Args:
        asset: that makes the labels, for messages.
        images: receipt of the shard's images now.

    Raises:
        StaleLabelsError: the images have changed since.
    """
    made_of = labels.recipe.inputs.get(IMAGES, images.content)
    if place.folder != IMAGES and made_of != images.content:
        raise StaleLabelsError(
            f"{asset}, {place.split} shard {place.shard:05d}: made of images {made_of[:12]}, which are {images.content[:12]} now; "
            f"materialize {asset} for its block again"
        )


def image_sizes(store: Store, place: ShardPlace) -> dict[SampleKey, tuple[int, int]]:
    """(width, height) of the images of a shard that are ok, from its rows, which say so for labels too."""
    rows = read_rows(store, place).select(["key", "status", "width", "height"]).to_pylist()
    return {SampleKey(row["key"]): (row["width"], row["height"]) for row in rows if row["status"] == "ok"}


def fresh_sizes(store: Store, place: ShardPlace) -> dict[SampleKey, tuple[int, int]]:
    """(width, height) of a shard's labels, of those whose image is there now in this size."""
    sizes = image_sizes(store, place)
    if place.folder == IMAGES:
        return sizes
    return dict(sizes.items() & image_sizes(store, replace(place, folder=IMAGES)).items())
