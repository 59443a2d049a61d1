"""fit --seeds: one run for each seed, each in a process of its own, resumed as a whole."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_lightning.cli.configs import find_config
from cifar_lightning.cli.flags import check_config, config_tree, flag_value, own_classes, table
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json
from cifar_lightning.formatting import clipped, command_line, percent, plural, span
from cifar_lightning.metrics.significance import spread
from cifar_lightning.runs.contents import MAX_SEEDS, read_seeds
from cifar_lightning.runs.folder import RUNS, RunFolder, config_name, create_run, discard_run
from cifar_lightning.runs.lock import RunLock
from cifar_lightning.runs.processes import is_started_from_outside
from cifar_lightning.runs.schema import SCHEMA_VERSION
from cifar_lightning.runs.states import state_of, states_table
from cifar_lightning.settings.roles import flat_settings
from cifar_lightning.training.signals import leave_closed_terminal, stop_signals

_SEEDS = ("seed_everything", "data.order_seed")
_OF_ONE_RUN = ("ckpt_path", *_SEEDS, "tune_lr", "trainer.fast_dev_run", "print_config")
_OF_NEW_RUNS = ("seeds", "config", "run_dir", "init_weights")
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def fit_seeds(flags: Sequence[str]) -> int:
    """Train the runs of `--seeds`, or resume the folder of `--resume`; return the exit status.

    The run of seed S is, bit for bit, that of `fit FLAGS --seed_everything S --data.order_seed S`. The runs after the
    first take their settings from its config.yaml. A run that fails (status 1) does not keep the others from training.

    Args:
        flags: As `normalize_arguments` returns them.
    """
    resumed = flag_value(flags, "resume")
    refused = _OF_ONE_RUN if resumed is None else (*_OF_ONE_RUN, *_OF_NEW_RUNS)
    names = [flag[2:].partition("=")[0] for flag in flags]
    for name in sorted(set(names).intersection(refused)):
        other = "--seeds" if resumed is None else f"--resume {clipped(resumed)}"
        raise UserError(f"--{name} with {other}: one of them only.")
    if is_started_from_outside():
        raise UserError(
            "--seeds: trains one run after another, not in several processes of torchrun or SLURM.\n"
            "Start one fit for each seed there, with --seed_everything SEED --data.order_seed SEED --run_dir DIR."
        )
    others = [flag for flag, name in zip(flags, names, strict=True) if name not in ("seeds", "resume", "run_dir")]
    if resumed is not None:
        folder = RunFolder(Path(resumed))
        with RunLock(folder.lock_file):
            return _train_all(folder, read_seeds(folder.seeds)["seeds"], others, is_new=False)
    seeds = parse_seeds(flag_value(flags, "seeds") or "")
    configs = [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]
    model = own_classes(flags).get("model") or flag_value(flags, "model.name") or table()["model.name"]["default"]
    run_dir = None
    for config in configs:
        settings = flat_settings(config_tree(find_config(config)))
        _check_config(config, settings)
        if isinstance(settings.get("run_dir"), str):  # the first fit refuses anything else
            run_dir = settings["run_dir"]
    folder = create_run(RUNS, config_name(configs, model), flag_value(flags, "run_dir") or run_dir)
    assert folder.lock is not None
    with folder.lock:
        runs = [RunFolder(folder.path / str(seed)) for seed in seeds]
        if taken := [run.path for run in runs if os.path.lexists(run.config)]:  # of other settings
            discard_run(folder)
            raise UserError(f"--run_dir {folder.path}: {taken[0]} holds a run already; choose a new --run_dir.")
        write_json(folder.seeds, {"schema_version": SCHEMA_VERSION, "seeds": seeds})
        return _train_all(folder, seeds, others, is_new=True)


def _check_config(config: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a config that are of one run; print the seeds that --seeds replaces."""
    for name in _OF_ONE_RUN:
        if name not in _SEEDS and settings.get(name):
            raise UserError(f"--config {clipped(config)}: {name} with --seeds: one of them only.")
    named = [f"{name} {clipped(str(settings[name]))}" for name in _SEEDS if settings.get(name) is not None]
    if named:
        print(f"--seeds replaces {' and '.join(named)} of {clipped(config)}.", file=sys.stderr)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that --seeds names, separated by commas; refuse what are no distinct seeds."""
    most = table()["seed_everything"]["bounds"]["lt"] - 1
    words = re.fullmatch(r" *[0-9]{1,10} *(, *[0-9]{1,10} *)*", text)
    seeds = list(map(int, text.split(","))) if words else []
    if not seeds or max(seeds) > most or len(set(seeds)) < len(seeds) or len(seeds) > MAX_SEEDS:
        allowed = f"at most {MAX_SEEDS:,} whole numbers from 0 to {most}, each once, such as 0,1,2"
        raise UserError(f"--seeds {clipped(text)}: {allowed}.")
    return seeds


def _train_all(folder: RunFolder, seeds: Sequence[int], flags: Sequence[str], *, is_new: bool) -> int:
    runs = {seed: RunFolder(folder.path / str(seed)) for seed in seeds}
    failed, status = 0, 0
    if links := [run.path for run in runs.values() if run.path.is_symlink()]:
        raise UserError(f"{links[0]}: is a link; put a copy of the run there.")
    if not is_new and not any(run.config.is_file() for run in runs.values()):
        raise UserError(f"--resume {folder.path}: none of its runs has begun; start over with --seeds and --run_dir.")
    for run in () if is_new else runs.values():
        if run.config.is_file():  # before a fit of its own names another command as the way out
            trust_code = flag_value(flags, "trust_code") == "true"
            check_config(run.config, trust_code=trust_code, own=own_classes([f"--config={run.config}"]))
    for number, (seed, run) in enumerate(runs.items(), 1):
        config = next((each.config for each in runs.values() if each.config.is_file()), None)
        if state_of(run)["state"] == "finished" and not flags:
            print(f"Seed {seed} ({number} of {len(seeds)}): {run.path} is finished.", flush=True)
            continue
        print(f"Seed {seed} ({number} of {len(seeds)}): {run.path}", flush=True)
        seeded = [f"--seed_everything={seed}", f"--data.order_seed={seed}", f"--run_dir={run.path}"]
        if run.has_checkpoint:
            status = _run_program("fit", f"--resume={run.path}", *flags)
        elif config is None:
            status = _run_program("fit", *flags, *seeded)
        else:  # trusted: this process had it written
            status = _run_program("fit", f"--config={config}", *(["--trust_code=true"] if is_new else flags), *seeded)
        failed += status == 1
        if status not in (0, 1):
            break
    if is_new and not any(run.config.exists() for run in runs.values()):
        folder.seeds.unlink()
        discard_run(folder)
        return status
    _summarize(folder, runs)
    return status if status not in (0, 1) else int(failed > 0)


def _summarize(folder: RunFolder, runs: dict[int, RunFolder]) -> None:
    """Write seeds.json and print the runs, mean, standard deviation and spread."""
    states = {seed: state_of(run) for seed, run in runs.items()}
    finished = [state for state in states.values() if state["state"] == "finished"]
    accuracies = [state["accuracy"] for state in finished if state["accuracy"] is not None]
    found = spread(accuracies) if accuracies else None
    kept = ("state", "accuracy", "accuracy_interval_95")
    rows = [{"seed": seed, **{key: state[key] for key in kept}} for seed, state in states.items()]
    schema = {"schema_version": SCHEMA_VERSION}
    write_json(folder.seeds, {**schema, "seeds": list(runs), "runs": rows, "accuracy": found})
    print(f"\n{states_table(list(states.values()))}")
    if found is not None:
        of = f"{found['n']} of {plural(len(runs), 'seed')}" if found["n"] < len(runs) else plural(len(runs), "seed")
        deviation = "" if found["std"] is None else f", standard deviation {percent(found['std'], 2)} (n - 1)"
        print(
            f"Test accuracy of {of}: mean {percent(found['mean'], 2)}{deviation}, "
            f"{span((found['min'], found['max']), 2)}"
        )
    if len(finished) < len(runs):
        print(f"The rest: {folder.resume_command}")
    elif len(runs) > 1:
        print(f"Next: {command_line('analyze', folder.path)}")


def _run_program(*arguments: str) -> int:
    """Run a command of this program in a new process; return its exit status, or that of a signal that came meanwhile.

    The process has a group of its own, so that it gets Ctrl-C once: from here, and on Windows from the console.
    """
    received, children = list[int](), list[subprocess.Popen[bytes]]()

    def forward(signum: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        received.append(signum)
        for child in children:
            child.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in stop_signals()}
    try:
        # As this process was started: by train.py, -m cifar_lightning or the installed command.
        program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
        with subprocess.Popen(
            [sys.executable, *program, *arguments], process_group=0, preexec_fn=_end_with(os.getpid())
        ) as child:
            if sys.platform != "win32":
                children.append(child)
                for signum in received:  # before there was a child
                    child.send_signal(signum)
            status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def _end_with(parent: int) -> Callable[[], None] | None:
    """Return what has a new process get SIGTERM when this one is killed: it then saves and stops. On Linux alone."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # killed before
            os._exit(1)

    return prepare
