"""Whatever is typed, written into a recipe or done to an image: a short message, the right exit status, no traceback.

The mutations are in mutations.py, the same ones at every start. Everything is real up to the first step of training.
"""

import io
import os
import random
import shutil
import sys
import types
import weakref
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import FORMATS, command_lines, encoded, image_files, recipes
from program import REPO, TINY, decode_here, start

from benchmarks.faults.mutations import run_commands
from cifar_lightning.cli import doctor, evaluate, fit, lightning_cli, tune
from cifar_lightning.cli import main as cli
from cifar_lightning.data import download
from cifar_lightning.data.image_decoding import decode_image
from cifar_lightning.data.image_folder import CACHE_FOLDER, ClassFolders
from cifar_lightning.errors import UserError
from cifar_lightning.report import report
from cifar_lightning.runs.lock import RunLock
from cifar_lightning.training import precision, predictions
from cifar_lightning.training.lr_finder import LrRange

SAME_EACH_TIME = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failure is small as it is, and shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
RECIPES = [path.read_text(encoding="utf-8") for path in sorted((REPO / "configs").glob("*.yaml"))]
LINES = [
    ["fit", *TINY, "--epochs", "2", "--lr", "0.01", "--seed_everything", "1"],
    ["fit", "-c", "configs/quickstart.yaml", "--run_dir", "out", "--trainer.precision", "32-true", "--data.seed=3"],
    ["fit", "--resume", "run", "--epochs", "9"],
    ["fit", *TINY, "--init_weights", "run/checkpoints/last.ckpt", "--trainer.max_steps=4"],
    ["fit", *TINY, "--print_config"],
    ["tune", *TINY, "--run_dir", "tuned"],
    ["validate", "run"],
    ["test", "run", "--data.eval_batch_size", "9"],
    ["predict", "run", "--output", "x.npz"],
    ["test", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/best.ckpt"],
    ["predict-images", "run", "images", "images/0.png", "--output", "p.csv", "--top_k", "3", "--force"],
    ["analyze", "run", "--compare", "other"],
    ["export", "run", "--format", "safetensors", "--output", "m.safetensors", "--input", "uint8", "--force"],
    ["download", "--dataset", "cifar10", "--root", "data"],
    ["doctor", "--root", "data"],
    ["--print_completion", "bash"],
    ["fit", "--help"],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, known_locks):
    """A folder with two runs, a few images and the recipes, as somebody has it who uses the program."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(fit, "make_report", lambda *args, **kwargs: None)
        patch.setattr(predictions, "make_report", lambda *args, **kwargs: None)
        patch.setattr(sys, "argv", ["train.py", "fit", *TINY, "--epochs", "1", "--run_dir", "run"])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    release_locks()
    shutil.copytree(place / "run", place / "other")
    shutil.copytree(REPO / "configs", place / "configs")
    (place / "images").mkdir()
    for number in range(3):
        (place / "images" / f"{number}.png").write_bytes(encoded("PNG"))
    return place


LOCKS = weakref.WeakSet()


@pytest.fixture(scope="module", autouse=True)
def known_locks():
    """Remember the locks of runs that are opened to be written."""

    def lock_and_remember(self, path, **kwargs):
        real(self, path, **kwargs)
        LOCKS.add(self)

    real = RunLock.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLock, "__init__", lock_and_remember)
        yield


def release_locks():
    """Release them, as the end of a process does."""
    for lock in tuple(LOCKS):
        lock.release()


@pytest.fixture
def quick(place, monkeypatch):
    """What takes long is left out: training, the report, the network, processes; LightningCLI's parser is made once."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(place / "cache"))
    decode_here(monkeypatch)

    def no_network(archive, *arguments):
        raise UserError(f"{archive.filename} could not be downloaded: no network.")

    monkeypatch.setattr(download, "_download_archive", no_network)
    monkeypatch.setattr(precision, "_has_bfloat16", lambda: True)  # no remark, whatever the machine
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: 1.1)
    monkeypatch.setattr(doctor, "look", lambda root: doctor.Findings())
    for module in (report, fit, predictions):
        monkeypatch.setattr(module, "make_report", lambda *args, **kwargs: None)
    for stage in ("train", "report_short_ending", "evaluate_best_checkpoint"):
        monkeypatch.setattr(fit, stage, lambda *arguments, **settings: None)
    monkeypatch.setattr(tune, "find_lr", lambda *arguments, **settings: LrRange([], [], 0.1))
    for module in (fit, tune):
        monkeypatch.setattr(module, "write_lr_range", lambda *arguments: None)

    def build_idle_trainer(*arguments, **settings):
        trainer = lightning_cli.build_trainer(*arguments, **settings)
        for stage in ("validate", "test", "predict"):
            setattr(trainer, stage, lambda *arguments, **settings: None)
        return trainer

    monkeypatch.setattr(evaluate, "build_trainer", build_idle_trainer)
    monkeypatch.setattr(evaluate, "print_validation", lambda metrics: None)
    monkeypatch.setattr(lightning_cli, "StopSignals", lambda: types.SimpleNamespace(install=lambda: None))
    made = {}

    def set_up_once(self, *arguments):
        command = self._arguments[0]
        if command not in made:
            real(self, *arguments)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            made[command] = {name: getattr(self, name) for name in names}
        vars(self).update(made[command])

    real = lightning_cli.TrainingCLI.setup_parser
    monkeypatch.setattr(lightning_cli.TrainingCLI, "setup_parser", set_up_once)


def run_in_process(place, arguments):
    """Run a command line in this process; return its exit status and what it wrote on stderr."""
    before, argv = set(place.iterdir()), sys.argv
    os.environ.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    sys.argv = ["train.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        return ended.code, err.getvalue()
    finally:
        sys.argv = argv
        release_locks()
        for path in set(place.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    raise AssertionError("main() came back without an exit status")


def assert_short(status, err, most=3):
    assert status in (0, 1, 2), err
    lines = err.splitlines()
    assert len(lines) <= most, err
    assert "Traceback" not in err
    if status == 2 and lines:  # a remark on the precision may come before
        assert any(line.startswith("error: ") for line in lines), err


# -- in this process -------------------------------------------------------------------------------------------------


def test_any_command_line_gets_a_short_message(place, quick):
    statuses = []

    @settings(SAME_EACH_TIME, max_examples=400)
    @given(command_lines(LINES))
    def mutated(arguments):
        status, err = run_in_process(place, arguments)
        assert_short(status, err)
        assert err or status == 0 or not arguments  # who is refused gets a reason; without a command there is the help
        statuses.append(status)

    mutated()
    assert len(statuses) >= 400
    assert 0 < statuses.count(0) < len(statuses)  # some mistakes are none, such as a flag given twice


def test_any_config_gets_a_short_message_and_a_valid_one_starts(place, quick):
    statuses = []

    @settings(SAME_EACH_TIME, max_examples=150)
    @given(recipes([*RECIPES, (place / "run" / "config.yaml").read_text(encoding="utf-8")]))
    def mutated(data):
        (place / "mine.yaml").write_bytes(data)
        status, err = run_in_process(place, ["fit", "--config", "mine.yaml", *TINY[:6], "--run_dir", "out"])
        assert_short(status, err)
        assert (status == 0) == (err == "")
        statuses.append(status)

    mutated()
    assert 0 < statuses.count(0) < len(statuses)


def test_the_lines_and_recipes_are_valid_before_they_are_mutated(place, quick):
    for arguments in LINES:
        status, err = run_in_process(place, arguments)
        assert (status, err) == (0, "") or (arguments[0] == "download" and "no network" in err)
    for path in sorted((REPO / "configs").glob("*.yaml")):
        other_images = [*TINY[:6], "--data.train_sizes", "null", "--model.pretrained", "false"]  # no download
        assert run_in_process(place, ["fit", "--config", str(path), *other_images, "--run_dir", "out"]) == (0, "")


@settings(SAME_EACH_TIME, max_examples=400)
@given(image_files(), st.sampled_from([1, 24, 60]))
def test_any_image_file_is_decoded_or_refused_by_name(tmp_path_factory, drawn, image_size):
    suffix, data = drawn
    path = tmp_path_factory.getbasetemp() / f"mutated.{suffix}"
    path.write_bytes(data)
    decoded, refusal = tried(decode_image, str(path), image_size)
    if refusal:
        assert refusal.startswith(f"{path} cannot be read (")
        assert "\n" not in refusal
    else:
        assert (decoded.shape, decoded.dtype) == ((image_size, image_size, 3), np.uint8)


def tried(function, *arguments):
    """Return what a function returns, and the message of its `UserError`."""
    try:
        return function(*arguments), ""
    except UserError as error:
        return None, str(error)


def test_any_folder_of_damaged_images_is_decoded_or_refused_with_their_number(tmp_path, monkeypatch):
    decode_here(monkeypatch)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "good.png").write_bytes(encoded("PNG"))

    @settings(SAME_EACH_TIME, max_examples=40)
    @given(st.lists(image_files(), min_size=1, max_size=5))
    def mutated(files):
        for number, (suffix, data) in enumerate(files):
            (tmp_path / "train" / "ant" / f"bad{number}.{suffix}").write_bytes(data)
        loaded, refusal = tried(lambda: ClassFolders(tmp_path).load("train"))
        if refusal:
            assert len(refusal.splitlines()) == 2
            assert f"of {len(files) + 2} images in {tmp_path / 'train'}" in refusal
        else:
            assert len(loaded[0]) == len(loaded[1]) == len(files) + 2
        for path in [*(tmp_path / "train" / "ant").glob("bad*"), *(tmp_path / CACHE_FOLDER).glob("*")]:
            path.unlink()

    mutated()


def test_any_damaged_images_get_a_row_or_a_line_each(place, quick):
    @settings(SAME_EACH_TIME, max_examples=15)
    @given(st.lists(image_files(), min_size=1, max_size=8))
    def mutated(files):
        folder, output = place / "damaged", place.with_name("output")
        for made in (folder, output):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        for number, (suffix, data) in enumerate(files):
            (folder / f"{number}.{suffix}").write_bytes(data)
        status, err = run_in_process(place, ["predict-images", "run", "damaged", "--output", str(output / "p.csv")])
        shutil.rmtree(folder)
        assert_short(status, err)
        assert status == bool(err)
        listed = output / "skipped_files.jsonl"
        num_listed = len(listed.read_text().splitlines()) if listed.exists() else 0
        num_rows = len((output / "p.csv").read_text().splitlines()) - 1 if num_listed < len(files) else 0
        assert num_rows + num_listed == len(files)

    mutated()


# -- in real processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_real_processes_the_message_is_as_short(place, tmp_path):
    os.symlink(place / "run", tmp_path / "run")
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    rng = random.Random(0)
    lines = command_lines(LINES[:2] + LINES[5:11])
    statuses = []
    files = image_files()
    kinds = (("line", lines, 12), ("recipe", recipes(RECIPES), 4), ("class folder", files, 2), ("image", files, 2))
    for kind, strategy, num in kinds:
        for data in drawn(strategy, num, rng):
            status, err = in_a_process(kind, data, tmp_path)
            assert_short(status, err)
            statuses.append(status)
    assert len(statuses) == 20
    assert {0, 2} <= set(statuses)


@pytest.mark.slow
def test_whole_commands_on_mutated_run_folders_end_cleanly(tmp_path):
    """CIFAR_LIGHTNING_TEST_SEED chooses other mutations."""
    endings = list(run_commands(tmp_path, 20, int(os.environ.get("CIFAR_LIGHTNING_TEST_SEED", "0"))))
    assert [ending for ending in endings if ending.fault] == []
    assert {0, 2} <= {ending.status for ending in endings}


def drawn(strategy, num, rng):
    """Return some examples of a strategy, the same ones for the same `rng`."""
    examples = []

    @settings(SAME_EACH_TIME, max_examples=10 * num)
    @given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return rng.sample(examples, num)


def in_a_process(kind, data, cwd):
    """Run one of the program's commands on what was mutated; return its exit status and stderr."""
    short = ["--trainer.limit_train_batches", "1", "--epochs", "1", "--run_dir", "out"]
    if kind == "line":
        arguments = [argument for argument in data if len(argument) < 100_000]
    elif kind == "recipe":
        (cwd / "mine.yaml").write_bytes(data)
        arguments = ["fit", "--config", "mine.yaml", *TINY, *short]
    elif kind == "image":
        (cwd / f"bad.{data[0]}").write_bytes(data[1])
        arguments = ["predict-images", "run", f"bad.{data[0]}", "--output", "p.csv", "--force"]
    else:
        shutil.rmtree(cwd / "many", ignore_errors=True)
        for folder in ("train/ant", "train/bee", "test/ant", "test/bee"):
            (cwd / "many" / folder).mkdir(parents=True)
            for number in range(3):
                (cwd / "many" / folder / f"{number}.png").write_bytes(encoded("PNG"))
        (cwd / "many" / "train" / "ant" / f"bad.{data[0]}").write_bytes(data[1])
        arguments = ["fit", "--data.dataset", "folder", "--data.root", "many", "--data.image_size", "16"]
        arguments += ["--batch_size", "2", "--model.model_kwargs", "{widths: [4, 8, 8]}", *short]
    nowhere = "http://127.0.0.1:9"  # refuses at once, where a firewall would let a download wait
    done = start(*arguments, cwd=cwd, check=False, https_proxy=nowhere, http_proxy=nowhere)
    shutil.rmtree(cwd / "out", ignore_errors=True)
    return done.returncode, done.stderr


def test_the_formats_of_the_mutations_can_be_read(tmp_path):
    for kind, suffix in FORMATS.items():
        (tmp_path / f"a.{suffix}").write_bytes(encoded(kind))
        assert decode_image(str(tmp_path / f"a.{suffix}"), 8).shape == (8, 8, 3)
