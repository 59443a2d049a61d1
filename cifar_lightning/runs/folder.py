"""Run folders: numbering, creating and opening them.

Every command accepts a run folder. A process that writes into it holds its lock. `file_names` lists all files of a run.
"""

import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cifar_lightning.errors import UserError
from cifar_lightning.files import make_folder, read_bytes, remove_empty, sync_folder
from cifar_lightning.formatting import command_line, suggest
from cifar_lightning.runs.file_names import MAX_JSON_BYTES, WRITERS, RunFiles
from cifar_lightning.runs.lock import RunLock
from cifar_lightning.runs.processes import NEEDS_RUN_DIR, is_started_from_outside

RUNS = Path("runs")
_SHIPPED = Path(__file__).resolve().parents[1] / "shipped"  # a folder for each model that comes with the package
# What weights without a run are for.
_USES = "for predict-images, export, --init_weights, --model.pretrained and Python's load alone"


@dataclass(frozen=True)
class RunFolder(RunFiles):
    """The paths of all files of a run. Constructing it does not touch the disk; see `create_run` and `open_run`.

    `lock` is None in processes that only read the run.
    """

    path: Path
    lock: RunLock | None = field(default=None, compare=False, repr=False)
    made: tuple[Path, ...] = field(default=(), compare=False, repr=False)
    """The folders that `create_run` made for it, the innermost first."""

    @property
    def tested_checkpoint(self) -> Path:
        """The checkpoint that is tested: the best, or the last without a validation split."""
        return self.best_checkpoint if self.best_checkpoint.exists() else self.last_checkpoint

    @property
    def is_shipped(self) -> bool:
        """Whether it is a trained model that comes with the package."""
        return _is_shipped(self.path)

    @property
    def weights(self) -> Path:
        """The file that a trained model is read from: a checkpoint or, where there is none, the exported weights."""
        is_export = not self.tested_checkpoint.exists() and self.exported_weights.exists()
        return self.exported_weights if is_export else self.tested_checkpoint

    @property
    def resumed_checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints that a run can resume from, newest first."""
        return (self.last_checkpoint, self.previous_checkpoint, self.best_checkpoint)

    @property
    def resumed_checkpoint(self) -> Path:
        """The checkpoint that a run resumes from if none is damaged."""
        return next((path for path in self.resumed_checkpoints if path.exists()), self.last_checkpoint)

    @property
    def has_checkpoint(self) -> bool:
        """Whether any checkpoint exists, complete or not."""
        return any(self.checkpoints.glob("*.ckpt"))

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return command_line("fit", "--resume", self.path)

    @property
    def what_to_do(self) -> str:
        """The way out where there is no checkpoint: what exported weights are for, or the command to start over."""
        if self.is_shipped:
            return f"{self.path.name} comes with the package: {_USES}."
        if self.exported_weights.exists():
            return f"It has exported weights and no checkpoint: {_USES}."
        return f"To start it over: {command_line('fit', '--config', self.config, '--run_dir', self.path)}"

    @property
    def has_results(self) -> bool:
        """Whether the run has test results."""
        return self.test_metrics.exists() or self.predictions.exists()

    def has_all_results(self, *, validates: bool) -> bool:
        """Whether every result of a tested run exists and can be read, but for those that its report writes again."""
        again = {self.findings, self.report, self.confusion_matrix_csv, self.confusion_matrix_png}
        again |= {self.predictions_csv, self.mistakes_csv, self.label_issues}
        needed = set(self.files_by("test")) - again - (set() if validates else {self.predictions_val})
        return all(_is_readable(file) for file in needed)

    def discard_results(self) -> None:
        """Remove the test results and the report, before training continues."""
        for file in self.files_by("test", "compare"):
            file.unlink(missing_ok=True)

    def require(self, *files: Path) -> None:
        """Check that files exist; a `UserError` names the missing ones and the command that writes them."""
        missing = [file for file in files if not file.is_file()]
        if missing:
            names = ", ".join(str(file.relative_to(self.path)) for file in missing)
            from_fit = set(self.files_by("fit")).intersection(missing)
            remedy = (
                "fit makes them: train again." if from_fit else f"Make them with: {command_line('test', self.path)}"
            )
            if self.weights == self.exported_weights:  # from which test and fit make nothing
                remedy = self.what_to_do
            raise UserError(f"run {self.path}: {names} {'is' if len(missing) == 1 else 'are'} missing.\n{remedy}")

    def check_files(self) -> None:
        """Refuse a folder in which a link or a special file has the name of a run's file.

        Reading it might never end or show another file, and writing would change files elsewhere.
        """
        for path in self.irregular_files():
            kind = "a link" if path.is_symlink() else "not a regular file" if path != self.checkpoints else "no folder"
            raise UserError(f"run {self.path}: {path.relative_to(self.path)} is {kind}; remove it or put a copy there.")

    @property
    def is_writable(self) -> bool:
        """Whether files can be written into the folder, which may be somebody else's or on a read-only disk."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def check_writable(self) -> None:
        """Check that the folders can be written, before training."""
        for folder in (self.path, self.checkpoints):
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(
                    f"run {self.path}: {folder} cannot be written.\nFix its permissions, or resume a copy of the run."
                )


def create_run(base: Path, name: str, run_dir: str | Path | None = None) -> RunFolder:
    """Create and lock the folder of a new run.

    Without `run_dir` the folder is `base/name/N`, N one above the highest number there. A chosen `run_dir` may be

    - new or empty: it is used;
    - without a run but with other files (a scheduler's log, notes): it is used, the files are kept;
    - of a run without checkpoints and results: the files of the run are removed and it starts over;
    - of a run with a checkpoint, results or exported weights, or holding a file that this run would overwrite although
      no run made the folder (`config.yaml` without `.lock`: somebody's own config): refused, and nothing is touched.

    Raises:
        UserError: The folder is refused, is in use, or cannot be made; or others could not know which it is.
    """
    if run_dir is None and is_started_from_outside():
        raise UserError(NEEDS_RUN_DIR)
    chosen = base / name if run_dir is None else Path(run_dir)
    try:
        made = make_folder(chosen)
        run = RunFolder(_make_numbered(chosen) if run_dir is None else chosen)
        made = [run.path, *made] if run_dir is None else made
    except OSError as error:
        flag = "run folder" if run_dir is None else "--run_dir"
        raise UserError(
            f"{flag} {chosen}: cannot make this folder ({error.strerror}).\nChoose another one with --run_dir PATH."
        ) from error
    refuse_what_would_be_lost(run)  # before the lock's file marks the folder as a run's
    lock = RunLock(run.lock_file, is_new=True)
    try:
        refuse_what_would_be_lost(run)  # another process may have had it in between
        for file in (left := tuple(run.written_files())):
            file.unlink()
        if left:
            print(f"{run.path}: held a run without a checkpoint, which is started over.")
    except BaseException:
        lock.release()
        raise
    return replace(run, lock=lock, made=tuple(made))


def discard_run(run: RunFolder) -> None:
    """Remove the files of a run that never began, and the folders made for it that are empty then."""
    if run.lock is not None:
        run.lock.release()
    for file in (*run.written_files(), run.lock_file):
        file.unlink(missing_ok=True)
    remove_empty([run.checkpoints])
    remove_empty(run.made)  # the others are somebody's own


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


def refuse_what_would_be_lost(run: RunFolder) -> None:
    """Refuse a folder for a new run that holds another one or a file that it would overwrite."""
    run.check_files()
    files = tuple(run.written_files())
    if run.seeds.exists() and any(run.path.glob("*/config.yaml")):
        raise UserError(
            f"--run_dir {run.path}: holds the runs of several seeds.\n"
            f"Choose a new --run_dir; {run.resume_command} resumes them."
        )
    if run.exported_weights.exists() and not run.has_checkpoint:  # they would be mistaken for those of the new run
        raise UserError(
            f"--run_dir {run.path}: holds exported weights, {run.exported_weights.name}.\nChoose a new --run_dir."
        )
    if run.lock_file.exists() or run.config.exists():
        what = "checkpoints" if run.has_checkpoint else "results" if run.has_results else ""
        if what:
            raise UserError(
                f"--run_dir {run.path}: holds a run with {what}; it is not overwritten.\n"
                f"Choose a new --run_dir; {run.resume_command} resumes it."
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
        results: Accept a folder with test results and no config.yaml.

    Raises:
        UserError: It is not a run folder, holds links or special files, or with `lock` it is in use.
    """
    run = RunFolder(path)
    run.check_files()
    has_results = results and (run.predictions.is_file() or run.confusion_matrix_csv.is_file())
    if not (run.config.is_file() or has_results):
        what = "is not a run folder: it has no config.yaml" if path.is_dir() else "is not a folder"
        if not path.exists():
            what = "there is no such folder"
        raise UserError(f"run {path}: {what}.\n{_suggest_run(path)}")
    return replace(run, lock=RunLock(run.lock_file)) if lock else run


def open_model(path: Path, *, results: bool = False) -> RunFolder:
    """Open a run, as `open_run` does, or a model that comes with the package, by its name or its folder there."""
    return RunFolder(_SHIPPED / path.name) if _is_shipped(path) else open_run(path, results=results)


def _is_shipped(path: Path) -> bool:
    is_there = os.path.realpath(path.parent) == str(_SHIPPED)
    is_meant = is_there or (path.name == str(path) and not os.path.lexists(path))
    return is_meant and path.name in shipped_models()


def shipped_models() -> list[str]:
    """Return the names of the trained models that come with the package."""
    return sorted(file.parent.name for file in _SHIPPED.glob(f"*/{RunFolder(_SHIPPED).exported_weights.name}"))


def suggest_shipped(path: Path) -> str:
    """Return " Did you mean X?" for a path that does not exist and is nearly the name of a shipped model."""
    is_name = path.name == str(path) and not os.path.lexists(path) and not _is_shipped(path)
    return suggest(path.name.lower(), shipped_models(), cutoff=0.8) if is_name else ""


def _is_readable(file: Path) -> bool:
    """Whether a result exists and can be read: JSON that is not empty, or an intact zip archive (.npz, .pt)."""
    if not file.is_file():
        return False
    try:
        if file.suffix == ".json":
            return bool(json.loads(read_bytes(file, MAX_JSON_BYTES)))
        with zipfile.ZipFile(file) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except Exception:  # on damaged archives zipfile raises nearly anything
        return False


def run_of(checkpoint: Path) -> RunFolder | None:
    """Return the run among whose checkpoints a file is, also where it is named from inside their folder."""
    run = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent != run.checkpoints:
        checkpoint = Path(os.path.abspath(checkpoint))
        run = RunFolder(checkpoint.parent.parent)
    return run if checkpoint.parent == run.checkpoints else None


def refuse_file_of_run(output: Path, *but: str) -> None:
    """Refuse an --output that has the place of a file of a run, but for those named `but`.

    A config.yaml alone makes no run: it may be the user's own, next to their predictions.csv or report.html.
    """
    run = RunFolder(output.parent)
    is_run = run.config.exists() and run.split.exists()
    if is_run and output in run.files_by(*WRITERS) and output.name not in but:
        raise UserError(f"--output {output}: is a file of the run; choose another name.")


def weights_file(path: Path) -> Path:
    """Return a file of weights, which a flag may also name by its run or as a shipped model."""
    if not path.is_dir() and not _is_shipped(path):
        return path
    run = open_model(path)
    run.require(run.weights)
    return run.weights


def _suggest_run(path: Path) -> str:
    for parent in path.parents[:2]:  # RUN/checkpoints or RUN/checkpoints/last.ckpt was given
        if RunFolder(parent).config.is_file():
            return f"Did you mean the run {parent}?"
    if RunFolder(path).seeds.is_file():
        seeds = ", ".join(str(config.parent) for config in sorted(path.glob("*/config.yaml")))
        return f"It holds a run for each seed: give one of {seeds}. All together: {command_line('analyze', path)}"
    if _is_shipped(path):
        return RunFolder(path).what_to_do
    if RunFolder(path).exported_weights.is_file() or (path.is_file() and path.suffix == ".safetensors"):
        return "Exported weights need a folder: model.safetensors with the config.yaml of its run next to it."
    for pattern in ("*/config.yaml", "*/*/config.yaml"):
        configs = sorted(path.glob(pattern), key=lambda config: config.stat().st_mtime)
        if configs:
            return f"Did you mean its newest run, {configs[-1].parent}?"
    if path.name == str(path) and path.name in shipped_models():
        return f"It hides the model {path.name} that comes with the package: rename it, or run in another folder."
    return f"Give the folder that fit named at its end, for example runs/smallnet/1.{suggest_shipped(path)}"


def config_name(configs: Sequence[object], model: str) -> str:
    """Return NAME of runs/NAME/N: the last config's, that of the run whose config.yaml it is, or the model's."""
    if not configs:
        # timm/resnet26d: one folder, as of all others; package.module:Net: that of its name.
        return model.replace("/", "_") if "/" in model else re.split("[:.]", model)[-1]
    config = Path(str(configs[-1])).resolve()
    if config.name != "config.yaml" or not config.parent.name.isdecimal():
        return config.stem
    return next(parent.name for parent in config.parents if not parent.name.isdecimal())  # N, or N/SEED
