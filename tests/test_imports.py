"""Packages import one way, and commands that need no torch do not import it."""

import shutil
import subprocess
import sys

import pytest
from made_run import make_run
from program import REPO

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
RUN = """
import sys
from cifar_lightning.cli.main import main
unwanted = set(sys.argv[1].split(","))
for line in sys.argv[2:]:
    sys.argv = ["train.py", *line.split()]
    try:
        main()
    except SystemExit as ended:
        print("\\nstatus", ended.code, *sorted(unwanted & sys.modules.keys()))
"""
HEAVY = "torch,lightning,pydantic,numpy,scipy,matplotlib,rich,jsonargparse"


@pytest.fixture
def package(tmp_path):
    shutil.copytree(
        REPO / "cifar_lightning", tmp_path / "cifar_lightning", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    return subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, timeout=60)


def test_imports_run_one_way(package):
    done = lint(package)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("errors", "cifar_lightning.files"),
        ("runs.folder", "cifar_lightning.report.report"),
        ("metrics.classification", "torch"),
        ("data.splits", "cifar_lightning.runs.folder"),
        ("models.smallnet", "cifar_lightning.data.datamodule"),
        ("transforms.augmentation", "cifar_lightning.data.loaders"),
        ("checkpoints.durable", "cifar_lightning.training.module"),
        ("training.module", "cifar_lightning.cli.main"),
    ],
)
def test_an_import_the_other_way_breaks_a_contract_even_inside_a_function(module, imported, package):
    path = (package / "cifar_lightning").joinpath(*module.split(".")).with_suffix(".py")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef turned_round():\n    import {imported}\n")
    done = lint(package)
    assert done.returncode == 1, done.stdout
    broken = done.stdout.split("Broken contracts")[1]
    assert f"cifar_lightning.{module} -> {imported}" in broken


def imported_by(unwanted, *lines, cwd):
    """Run commands in a new process; return each one's exit status, with the unwanted modules imported up to then."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, unwanted, *lines], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("status ")]


def test_help_and_mistakes_import_nothing_heavy(tmp_path):
    statuses = {"--help": "0", "--version": "0", "fit --help": "0", "tune --help": "0", "export --help": "0"}
    statuses |= {"--print_completion bash": "0", "fit --modle.lr 1": "2", "fit --lr -1": "2", "fti": "2"}
    statuses |= {"fit --config nowhere.yaml": "2", "test nowhere": "2"}
    found = imported_by(HEAVY, *statuses, cwd=tmp_path)
    assert dict(zip(statuses, found, strict=True)) == {line: [status] for line, status in statuses.items()}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("cli.main", "filelock"),  # which takes 30 ms
        ("inference.predict_images", "lightning"),
        ("metrics.calibration", "torch,lightning"),
        ("metrics.classification", "torch,lightning"),
        ("report.figures", "matplotlib.pyplot,torch"),
        ("report.terminal", "torch,lightning"),
        ("runs.folder", "torch,numpy"),
    ],
)
def test_a_module_imports_nothing_heavy_that_it_does_not_need(module, unwanted):
    code = f"import sys, cifar_lightning.{module}; print(*set(sys.argv[1].split(',')) & sys.modules.keys())"
    command = [sys.executable, "-c", code, unwanted]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert done.stdout == "\n"


def test_analyze_and_runs_import_no_torch(tmp_path):
    run = make_run(tmp_path / "runs" / "made" / "1")
    assert imported_by("torch,lightning", "analyze runs/made/1", "runs", cwd=tmp_path) == [["0"], ["0"]]
    assert run.report.is_file()
