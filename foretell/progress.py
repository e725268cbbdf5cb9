"""Progress bars, on stderr so that output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def generation_bar(total: int | None) -> Iterator[Callable[[int], None]]:
    """Counts finished requests and output tokens per second; yields a function to call with each one's tokens.
    A ``total`` of None is not known."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]} output tok/s"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total, rate="…")
        started, tokens = time.monotonic(), 0

        def advance(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            rate = tokens / max(1e-9, time.monotonic() - started)
            bar.update(task, advance=1, rate=f"{rate:,.0f}")

        yield advance


@contextmanager
def loading_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """For weights on their way to memory; yields a function (bytes loaded, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


@contextmanager
def points_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """For measuring point by point; yields a function (points done, points in all, what is being measured)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    what = TextColumn("{task.fields[what]}")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, what="")

        def report(done: int, total: int, kind: str) -> None:
            bar.update(task, completed=done, total=total, what=kind)

        yield report
