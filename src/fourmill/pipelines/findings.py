"""What the checks of a run found that stops nothing, and what is to be done about it."""

import dagster as dg

from fourmill.pipelines.status import Place

_COPIES = "no_copies_in_later_blocks"


def warnings_of(result: dg.ExecuteInProcessResult) -> list[str]:
    """A line for each check that failed without blocking, with what it found."""
    return [
        f"{found.asset_key.to_user_string()}, {found.check_name}: "
        + ", ".join(f"{name} {value.value}" for name, value in found.metadata.items() if name != "block")
        for found in result.get_asset_check_evaluations()
        if not found.passed and found.severity == dg.AssetCheckSeverity.WARN
    ]


def blocks_with_copies(result: dg.ExecuteInProcessResult) -> dict[Place, str]:
    """Blocks of images to be made again, without downloads: they hold images that an earlier block has now."""
    return {
        (found.asset_key, block): "it holds images that an earlier block has"
        for found in result.get_asset_check_evaluations()
        if found.check_name == _COPIES and not found.passed
        for block in str(found.metadata["materialize_again"].value).split(", ")
    }
