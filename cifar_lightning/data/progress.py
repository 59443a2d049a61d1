"""A progress bar on a terminal's stderr; of a download otherwise a line per tenth."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    total: int, text: str, *, completed: int = 0, in_bytes: bool = False, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, if stderr is a terminal; yield a function that sets how much of `total` is completed.

    `in_bytes` shows sizes and a transfer speed instead of counts, without a terminal in lines on stdout.
    """
    # Imported here: decoding's worker processes import this file and save 0.1 s each.
    from rich import progress as rich_progress
    from rich.console import Console

    console = Console(stderr=True)
    if in_bytes and not console.is_terminal:
        yield _line_printer(total, completed)
        return
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


def _line_printer(total: int, start: int) -> Callable[[int], None]:
    began, last = time.monotonic(), 10 * start // total

    def report(done: int) -> None:
        nonlocal last
        tenths = 10 * done // total
        if tenths > last:
            speed = (done - start) / 1e6 / max(time.monotonic() - began, 1e-3)
            print(f"  {10 * tenths} % of {total / 1e6:.0f} MB, {speed:.1f} MB/s", flush=True)
        last = tenths

    return report
