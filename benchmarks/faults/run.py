"""Inject each fault of a table into training runs in new processes, and report what the user sees.

    python -m benchmarks.faults.run                      all rows
    python -m benchmarks.faults.run --only 1,7,20        some of them
    python -m benchmarks.faults.run --subject plain      the rows that apply to benchmarks/faults/plain.py

A row is handled if all of its checks pass, which compare values, not only exit codes. The last lines count the rows.
Row 14, the control, is reported separately: it shows that row 1 can fail. Rows that need root or small file systems
mount these below a temporary folder and unmount them; where that is impossible, they are skipped.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import (
    rows_checkpoints,
    rows_disk,
    rows_downloads,
    rows_endings,
    rows_images,
    rows_input,
    rows_kills,
    rows_processes,
    rows_training,
)
from benchmarks.faults.bench import ROWS, Bench, Row, Skipped, Trial
from benchmarks.faults.subjects import SUBJECTS
from benchmarks.hardware import hardware_name
from cifar_lightning.runs.environment import describe_environment

# Importing a module adds its rows to ROWS.
THEMES = (
    rows_checkpoints,
    rows_disk,
    rows_downloads,
    rows_endings,
    rows_kills,
    rows_images,
    rows_input,
    rows_processes,
    rows_training,
)
NUM_ROWS = max(ROWS)
CONTROL = 14
_CLIPPED = 160  # characters of one fault


@dataclass(frozen=True)
class Result:
    """Result of a row.

    Attributes:
        number: The row.
        what: What was done.
        verdict: "handled", "NOT handled", "skipped" or "does not apply".
        reason: What was observed, in a few words.
        not_lost: Whether no work was lost; None if the row does not check it.
        clearly_reported: Whether failures were reported clearly; None if nothing failed.
        elapsed_s: How long the row took.
    """

    number: int
    what: str
    verdict: str
    reason: str
    not_lost: bool | None = None
    clearly_reported: bool | None = None
    elapsed_s: float = 0.0

    def line(self) -> str:
        """Return it as a line of the table."""
        words = [self.verdict if self.verdict != "skipped" else f"skipped: {self.reason}"]
        words += [{True: "not lost", False: "LOST"}[self.not_lost]] if self.not_lost is not None else []
        if self.clearly_reported is not None:
            words.append("clearly reported" if self.clearly_reported else "NOT clearly reported")
        tail = f" - {self.reason}" if self.verdict in ("handled", "NOT handled") else ""
        return f"{self.number:>2}  {self.what}: {', '.join(words)}{tail}"


def perform(row: Row, bench: Bench) -> Result:
    """Run one row."""
    if bench.subject.is_plain and not row.is_for_plain:
        return Result(row.number, row.what, "does not apply", "")
    place = bench.folder / f"row{row.number}"
    place.mkdir()
    trial, began = Trial(bench, place), time.monotonic()
    try:
        reason = row.perform(trial)
    except Skipped as skipped:
        return Result(row.number, row.what, "skipped", str(skipped))
    except Exception as error:  # the other rows still run
        trial.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        reason = ""
    verdict = "NOT handled" if trial.faults else "handled"
    reason = "; ".join(fault[:_CLIPPED] for fault in trial.faults[:4]) if trial.faults else reason
    elapsed_s = round(time.monotonic() - began, 1)
    return Result(row.number, row.what, verdict, reason, trial.not_lost, trial.clear, elapsed_s)


def perform_all(numbers: list[int], bench: Bench, jobs: int, show: Callable[[str], None]) -> list[Result]:
    """Run rows, some at the same time; show and return the results in order."""
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for result in pool.map(lambda number: perform(ROWS[number], bench), numbers):
                if result.number != CONTROL:
                    show(result.line())
                results.append(result)
        except BaseException:  # Ctrl-C or SIGTERM: the rows unmount what they mounted
            pool.shutdown(wait=False, cancel_futures=True)
            bench.stop()
            raise
    return results


def parse_rows(text: str) -> list[int]:
    """Return the rows of `--only 1,7,20`.

    Raises:
        argparse.ArgumentTypeError: One of them is not in the table.
    """
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with commas between them, such as 1,7,20") from None
    unknown = [number for number in numbers if number not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: the rows are 1 to {NUM_ROWS}")
    return numbers


def summary(results: list[Result]) -> list[str]:
    """Return the last lines: the control, the count, the ratio."""
    counted = [result for result in results if result.number != CONTROL]
    handled = [result for result in counted if result.verdict == "handled"]
    tried = [result for result in counted if result.verdict in ("handled", "NOT handled")]
    left_out = [result for result in counted if result not in tried]
    names = ", ".join(str(result.number) for result in left_out) or "none"
    lines = [result.line() for result in results if result.number == CONTROL]
    lines.append(f"{len(handled)} of {len(tried)} handled, {len(left_out)} skipped: {names}")
    lines.append(f"ratio={len(handled) / max(1, len(tried)):.3f}")
    return lines


def write_results(path: Path, args: argparse.Namespace, results: list[Result], environment: dict[str, Any]) -> None:
    """Replace rows of a results file; each has its commit, hardware and settings."""
    how = {"commit": environment["commit"], "dirty": environment["dirty"], "hardware": hardware_name()}
    how |= {"kills": args.kills, "images": "drawn" if args.data is None else "real"}
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    rows = {row["number"]: row for row in known} | {result.number: asdict(result) | how for result in results}
    ordered = [rows[number] for number in sorted(rows)]
    fields = Result.__dataclass_fields__
    all_results = [Result(**{name: row[name] for name in fields}) for row in ordered]
    hardware = " and ".join(sorted({row["hardware"] for row in ordered}))
    about = {"subject": args.subject, "hardware": hardware, "summary": summary(all_results)[-2], "results": ordered}
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the rows and print the table; the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=parse_rows, default=sorted(ROWS), help="rows, such as 1,7,20 (default: all)")
    parser.add_argument(
        "--subject", choices=tuple(SUBJECTS), default="ours", help="the program under test (default: ours)"
    )
    parser.add_argument("--data", type=Path, help="class folders of real images for the rows that compare bit by bit")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs of row 1 (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="rows at the same time (default 2)")
    parser.add_argument(
        "--json", type=Path, help="put the results into this file, in place of those rows' earlier ones"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began, environment = time.monotonic(), describe_environment()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), SUBJECTS[args.subject], data=args.data, kills=args.kills)
        results = perform_all(args.only, bench, args.jobs, lambda line: print(line, flush=True))
    took = f"{time.monotonic() - began:.0f} s on {hardware_name()}"
    print(f"{args.subject}, {took}; the ratio is rows handled over rows tried.")
    lines = summary(results)
    print("\n".join(lines[:-1]))
    if args.json:
        write_results(args.json, args, results, environment)
    print(lines[-1])


if __name__ == "__main__":
    main()
