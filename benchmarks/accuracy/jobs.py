"""The long runs that are wanted, `benchmarks/jobs.yaml`: list them, and continue the next one.

    python -m benchmarks.accuracy.jobs --list         what is wanted, begun and done, and what this machine cannot run
    python -m benchmarks.accuracy.jobs --data ROOT    the list; then the next run, to its end, and its result

A run is done if `benchmarks/results/CONFIG.json` has its result with the settings that the config has now: nothing else
is kept of it. Until then its folder is `runs/jobs/CONFIG-DEVICE/SEED`, which `fit --resume` continues; start this
program again after every stop. A folder of another version of the config is refused. A run for a GPU is skipped where
there is none, one for a CPU where there is a GPU or where the CPU lacks its precision.
"""

import argparse
import collections
import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from benchmarks import CONFIGS, ROOT
from benchmarks.accuracy.record import add_runs, committed_settings, other_flags, present_settings, results_of
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import reason_of
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.states import state_of
from cifar_lightning.training.precision import needed_for

Device = Literal["cpu", "gpu"]


class Job(BaseModel):
    """Runs that are wanted.

    Attributes:
        config: Name of a file in configs/.
        device: Kind of machine.
        seeds: A run for each.
        flags: Flags of `fit` next to the config.
    """

    model_config = ConfigDict(extra="forbid")
    config: str
    device: Device
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    flags: str = ""


@dataclass(frozen=True)
class Wanted:
    """One run of a job."""

    config: str
    device: Device
    flags: str
    seed: int

    def __str__(self) -> str:
        return f"{self.config}, {self.device}, seed {self.seed}{self.flags and ', '}{self.flags}"

    def run_in(self, folder: Path) -> RunFolder:
        """Return its run folder."""
        flags = re.sub(r"[^\w.]+", "-", self.flags)
        return RunFolder(folder / f"{self.config}-{self.device}{flags}" / str(self.seed))

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return any(
            (line["flags"], line["seed"], line["hardware"].endswith("no GPU"))
            == (self.flags, self.seed, self.device == "cpu")
            for line in results_of(self.config)
        )

    def why_not_here(self) -> str:
        """Return why this machine cannot run it, or ""."""
        if self.device == "gpu":
            return "" if torch.cuda.is_available() else "needs a GPU"
        if torch.cuda.is_available():
            return "is for a machine without a GPU"
        given = re.search(r"--trainer\.precision[ =](\S+)", self.flags)
        precision = given[1] if given else present_settings(self.config).get("trainer", {}).get("precision")
        needed = needed_for(str(precision))
        return needed and f"{precision} needs {needed}"

    def check_settings(self, run: RunFolder) -> None:
        """Refuse to begin or continue a run whose result would not count as one of the config that is there now."""
        is_begun = run.has_checkpoint
        commit = json.loads(run.environment.read_text(encoding="utf-8"))["commit"] if is_begun else "HEAD"
        if committed_settings(commit, self.config) != present_settings(self.config):
            changed, way_out = f"configs/{self.config}.yaml has changed since", "move this folder away"
            raise SystemExit(f"{run.path}: {changed} commit {commit}; {way_out if is_begun else 'commit it'} first.")

    def command(self, run: RunFolder, data: Path | None) -> list[str]:
        """Return the arguments of `fit` that continue the run, or begin it with the class folders `data`."""
        if run.has_checkpoint:
            return ["fit", "--resume", str(run.path)]
        command = ["fit", "--config", str(CONFIGS / f"{self.config}.yaml"), *shlex.split(self.flags)]
        command += ["--seed_everything", str(self.seed), "--data.seed", str(self.seed), "--run_dir", str(run.path)]
        is_cifar10 = present_settings(self.config).get("data", {}).get("dataset", "cifar10") == "cifar10"
        return [*command, "--data.dataset", "folder", "--data.root", str(data)] if data and is_cifar10 else command


def read_jobs(path: Path) -> list[Wanted]:
    """Return the runs of a job file, in its order.

    Raises:
        UserError: It cannot be read, a key, config or flag is unknown, or a run is wanted twice.
    """
    try:
        jobs = TypeAdapter(list[Job]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--jobs {path}: cannot be read ({reason_of(error)}).") from error
    except ValidationError as error:
        raise UserError(f"--jobs {path}: {reason_of(error)}.") from error
    runs = []
    for job in jobs:
        if not (CONFIGS / f"{job.config}.yaml").is_file():
            raise UserError(f"--jobs {path}: config {job.config}: there is no such file in {CONFIGS}.")
        try:
            words = shlex.split(job.flags)
        except ValueError as error:
            raise UserError(f"--jobs {path}: flags {job.flags}: {error}.") from error
        if (words and not words[0].startswith("--")) or other_flags(["fit", *words]) != shlex.join(words):
            raise UserError(f"--jobs {path}: flags {job.flags}: not as a result has them: no seeds and no paths.")
        runs += [Wanted(job.config, job.device, shlex.join(words), seed) for seed in job.seeds]
    if twice := [run for run, num in collections.Counter(runs).items() if num > 1]:
        raise UserError(f"--jobs {path}: {twice[0]}: is wanted twice.")
    return runs


def states(wanted: list[Wanted], folder: Path) -> list[str]:
    """Return the state of each run: "done", "skipped: ..." or that of its folder, as `runs` names it."""
    found = []
    for one in wanted:
        if one.is_done:
            found.append("done")
        elif reason := one.why_not_here():
            found.append(f"skipped: {reason}")
        else:
            found.append(str(state_of(one.run_in(folder))["state"]))
    return found


def next_run(wanted: list[Wanted], found: list[str]) -> Wanted | None:
    """Return the first run that this machine can begin, continue or record."""
    both = zip(wanted, found, strict=True)
    return next((one for one, state in both if not state.startswith(("done", "skipped", "training"))), None)


def run_to_end(command: list[str]) -> int:
    """Run the program; return its exit status. It gets SIGTERM from here and Ctrl-C anyway; it saves and stops."""
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], cwd=ROOT) as child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        return child.wait()


def main() -> None:
    """Print the list and continue the next run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print the list")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="class folders of CIFAR-10; else below data/")
    parser.add_argument("--jobs", type=Path, default=ROOT / "benchmarks" / "jobs.yaml", help="another job file")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "jobs", help="where the run folders are")
    parser.add_argument("--note", default="", help="remark on the result")
    args = parser.parse_args()
    try:
        wanted = read_jobs(args.jobs)
    except UserError as error:
        parser.error(str(error))
    found = states(wanted, args.runs)
    for one, state in zip(wanted, found, strict=True):
        print(f"{one}: {state}")
    print(f"{found.count('done')} of {len(found)} done")
    if args.list:
        return
    if (one := next_run(wanted, found)) is None:
        print("Nothing that is left can run on this machine.")
        return
    run = one.run_in(args.runs.resolve())
    print(f"Next: {one}, in {run.path}", flush=True)
    one.check_settings(run)
    status = run_to_end(one.command(run, args.data and args.data.resolve()))
    if status != 0:
        sys.exit(status if status > 0 else 128 - status)
    add_runs(one.config, [run.path], args.note)
    print("The tables: python -m benchmarks.accuracy.table --write")


if __name__ == "__main__":
    main()
