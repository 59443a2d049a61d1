"""Stop training runs anyhow, resume them, and compare them with the runs that nothing stopped.

    python -m benchmarks.faults.stops --stops 300 --json benchmarks/results/stops.json

Drawn are the settings of a run (accumulation, validation interval, workers, checkpoint interval, a limit on steps),
what stops it (SIGKILL, SIGTERM, SIGINT, `should_stop`, --trainer.max_time) and where: at a hook of Lightning, or before
or after any file of the run is renamed into place, from the first to the report. One run in four is stopped twice. Each
process is the whole command line, forked from one that has imported it.

A stop is equal if metrics.csv, predictions.npz, predictions_val.npz, and every tensor and number of last.ckpt are those
of the unbroken run, and no file is missing. It is refused if `fit --resume` ends with exit status 2 before it trains:
no checkpoint was there, or only one from inside an accumulation window. A run that is given more steps or epochs than
it was planned for is instead compared in its steps: each is trained once, with a row an epoch, no NaN, and from there
the learning rates of the unbroken run.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.faults.judge import differences, load
from benchmarks.hardware import results_file
from benchmarks.speed.results import write_results
from cifar_lightning.runs.folder import RunFolder

TIMEOUT_S = 120
STOPS_PER_RUN = 15
TINY = ["--data.dataset", "synthetic", "--data.limit", "200", "--data.image_size", "16", "--batch_size", "20"]
TINY += ["--model.model_kwargs", "{widths: [4, 4, 4], dropout: 0.2}", "--lr", "0.01", "--trainer.accelerator", "cpu"]
TINY += ["--trainer.logger", "false", "--data.eval_batch_size", "8"]
STEPS = 9  # batches an epoch
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_train_epoch_end")
HOOKS += ("on_validation_batch_start", "on_validation_end", "on_validation_epoch_start")
RENAMES = ("before_rename", "after_rename")


@dataclasses.dataclass(frozen=True)
class Act:
    """What is done to a process: `what` at the `number`-th time that it comes to `where`; flags in place of others."""

    what: str = ""
    where: str = ""
    number: int = 0
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """A stopped run: its settings, what was done, and "equal", "refused" or "wrong", with the reason."""

    settings: list[str]
    acts: list[Act]
    verdict: str
    reason: str = ""


# -- in the forked process --------------------------------------------------------------------------------------------


def watch(act: Act, counts: Counter) -> None:
    """Count the moments of this process, and do what is asked at one of them; draw no charts, which take seconds."""
    from lightning.pytorch.callbacks import timer
    from lightning.pytorch.trainer import call

    from cifar_lightning.report import report

    report.render_page, report.confusion_figure = lambda *_: "a page", lambda *_: None
    report.figure_to_png = lambda *_: b"an image"
    call_hooks, rename = call._call_callback_hooks, os.replace

    def reach(where: str, trainer: Any = None) -> None:
        counts[where] += 1
        if (act.where, act.number) == (where, counts[where] - 1):
            if act.what == "should_stop":
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), getattr(signal, act.what))

    def call_watched(trainer: Any, hook: str, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            reach(hook, trainer)
        call_hooks(trainer, hook, *args, **kwargs)

    def rename_watched(*paths: Any) -> None:
        reach("before_rename")
        rename(*paths)
        reach("after_rename")

    call._call_callback_hooks, os.replace = call_watched, rename_watched
    timer.time = SimpleNamespace(monotonic=lambda: float(counts["on_train_batch_start"]))  # a batch takes a second


def run(arguments: Sequence[Any], folder: Path, act: Act) -> int:
    """Run one command line in a forked process; return its exit status, negative for a signal.

    What it prints goes to a file in the folder; a process that ends by itself leaves the counts of its moments there.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(folder)
            out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_DFL)
            counts: Counter = Counter()
            watch(act, counts)
            sys.argv = ["train.py", *map(str, arguments)]
            from cifar_lightning.cli.main import main as program

            try:
                program()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
            Path("counts").write_text(json.dumps(counts), encoding="utf-8")
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    until, ended = time.monotonic() + TIMEOUT_S, 0
    while not ended:
        ended, code = os.waitpid(child, os.WNOHANG)
        if not ended and time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that outlived it
    return os.waitstatus_to_exitcode(code)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def draw_settings(rng: random.Random) -> dict[str, Any]:
    """Return the flags of a run."""
    flags: dict[str, Any] = {"--epochs": rng.choice((2, 3))}
    flags["--trainer.accumulate_grad_batches"] = rng.choice((1, 1, 2, 3, 4))
    flags["--trainer.val_check_interval"] = rng.choice((1.0, 1.0, 0.5, 2, 4, 5))
    flags["--trainer.check_val_every_n_epoch"] = rng.choice((1, 1, 1, 2))
    flags["--data.num_workers"] = rng.choice((0, 0, 0, 1, 2))
    flags["--model.ema_decay"] = rng.choice((0, 0, 0.8))
    flags["--model.mixup"] = rng.choice((0, 0.3))
    if rng.random() < 0.6:
        flags["--checkpoint.every_n_train_steps"] = rng.choice((1, 2, 3))
    if rng.random() < 0.3:
        flags["--trainer.max_steps"] = rng.randint(2, total_steps(flags))
    return flags


def total_steps(flags: dict[str, Any]) -> int:
    """Return the optimizer steps of a run."""
    steps = flags["--epochs"] * -(-STEPS // flags["--trainer.accumulate_grad_batches"])
    return min(steps, flags.get("--trainer.max_steps", steps))


def draw_act(rng: random.Random, counts: dict[str, int]) -> Act:
    """Return what stops a process that comes as often to each moment."""
    kind = rng.choice((*SIGNALS, "SIGKILL", "should_stop", "max_time"))
    if kind == "max_time":
        return Act(kind, flags={"--trainer.max_time": f"00:00:00:{rng.randint(1, counts['on_train_batch_start']):02}"})
    wheres: Sequence[str] = HOOKS if kind != "SIGKILL" or rng.random() < 0.5 else RENAMES
    if kind == "should_stop":
        wheres = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
    where = rng.choice([where for where in wheres if counts.get(where)])
    return Act(kind, where, rng.randrange(counts[where]))


def _listed(flags: dict[str, Any]) -> list[str]:
    return [str(item) for pair in flags.items() for item in pair]


# -- comparing --------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def difference(one: Path, other: Path) -> str:
    """Return how the files of a run differ from the unbroken run's; empty if they are equal."""
    runs = RunFolder(one), RunFolder(other)
    for file in runs[1].written_files():
        if not (one / file.relative_to(other)).is_file():
            return f"{file.relative_to(other)} is missing"
    if runs[0].metrics_csv.read_bytes() != runs[1].metrics_csv.read_bytes():
        return "metrics.csv differs"
    for name in ("predictions.npz", "predictions_val.npz"):
        if (other / name).exists() and differences(*(_arrays(folder / name) for folder in (one, other))):
            return f"{name} differs"
    ours, theirs = (load(run.last_checkpoint) for run in runs)
    names = [name for name in differences(ours, theirs) if ".clock." not in name]  # seconds of a cut epoch
    return f"last.ckpt differs in {len(names)} values, such as {', '.join(names[:3])}" if names else ""


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: (array.shape, array.tobytes()) for name, array in arrays.items()}


def difference_of_longer(one: Path, other: Path, from_step: int) -> str:
    """Return how a run that was given more than its plan differs in its steps from one of this length."""
    ours, theirs = rows(one), rows(other)
    counts = [[(row["epoch"], row["step"]) for row in table] for table in (ours, theirs)]
    if counts[0] != counts[1]:
        return f"epochs and steps {counts[0]} and not {counts[1]}"
    for mine, whole in zip(ours, theirs, strict=True):
        for name, cell in mine.items():
            if not math.isfinite(float(cell or "nan")) and math.isfinite(float(whole[name] or "nan")):
                return f"epoch {mine['epoch']}: {name} is {cell or 'empty'}"
        if int(mine["step"]) > from_step and not math.isclose(float(mine["lr"]), float(whole["lr"]), rel_tol=1e-9):
            return f"epoch {mine['epoch']}: lr {mine['lr']} and not {whole['lr']}"
    steps = [load(RunFolder(folder).last_checkpoint)["global_step"] for folder in (one, other)]
    return f"{steps[0]} steps and not {steps[1]}" if steps[0] != steps[1] else ""


# -- one stop ---------------------------------------------------------------------------------------------------------


class Bench:
    """The unbroken run of some settings, and runs of them that are stopped.

    Args:
        folder: All runs are below it.
        settings: Flags of the run.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.whole = folder / "whole"
        folder.mkdir()
        status = run(["fit", *TINY, *_listed(settings), "--run_dir", self.whole], folder, Act())
        if status != 0:
            raise RuntimeError(f"{settings}: exit status {status}: {self._printed()}")
        self.counts = json.loads((folder / "counts").read_text(encoding="utf-8"))

    def _printed(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8", errors="replace").strip()[-300:]

    def stop(self, rng: random.Random) -> Result:
        """Stop a run, resume it to its end, and compare."""
        acts = [draw_act(rng, self.counts)]
        if rng.random() < 0.25:
            acts.append(draw_act(rng, self.counts))
        is_longer = rng.random() < 0.15
        out, resumed = self.folder / "run", {}
        shutil.rmtree(out, ignore_errors=True)
        if is_longer:  # a shorter plan takes the place of the stops
            acts, resumed = self._shorter(rng)
        if any(act.what == "max_time" for act in acts):
            resumed = {"--trainer.max_time": "null"}
        first = _listed(self.settings | acts[0].flags)
        status = run(["fit", *TINY, *first, "--run_dir", out], self.folder, acts[0])
        verdict = self._unexpected(acts[0], status)
        for act in () if verdict else [*acts[1:], Act()]:
            before = RunFolder(out).last_checkpoint
            old = before.read_bytes() if before.exists() else b""
            status = run(["fit", "--resume", out, *_listed(resumed | act.flags)], self.folder, act)
            if status == 2:
                is_same = (before.read_bytes() if before.exists() else b"") == old
                verdict = "refused" if is_same else "wrong: refused after it had trained"
                break
            verdict = self._unexpected(act, status)
            if verdict:
                break
        if not verdict:
            short = acts[0].number
            fault = difference_of_longer(out, self.whole, short) if is_longer else difference(out, self.whole)
            verdict = f"wrong: {fault}" if fault else "equal"
        kind, _, reason = verdict.partition(": ")
        reason = self._printed() if kind == "refused" else reason
        return Result(_listed(self.settings), acts, kind, reason.replace(str(self.folder), "..."))

    def _shorter(self, rng: random.Random) -> tuple[list[Act], dict[str, Any]]:
        steps, epochs = total_steps(self.settings), self.settings["--epochs"]
        has_limit = "--trainer.max_steps" in self.settings
        if has_limit or rng.random() < 0.6:
            short = rng.randint(1, max(1, steps - 1))
            act = Act("max_steps", number=short, flags={"--trainer.max_steps": short})
            return [act], {"--trainer.max_steps": steps if has_limit else -1}
        short = rng.randint(1, epochs - 1)
        per_epoch = steps // epochs
        return [Act("epochs", number=short * per_epoch, flags={"--epochs": short})], {"--epochs": epochs}

    def _unexpected(self, act: Act, status: int) -> str:
        """Return how a process did not end as it should; empty if it did, or was not stopped at all."""
        expected = {0, -getattr(signal, act.what)} if act.what == "SIGKILL" else {0}
        expected |= {128 + getattr(signal, act.what)} if act.what in SIGNALS[1:] else set()
        return "" if status in expected else f"wrong: exit status {status}: {self._printed()}"


def main() -> None:
    """Draw, stop, resume and compare; exit 1 if a run is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=300, help="stopped runs (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--per_run", type=int, default=STOPS_PER_RUN, help=f"for each unbroken one ({STOPS_PER_RUN})")
    parser.add_argument("--json", type=results_file, help="write the results into this file")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    import cifar_lightning.cli.evaluate
    import cifar_lightning.cli.fit  # noqa: F401  every process has it then

    torch.set_num_threads(1)
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="stops-", ignore_cleanup_errors=True) as folder:
        os.environ["CIFAR_LIGHTNING_CACHE"] = str(Path(folder) / "cache")
        while len(results) < args.stops:
            rng = random.Random(f"{args.seed} {len(results)}")
            bench = Bench(Path(folder) / str(len(results)), draw_settings(rng))
            for _ in range(min(args.per_run, args.stops - len(results))):
                result = bench.stop(rng)
                results.append(result)
                if result.verdict != "equal":
                    print(
                        f"{result.verdict}: {' '.join(result.settings)}\n  {result.acts}\n  {result.reason}", flush=True
                    )
            shutil.rmtree(bench.folder)
            print(f"{len(results)} stops, {time.monotonic() - began:.0f} s: {_counts(results)}", flush=True)
            write(args.json, args.seed, results, time.monotonic() - began)
    print(_counts(results))
    sys.exit(any(result.verdict == "wrong" for result in results))


def _counts(results: Sequence[Result]) -> dict[str, int]:
    return dict(Counter(result.verdict for result in results))


def write(path: Path | None, seed: int, results: Sequence[Result], elapsed_s: float) -> None:
    """Write the counts, and each stop that is not equal."""
    write_results(
        path,
        stops=len(results),
        seed=seed,
        elapsed_s=round(elapsed_s),
        verdicts=_counts(results),
        stopped_by=dict(sorted(Counter(act.what for result in results for act in result.acts).items())),
        not_equal=[dataclasses.asdict(result) for result in results if result.verdict != "equal"],
    )


if __name__ == "__main__":
    main()
