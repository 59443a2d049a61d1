"""A progress bar on a terminal's stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    total: int, text: str, *, completed: int = 0, in_bytes: bool = False, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, unless stderr is not a terminal; yield a function that sets how much is completed.

    Args:
        total: Number of items, or bytes.
        text: What is being done.
        completed: How much is done already.
        in_bytes: Show sizes and a transfer speed instead of counts.
        hidden: Show nothing.
    """
    # Imported here: decoding's worker processes import this file and save 0.1 s each.
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True)
    amount = (
        (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
        if in_bytes
        else (rich_progress.MofNCompleteColumn(),)
    )
    with rich_progress.Progress(
        *(rich_progress.TextColumn(text), rich_progress.BarColumn(), *amount, rich_progress.TimeRemainingColumn()),
        console=console,
        transient=True,
        redirect_stdout=False,  # stdout may be for results alone
        disable=hidden or not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield lambda done: bar.update(task, completed=done)
