"""What every benchmark prints: a table for people, then one line of JSON for scripts."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def machine() -> str:
    """Processor and cores, as the system names them."""
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that is measured, with a plus sign when the tree has changes."""
    try:
        run = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], figures: dict[str, float]) -> None:
    """Print the table and the closing line."""
    table = Table(*columns, title=f"bench.{name}")
    for row in rows:
        table.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row])
    Console().print(table)
    rounded = {key: round(value, 4) for key, value in figures.items()}
    print(json.dumps({"bench": name, "machine": machine(), "commit": commit(), "figures": rounded}))
