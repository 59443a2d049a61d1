"""What a run folder holds: names, numbering, lock, reading it back; imports no torch.

A run is one folder and every command accepts it. Whoever writes into it holds its lock, which the system drops when the
process dies, however it dies. How its small files are written: `files`.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cifar_lightning.errors import UserError
from cifar_lightning.files import make_folder, sync_folder
from cifar_lightning.runs.lock import RunLock
from cifar_lightning.runs.processes import NEEDS_RUN_DIR, is_started_from_outside


class _File:
    """The path of a fixed name in the folder that it is asked of."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunFolder", kind: type | None = None) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The paths of everything in a run folder. Making one touches nothing: see `create_run` and `open_run`.

    Attributes:
        path: The folder.
        lock: The lock, where this object was made by whoever writes the run; None for readers.
    """

    path: Path
    lock: RunLock | None = field(default=None, compare=False, repr=False)

    config = _File("config.yaml")  # every value of the run, without the run's own path
    split = _File("split.json")  # indices of the split, hashes of the images of all splits
    environment = _File("environment.json")  # versions, device, precision, commit
    metrics_csv = _File("metrics.csv")  # a row an epoch: losses, accuracies, lr; nothing that depends on the clock
    timing_csv = _File("timing.csv")  # a row an epoch: seconds, images/s, memory
    checkpoints = _File("checkpoints")  # the folder of the next three
    best_checkpoint = _File("checkpoints/best.ckpt")  # the weights with the best val/acc: what is tested
    last_checkpoint = _File("checkpoints/last.ckpt")  # the state that training goes on from
    previous_checkpoint = _File("checkpoints/previous.ckpt")  # the last one before it, for when that is damaged
    test_metrics = _File("test_metrics.json")  # what `analysis.test_metrics` returns
    confusion_matrix_pt = _File("confusion_matrix.pt")  # int64 tensor; rows: true class
    confusion_matrix_csv = _File("confusion_matrix.csv")  # the same with class names
    confusion_matrix_png = _File("confusion_matrix.png")
    predictions = _File("predictions.npz")  # logits, targets, indices of the test split
    predictions_val = _File("predictions_val.npz")  # the same of the validation split
    lr_range = _File("lr_range.json")  # what the range test of `tune` or `fit --tune_lr` found
    lr_range_png = _File("lr_range.png")
    gallery = _File("gallery.npz")  # at most 500 uint8 images for the page, so that a copied run needs no data set
    findings = _File("findings.json")  # every number of the page
    report = _File("report.html")  # one self-contained page
    lock_file = _File(".lock")  # locked by whoever writes the run; being there says that a run made this folder

    @property
    def tested_checkpoint(self) -> Path:
        """The checkpoint that a run is tested with: the best, or the last where nothing was held out."""
        return self.best_checkpoint if self.best_checkpoint.exists() else self.last_checkpoint

    @property
    def resumed_checkpoints(self) -> tuple[Path, ...]:
        """What a run may go on from, the newest first."""
        return (self.last_checkpoint, self.previous_checkpoint, self.best_checkpoint)

    @property
    def resumed_checkpoint(self) -> Path:
        """The checkpoint that a run goes on from where none is damaged."""
        return next((path for path in self.resumed_checkpoints if path.exists()), self.last_checkpoint)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint, complete or not."""
        return any(self.checkpoints.glob("*.ckpt"))

    @property
    def resume_command(self) -> str:
        """What to type to go on with it."""
        return f"python train.py fit --resume {shlex.quote(str(self.path))}"

    @property
    def has_results(self) -> bool:
        """Whether there are answers of the test split."""
        return self.test_metrics.exists() or self.predictions.exists()

    def discard_results(self) -> None:
        """Remove what was found out about weights that are trained on."""
        results = (self.test_metrics, self.predictions, self.predictions_val, self.gallery, self.findings, self.report)
        confusion = (self.confusion_matrix_pt, self.confusion_matrix_csv, self.confusion_matrix_png)
        for file in (*results, *confusion):
            file.unlink(missing_ok=True)

    def require(self, *files: Path) -> None:
        """Refuse to go on without some of the run's files.

        Raises:
            UserError: Names the ones that are missing and the command that makes them.
        """
        missing = [file for file in files if not file.is_file()]
        if missing:
            names = ", ".join(str(file.relative_to(self.path)) for file in missing)
            trains = {self.config, self.split, self.environment, self.metrics_csv, self.timing_csv}
            from_fit = any(file in trains or file.parent == self.checkpoints for file in missing)
            remedy = "fit makes them: train again." if from_fit else f"Make them with: python train.py test {self.path}"
            raise UserError(f"run {self.path}: {names} {'is' if len(missing) == 1 else 'are'} missing.\n{remedy}")

    def check_writable(self) -> None:
        """Refuse a run whose folders cannot be written, before anything is trained.

        Raises:
            UserError: Names the folder.
        """
        for folder in (self.path, self.checkpoints):
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(
                    f"run {self.path}: {folder} cannot be written.\n"
                    "Mend its permissions, or go on with a copy of the run."
                )

    def written_files(self) -> Iterator[Path]:
        """Yield the files in the folder that only a run writes, whoever put them there; not the lock's."""
        for name in _NAMES:
            if name not in (".lock", "checkpoints") and "/" not in name:
                yield from self.path.glob(name)
        yield from self.path.glob("events.out.tfevents.*")
        yield from self.checkpoints.glob("[!.]*.ckpt*")
        yield from self.leftovers()

    def leftovers(self) -> Iterator[Path]:
        """Yield what was left where a write was killed: files that never got their name."""
        for name in _NAMES:
            file = self.path / name
            yield from file.parent.glob(f".{file.name}.*.tmp")


_NAMES = [file.name for file in vars(RunFolder).values() if isinstance(file, _File)]


def create_run(base: Path, recipe: str, run_dir: Path | None = None) -> RunFolder:
    """Make the folder of a new run and locks it; the lock is `.lock` of what is returned.

    Without `run_dir` the folder is `base/recipe/N`, N one above the highest number there. A chosen `run_dir` may be

    - new or empty: it is used;
    - without a run but with files of other names (a scheduler's log, notes): it is used and they are left alone;
    - of a run that left no checkpoint and no results: the files that a run writes are removed and it starts over;
    - of a run with a checkpoint or results, or holding a file that this run would overwrite although no run made the
      folder (`config.yaml` without `.lock`: somebody's own recipe): refused, and nothing is touched.

    Args:
        base: The folder of all runs, for example `runs`.
        recipe: The name of the recipe, one folder name.
        run_dir: The folder that was asked for by `--run_dir`.

    Raises:
        UserError: The folder is refused, is in use, or cannot be made; or others could not know which it is.
    """
    if run_dir is None and is_started_from_outside():
        raise UserError(NEEDS_RUN_DIR)
    chosen = base / recipe if run_dir is None else run_dir
    try:
        make_folder(chosen)
        run = RunFolder(_make_numbered(chosen) if run_dir is None else chosen)
    except OSError as error:
        flag = "run folder" if run_dir is None else "--run_dir"
        raise UserError(
            f"{flag} {chosen}: cannot make this folder ({error.strerror}).\nChoose another one with --run_dir PATH."
        ) from error
    _refuse_what_would_be_lost(run)  # before the lock's file marks the folder as a run's
    lock = RunLock(run.lock_file)
    try:
        _refuse_what_would_be_lost(run)  # another process may have had it in between
        for file in (left := tuple(run.written_files())):
            file.unlink()
        if left:
            print(f"{run.path}: held a run without a checkpoint, which is started over.")
    except BaseException:
        lock.release()
        raise
    return replace(run, lock=lock)


def discard_run(run: RunFolder) -> None:
    """Removes a run that could not start: its files, and the folder where nothing else is in it."""
    if run.lock is not None:
        run.lock.release()
    for file in (*run.written_files(), run.lock_file):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: somebody's own files
        run.path.rmdir()


def _make_numbered(folder: Path) -> Path:
    taken = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]
    number = max(taken, default=0) + 1
    while True:
        try:
            (folder / str(number)).mkdir()  # fails where it exists, so two starts at once never share a number
        except FileExistsError:
            number += 1
        else:
            sync_folder(folder)
            return folder / str(number)


def _refuse_what_would_be_lost(run: RunFolder) -> None:
    files = tuple(run.written_files())
    if run.lock_file.exists() or run.config.exists():
        what = "checkpoints" if run.has_checkpoint else "results" if run.has_results else ""
        if what:
            raise UserError(
                f"--run_dir {run.path}: holds a run with {what}; it is not overwritten.\n"
                f"Choose a new --run_dir; fit --resume {run.path} goes on with it."
            )
    if files and not run.lock_file.exists():
        raise UserError(
            f"--run_dir {run.path}: a run would overwrite {files[0].relative_to(run.path)}, which no run here wrote.\n"
            "Move it away, or choose a new --run_dir."
        )


def open_run(path: Path, *, lock: bool = False, results: bool = False) -> RunFolder:
    """Open the folder of an earlier run.

    Args:
        path: The folder; it may have been copied from elsewhere.
        lock: Also take the lock, to write into it.
        results: What a test found is enough, also where config.yaml is lost.

    Raises:
        UserError: It is not a run folder, or with `lock` it is in use.
    """
    run = RunFolder(path)
    has_results = results and (run.predictions.is_file() or run.confusion_matrix_csv.is_file())
    if not (run.config.is_file() or has_results):
        what = "is not a run folder: it has no config.yaml" if path.is_dir() else "is not a folder"
        if not path.exists():
            what = "there is no such folder"
        raise UserError(f"run {path}: {what}.\n{_suggest_run(path)}")
    return replace(run, lock=RunLock(run.lock_file)) if lock else run


def _suggest_run(path: Path) -> str:
    for parent in path.parents[:2]:  # RUN/checkpoints or RUN/checkpoints/last.ckpt was given
        if RunFolder(parent).config.is_file():
            return f"Did you mean the run {parent}?"
    for pattern in ("*/config.yaml", "*/*/config.yaml"):
        configs = sorted(path.glob(pattern), key=lambda config: config.stat().st_mtime)
        if configs:
            return f"Did you mean its newest run, {configs[-1].parent}?"
    return "Give the folder that fit named at its end, for example runs/smallnet/1."


def recipe_name(recipes: Sequence[object], model: str) -> str:
    """Return what a run is filed under: its recipe, that of the run whose config.yaml it repeats, or its network.

    Args:
        recipes: The YAML files that it is made from, the last one counts; may be empty.
        model: Its name.
    """
    if not recipes:
        return model.replace("/", "_")  # timm/resnet26d: one folder, as of all others
    recipe = Path(str(recipes[-1])).resolve()
    is_of_a_run = recipe.name == "config.yaml" and recipe.parent.name.isdecimal()
    return recipe.parent.parent.name if is_of_a_run else recipe.stem
