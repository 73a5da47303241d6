"""How a block's work becomes a materialization: counts, a picture, checks, and a data version made of content."""

import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import dagster as dg

from fourmill.assets.workshop import Workshop
from fourmill.core.ledger import BlockReport
from fourmill.runtime.session import Session
from fourmill.runtime.stages import BlockStage, publish_ledger, run_block, withdraw_ledger

FAILED = "failed-"
"""What the data version of an asset that failed a blocking check begins with."""
_MAX_PICTURE_BYTES = 200_000  # metadata is copied into event rows; larger pictures are whole in the store only
_QUALITIES = (90, 80, 65, 50)  # of a JPEG in their place; where the worst is too large, its sides are halved


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    check: str
    passed: bool
    blocking: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def result(self, asset: dg.AssetKey) -> dg.AssetCheckResult:
        """The verdict as Dagster wants it."""
        severity = dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN
        return dg.AssetCheckResult(
            asset_key=asset, check_name=self.check, passed=self.passed, severity=severity, metadata=dict(self.metadata)
        )


def data_version(context: dg.AssetExecutionContext, digest: str, verdicts: Sequence[Verdict]) -> dg.DataVersion:
    """The digest of what was made; if it failed a blocking check, a version that only this run has.

    What fails is not passed on, whatever is made of it now is made of an earlier one, and whatever is made next is another.
    """
    return dg.DataVersion(digest if passed_on(verdicts) else f"{FAILED}{context.run.run_id}")


def passed_on(verdicts: Sequence[Verdict]) -> bool:
    """Whether nothing blocking failed."""
    return all(v.passed or not v.blocking for v in verdicts)


Inspection: TypeAlias = tuple[Sequence[Verdict], Mapping[str, Any]]
"""What reading a block back gives: what its checks found, and the metadata worth looking at."""


def check_spec(asset: dg.AssetKey, name: str, description: str, blocking: bool = True) -> dg.AssetCheckSpec:
    """A check that lives with its asset."""
    return dg.AssetCheckSpec(name, asset=asset, description=description, blocking=blocking)


def materialize_block(
    context: dg.AssetExecutionContext,
    workshop: Workshop,
    make_stage: Callable[[Session], BlockStage],
    inspect: Callable[[Session, str], Inspection],
) -> dg.MaterializeResult:
    """Run one block stage, read it back, and publish its ledger only if nothing blocking failed."""
    session, block = workshop.session(context), context.partition_key
    stage = make_stage(session)
    with timed() as seconds:
        made = run_block(session, stage, block)
    try:
        verdicts, shown = inspect(session, block)
    except Exception:
        withdraw_ledger(session, stage, block)  # of an earlier run: what cannot be read is not passed on
        raise
    if passed_on(verdicts):
        report = publish_ledger(session, stage, block, made)
        digest, facts = report.digest, block_metadata(report)
    else:
        withdraw_ledger(session, stage, block)
        digest, facts = "", {}
    return dg.MaterializeResult(
        metadata={**facts, "seconds": seconds(), **shown},
        data_version=data_version(context, digest, verdicts),
        check_results=[v.result(context.asset_key) for v in verdicts],
    )


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """A stopwatch: call what it yields for the seconds since it began."""
    start = time.monotonic()
    yield lambda: round(time.monotonic() - start, 2)


def block_metadata(report: BlockReport) -> dict[str, Any]:
    """Counts, sizes and where the ledger is."""
    return {
        "dagster/partition_row_count": report.num_ok,
        "rows": report.num_rows,
        "statuses": table(["status", "samples"], sorted(report.counts.items(), key=lambda item: -item[1])),
        "shards_made": report.shards_done,
        "shards_kept": report.shards_skipped,
        "megabytes": round(report.tar_bytes / 1e6, 3),
        "shard_seconds": round(report.seconds, 2),
        "samples_per_shard_second": round(report.num_rows / report.seconds, 1) if report.seconds else 0.0,
        "ledger": dg.MetadataValue.text(", ".join(report.ledgers)),
        "digest": report.digest,
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.MetadataValue:
    """A small table; an empty one is said in words, since Dagster shows none."""
    if not rows:
        return dg.MetadataValue.text("none")
    return dg.MetadataValue.table([dg.TableRecord(dict(zip(columns, row, strict=True))) for row in rows])


def picture(data: bytes, title: str, kind: Literal["png", "jpeg"] = "png") -> dg.MetadataValue:
    """A picture as it shows on the asset's page; one that is too large for the event log as a smaller JPEG."""
    if len(data) > _MAX_PICTURE_BYTES:
        data, kind = _reduced(data), "jpeg"
    return dg.MetadataValue.md(f"![{title}](data:image/{kind};base64,{base64.b64encode(data).decode()})")


def _reduced(data: bytes) -> bytes:
    """The picture as the best JPEG that fits, in full size if one of that does."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        shown = opened.convert("RGB")
    while True:
        for quality in _QUALITIES:
            sink = io.BytesIO()
            shown.save(sink, "JPEG", quality=quality, subsampling=0)  # for small text's sake
            if sink.tell() <= _MAX_PICTURE_BYTES:
                return sink.getvalue()
        shown = shown.reduce(2)
