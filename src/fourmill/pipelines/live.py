"""Progress for people: bars on a terminal, a line now and then in a log."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fourmill.runtime.session import Listener, lines

_LINE_EVERY_S = 10.0


@contextmanager
def live_progress(console: Console) -> Iterator[Listener]:
    """A listener that shows every stage that has begun; finished ones stay on the screen."""
    if not console.is_terminal:
        yield lines(partial(console.print, highlight=False), _LINE_EVERY_S)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _bars(progress)


def _bars(progress: Progress) -> Listener:
    tasks: dict[str, TaskID] = {}

    def listen(stage: str, done: int, total: int, note: str) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total, note=note)
        progress.update(tasks[stage], completed=done, total=total, note=note)

    return listen
