"""The work that bench.ray spreads: a shard of JPEGs in, decoded, reduced, and out as a shard of PNGs."""

import io

from PIL import Image

from fourmill.core.shards import Item, Receipt, ShardPlace, read_members, write_shard
from fourmill.core.store import open_store
from fourmill.core.work import ShardJob

SIDE_PX = 96


class ThumbnailWorker:
    """One shard a call, as every stage's worker."""

    def __init__(self, root: str, folder: str) -> None:
        self._store, self._folder = open_store(root), folder

    def run(self, job: ShardJob) -> Receipt:
        """Read a shard of images, write a shard of thumbnails."""
        source = ShardPlace("bench", job.split, "images", job.shard)
        target = ShardPlace("bench", job.split, self._folder, job.shard)
        items = (Item(key, ext="png", data=_thumbnail(data)) for key, data in read_members(self._store, source))
        return write_shard(self._store, target, job.recipe, items, job.run_id)


def _thumbnail(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
