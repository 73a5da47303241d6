"""The definitions that Dagster loads: assets of one project, its jobs, its resource.

Loads in seconds: nothing here or in assets/ imports torch, transformers or ray.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition  # define_asset_job

from fourmill.assets.ingest import ingest_assets
from fourmill.assets.labels import label_assets
from fourmill.assets.tokenizers import tokenizer_assets
from fourmill.assets.tokens import token_assets
from fourmill.assets.training import training_assets
from fourmill.assets.workshop import Workshop
from fourmill.pipelines import environment
from fourmill.pipelines.automation import schedules, sensors
from fourmill.pipelines.profiles import demo
from fourmill.pipelines.workspace import project_at
from fourmill.runtime.project import Project
from fourmill.runtime.session import Listener


def build_definitions(
    project: Project, connect_to: Mapping[str, str] | None = None, listener: Listener | None = None
) -> dg.Definitions:
    """Everything of one project.

    Args:
        connect_to: "host:port" -> "ip:port" for the downloader.
        listener: hears progress; without one it goes to each run's log.
    """
    blocks = _blocks(project)
    others = [project.for_dataset(dataset.name) for dataset in project.more_datasets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # backfill_policy: one run a block is what we need of it
        assets = [
            *ingest_assets(project, blocks),
            *(asset for other in others for asset in ingest_assets(other, _blocks(other))),
            *label_assets(project, blocks),
            *(
                asset
                for other in others
                if other.dataset in project.train_blocks_beside()
                for asset in _labels_of(other)
            ),
            *tokenizer_assets(project),
            *token_assets(project, blocks),
            *training_assets(project),
        ]
    jobs = build_jobs(project)
    return dg.Definitions(
        assets=assets,
        jobs=jobs,
        schedules=schedules(project, jobs),
        sensors=sensors(project, jobs),
        resources={"workshop": Workshop(project, connect_to or {}, listener)},
        # One process a run: one Ray session serves all its steps, and one kill ends them all.
        executor=dg.in_process_executor,
    )


def build_jobs(project: Project) -> list[UnresolvedAssetJobDefinition]:
    """The stages as jobs, in the order in which a new project runs them."""
    index, images = dg.AssetKey([project.dataset, "source_index"]), dg.AssetKey([project.dataset, "images"])
    shards = dg.AssetSelection.assets(dg.AssetKey(["tokens", "manifest"]))
    tokens = dg.AssetSelection.groups("tokens") - shards
    return [
        dg.define_asset_job("index_list", dg.AssetSelection.assets(index), description="Number the rows of the list."),
        dg.define_asset_job(
            "label_block",
            dg.AssetSelection.assets(images) | dg.AssetSelection.groups("labels"),
            description="Download one block and label it.",
        ),
        dg.define_asset_job(
            "train_tokenizers", dg.AssetSelection.groups("tokenizers"), description="Fit every tokenizer."
        ),
        dg.define_asset_job("tokenize_block", tokens, description="Tokenize and align one block."),
        dg.define_asset_job(
            "train_4m",
            shards | dg.AssetSelection.groups("fourm"),
            description="Gather the manifest, train 4M on it, score it and show what it generates.",
        ),
        *(job for dataset in project.more_datasets for job in _ingest_jobs(dataset.name)),
        *(
            dg.define_asset_job(
                f"label_{name}",
                dg.AssetSelection.key_prefixes([name, "labels"]),
                description=f"Label one block of {name}, for tokenizers.",
            )
            for name in project.train_blocks_beside()
        ),
    ]


def _labels_of(other: Project) -> list[dg.AssetsDefinition]:
    return label_assets(other, _blocks(other), is_main=False)


def _blocks(project: Project) -> dg.StaticPartitionsDefinition:
    return dg.StaticPartitionsDefinition(project.layout.block_keys())


def _ingest_jobs(dataset: str) -> list[UnresolvedAssetJobDefinition]:
    """The jobs of a data set beside the main one, whose images no stage reads by itself."""
    index, images = (dg.AssetSelection.assets(dg.AssetKey([dataset, name])) for name in ("source_index", "images"))
    return [
        dg.define_asset_job(f"index_{dataset}", index, description=f"Number the rows of {dataset}."),
        dg.define_asset_job(f"ingest_{dataset}", images, description=f"The images of one block of {dataset}."),
    ]


@dg.definitions
def defs() -> dg.Definitions:
    """The project named by FOURMILL_PROJECT; without one, the demo's, so that the graph can always be looked at."""
    path = environment.project_file()
    project = project_at(path) if path else demo(Path("out/demo"))
    return build_definitions(project, environment.connect_to())
