"""The label stage: a shard of images in, a shard of one label out.

Labels of networks that are fed alike can be made together, so that an image is decoded once.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fourmill.core.flow import Threads
from fourmill.core.modality import IMAGES
from fourmill.core.names import Split
from fourmill.core.shards import (
    Item,
    Receipt,
    Recipe,
    ShardPlace,
    finished,
    need,
    needed_members,
    write_shard,
)
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.attempts import Attempts, Turns
from fourmill.pseudolabel.config import AnyLabellerConfig, config_digest, label_version, weights_digest
from fourmill.pseudolabel.items import Effort, all_items, covered_s, first_of
from fourmill.pseudolabel.labeller import Clock, Clocked, Concurrent, Labeller
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import ROW_EXTRA, LabelFormat, label_format
from fourmill.pseudolabel.named_weights import require_weights


def label_recipe(store: Store, dataset: str, split: Split, shard: int, label: str, config: AnyLabellerConfig) -> Recipe:
    """All that a shard of labels depends on.

    Raises:
        MissingShardError: its images are not there.
        WeightsMissingError: the labeller's weights are not there.
    """
    require_weights(label, config, store)
    images = need(store, ShardPlace(dataset, split, IMAGES, shard), f"{dataset}/images")
    return Recipe(
        stage=f"labels/{label}",
        code_version=label_version(config),
        config=config_digest(config),
        weights=weights_digest(config),
        inputs={IMAGES: images.content},
    )


class LabelWorker:
    """Labels shard after shard with one labeller. A `core.work.ShardWorker`; construction loads the weights."""

    def __init__(
        self,
        store_root: str,
        dataset: str,
        label: str,
        config: AnyLabellerConfig,
        threads: int = 2,
        also: Mapping[str, AnyLabellerConfig] | None = None,
    ) -> None:
        """Load the labellers.

        Args:
            threads: for decoding and encoding; the network has its own.
            also: more labels, of networks that see an image at the same size in batches as large. A shard that lacks them
                gets them too, from the same decoded images; they are held in memory, encoded, until the shard is done.
        """
        self._store = open_store(store_root)
        self._dataset = dataset
        self._format = label_format(label)
        turns = Turns()
        self._attempts = Attempts(make_labeller(label, config, self._store), turns)
        self._also = {
            other: (more, Attempts(make_labeller(other, more, self._store), turns))
            for other, more in (also or {}).items()
        }
        labellers = [self._attempts.labeller, *(attempts.labeller for _, attempts in self._also.values())]
        self._threads = Threads(threads, min(map(_streams, labellers)))
        self.shares: dict[str, float] = {}  # of the last shard's time; see `_shares`

    def run(self, job: ShardJob) -> Receipt:
        """Label one shard of one split.

        Raises:
            ValueError: images or weights are not those of the recipe, or an image is not a scene (scene labellers).
            MissingShardError: the tar of images is gone.
            TarError: the tar of images is damaged.
            NetworkError: the network is wrong.
        """
        images = ShardPlace(self._dataset, job.split, IMAGES, job.shard)
        found = {IMAGES: need(self._store, images, f"{self._dataset}/images").content}
        if found != job.recipe.inputs or self._attempts.labeller.weights_digest != job.recipe.weights:
            raise _changed(self._attempts.labeller.label, images)
        place = ShardPlace(self._dataset, job.split, self._format.folder, job.shard)
        members = needed_members(self._store, images, f"{self._dataset}/images")
        start, effort = time.monotonic(), Effort()
        more = self._missing(job)
        made: list[list[Item]] = [[] for _ in more]
        labellers = [(self._attempts, self._format), *((one.attempts, one.form) for one in more)]
        for clock in (clocks := _clocks([attempts for attempts, _ in labellers])):
            clock.begin()
        items = first_of(all_items(self._threads, members, labellers, effort), made)
        receipt = write_shard(self._store, place, job.recipe, items, job.run_id, ROW_EXTRA)
        for one, its_items in zip(more, made, strict=True):
            write_shard(self._store, one.place, one.recipe, its_items, job.run_id, ROW_EXTRA)
        self.shares = _shares(clocks, effort, time.monotonic() - start)
        return receipt

    def _missing(self, job: ShardJob) -> "list[_More]":
        """What else this shard lacks of the labels that are made together."""
        found: list[_More] = []
        for label, (config, attempts) in self._also.items():
            form = label_format(label)
            place = ShardPlace(self._dataset, job.split, form.folder, job.shard)
            recipe = label_recipe(self._store, self._dataset, job.split, job.shard, label, config)
            if recipe.inputs != job.recipe.inputs or finished(self._store, place, recipe) is not None:
                continue
            if recipe.weights != attempts.labeller.weights_digest:
                raise _changed(label, ShardPlace(self._dataset, job.split, IMAGES, job.shard))
            found.append(_More(place, recipe, attempts, form))
        return found

    def close(self) -> None:
        """End the threads."""
        self._threads.close()


def _streams(labeller: Labeller) -> int:
    return labeller.streams if isinstance(labeller, Concurrent) else 1


def _clocks(attempts: Sequence[Attempts]) -> list[Clock]:
    found = [one.labeller.clock for one in attempts if isinstance(one.labeller, Clocked)]
    return [clock for clock in found if clock is not None]


def _shares(clocks: Sequence[Clock], effort: Effort, elapsed_s: float) -> dict[str, float]:
    """Shares of a shard's time: `gpu_forward`, that in which a GPU was in a forward pass; without a GPU `network`, that of the
    networks' threads.
    """
    if not clocks:
        return {"network": effort.network_s / max(elapsed_s, 1e-9)}
    spans = [span for clock in clocks for span in clock.spans()]
    return {"gpu_forward": covered_s(spans) / max(elapsed_s, 1e-9)}


def _changed(label: str, images: ShardPlace) -> ValueError:
    return ValueError(
        f"{label} of {images.tar}: its images or the labeller's weights have changed since the work was planned; start the run "
        "again"
    )


@dataclass(frozen=True)
class _More:
    """A shard of another label that is made from the same decoded images."""

    place: ShardPlace
    recipe: Recipe
    attempts: Attempts
    form: LabelFormat
