"""What the checks of a run found that stops nothing, and what is to be done about it."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from fourmill.pipelines.status import Place

_COPIES = "no_copies_in_later_blocks"
_MOST_ROWS = 3  # of a table; the asset's page has more


def spoken(metadata: Mapping[str, dg.MetadataValue[Any]]) -> str:
    """What a check found in one line; of tables the first rows."""
    return ", ".join(_spoken_value(name, value) for name, value in metadata.items() if name != "block")


def _spoken_value(name: str, value: dg.MetadataValue[Any]) -> str:
    if not isinstance(value, dg.TableMetadataValue):
        return f"{name} {value.value}"
    rows = [" ".join(str(cell) for cell in record.data.values()) for record in value.records]
    more = f"; and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else ""
    return f"{name}: {'; '.join(rows[:_MOST_ROWS])}{more}"


def warnings_of(result: dg.ExecuteInProcessResult) -> list[str]:
    """A line for each check that failed without blocking, with what it found."""
    return [
        f"{found.asset_key.to_user_string()}, {found.check_name}: {spoken(found.metadata)}"
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
