"""Measurements of two checkouts of this project in turn, each in its own processes.

A measuring program uses only what both checkouts have: it measures once per line on stdin and prints the result.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, python_path
from benchmarks.speed.results import spread
from cifar_lightning.errors import UserError

NUM_TURNS = 5  # measurements of each checkout in a round, in turn, after one to warm up


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--against DIR`."""
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="compare only with another checkout of this project"
    )


def ratios_to(checkout: Path, program: str, arguments: Sequence[str], rounds: int) -> list[float]:
    """Measure this checkout and another one in turn; return ours over theirs, round by round.

    Each round starts a new process for each checkout and compares the medians of their measurements.

    `program` is the file name of the measuring program in this folder.

    Raises:
        UserError: `checkout` is no checkout of this project, or the program fails there.
    """
    checkout = checkout.resolve()
    if not (checkout / "cifar_lightning" / "__init__.py").is_file():
        raise UserError(f"--against {checkout}: no checkout of this project.")
    ratios = []
    for number in range(1, rounds + 1):
        measured: dict[Path, list[float]] = {ROOT: [], checkout: []}
        with contextlib.ExitStack() as stack:
            processes = {root: stack.enter_context(_start(root, program, arguments)) for root in measured}
            for turn in range(NUM_TURNS + 1):
                for root in list(measured)[:: 1 if turn % 2 else -1]:
                    measured[root].append(_measure(processes[root], root))
        ours, theirs = (statistics.median(values[1:]) for values in measured.values())
        ratios.append(ours / theirs)
        print(f"round {number}: ours {ours:,.1f}, theirs {theirs:,.1f}, {ratios[-1]:.3f}", flush=True)
    return ratios


def _start(root: Path, program: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    # -P: the folder of the program, which is this checkout's, must not be searched for modules.
    command = [sys.executable, "-P", str(Path(__file__).with_name(program)), str(root), *arguments]
    env = {**os.environ, "PYTHONPATH": python_path(root)}
    return subprocess.Popen(command, env=env, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _measure(process: subprocess.Popen[str], root: Path) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise UserError(f"{root}: the measuring program ended with exit status {process.wait()}.")
    return float(line)


def report(what: str, ratios: Sequence[float], device: str) -> None:
    """Print the median ratio with its spread; the last line is `ratio=X`."""
    print(f"{what}, ours over theirs, {len(ratios)} rounds of {NUM_TURNS} turns, {device}: {spread(ratios, 3)}")
    print(f"ratio={statistics.median(ratios):.3f}")
