"""Whether labels are of the images that are there now: pictures of one kind are never paired with labels of another."""

from dataclasses import replace

from fourmill.core.names import SampleKey
from fourmill.core.shards import Receipt, ShardPlace, need
from fourmill.core.store import Store
from fourmill.tokenize.train_set import image_sizes

_IMAGES = "images"


class StaleLabelsError(ValueError):
    """Labels of other images than there are now; says which block's to make again."""


def fresh_labels(store: Store, place: ShardPlace, asset: str) -> Receipt:
    """The receipt of a shard of labels, or of the images themselves.

    Args:
        asset: that makes the shard, for messages.

    Raises:
        MissingShardError: the shard is not there, or its images are not.
        StaleLabelsError: the images have changed since.
    """
    receipt = need(store, place, asset)
    made_of = receipt.recipe.inputs.get(_IMAGES)
    if place.folder == _IMAGES or made_of is None:
        return receipt
    now = need(store, replace(place, folder=_IMAGES), f"{place.dataset}/images").content
    if made_of != now:
        raise StaleLabelsError(
            f"{asset}, {place.split} shard {place.shard:05d}: made of images {made_of[:12]}, which are {now[:12]} now; materialize "
            f"{asset} for its block again"
        )
    return receipt


def sizes_now(store: Store, place: ShardPlace) -> dict[SampleKey, tuple[int, int]]:
    """(width, height) of a shard's images that are there now, whatever folder `place` is of."""
    return image_sizes(store, replace(place, folder=_IMAGES))
