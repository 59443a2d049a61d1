"""Time of `--help`, `fit --help` and a typo, against plain LightningCLI with the same classes.

    python -m benchmarks.speed.startup [--rounds 5] [--json benchmarks/results/startup.json]

Each command is a new process; both programs run in turn and are compared within a round. The last line is the smallest
of the three median ratios, plain over ours.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import ROOT, python_path
from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed.results import write_results

PLAIN = """
from lightning.pytorch.cli import LightningCLI
from cifar_lightning import ImageClassifier, ImageDataModule
LightningCLI(ImageClassifier, ImageDataModule)
"""
ASKED = {"--help": ["--help"], "fit --help": ["fit", "--help"], "a typo": ["fit", "--modle.lr", "1"]}


def timed(program: Path, arguments: list[str]) -> tuple[float, int]:
    """Run a program; return its seconds and its number of lines on both outputs."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    elapsed_s = time.perf_counter() - began
    assert "Traceback" not in done.stderr, done.stderr
    return elapsed_s, len((done.stdout + done.stderr).splitlines())


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=results_file, help="write all results to this file")
    parsed = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.py"
        plain.write_text(PLAIN, encoding="utf-8")
        for programs in (ROOT / "train.py", plain):  # files from the disk once, for neither's time
            timed(programs, ["--help"])
        for name, arguments in ASKED.items():
            pairs = [(timed(ROOT / "train.py", arguments), timed(plain, arguments)) for _ in range(parsed.rounds)]
            ratios = [plain_s / ours_s for (ours_s, _), (plain_s, _) in pairs]
            row = {
                "asked": name,
                "ours_s": [round(ours_s, 3) for (ours_s, _), _ in pairs],
                "plain_s": [round(plain_s, 3) for _, (plain_s, _) in pairs],
                "lines": [pairs[0][0][1], pairs[0][1][1]],
                "ratio": statistics.median(ratios),
            }
            results.append(row)
            print(
                f"{name}: ours {statistics.median(row['ours_s']):.2f} s and {row['lines'][0]} lines, "
                f"plain LightningCLI {statistics.median(row['plain_s']):.2f} s and {row['lines'][1]} lines, "
                f"{row['ratio']:.1f}x ({min(ratios):.1f} to {max(ratios):.1f}, {parsed.rounds} rounds)"
            )
    write_results(parsed.json, rounds=parsed.rounds, results=results)
    print(f"Plain LightningCLI over ours, the smallest of the three medians, new processes, {hardware_name()}:")
    print(f"ratio={min(row['ratio'] for row in results):.1f}")


if __name__ == "__main__":
    main()
