"""The package works where it is installed, outside the repository; its public API is the one of the docs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from program import REPO, start

import cifar_lightning
from cifar_lightning.cli.configs import config_names, find_config
from cifar_lightning.cli.help import training_help
from cifar_lightning.cli.main import training_arguments
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import command_line

CONFIGS = REPO / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


# -- configs by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["{}", "{}.yaml", "configs/{}.yaml", "configs/{}", "./configs/{}.yaml"])
def test_a_shipped_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    assert [find_config(spelling.format(name)) for name in NAMES] == [CONFIGS / f"{name}.yaml" for name in NAMES]
    (tmp_path / "quickstart").mkdir()  # such as a folder of runs
    flags, _ = training_arguments("fit", ["--config", spelling.format("quickstart"), "--epochs", "1"])
    assert flags == [f"--config={CONFIGS / 'quickstart.yaml'}", "--trainer.max_epochs=1"]


@pytest.mark.parametrize("own", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_config_of_ones_own_wins(tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / own).write_text("data: {batch_size: 3}\n")
    assert find_config(own) == Path(own)
    assert find_config("quickstart") == (CONFIGS / "quickstart.yaml" if own == "quickstart.yaml" else Path(own))


@pytest.mark.parametrize("missing", ["other/quickstart.yaml", "/configs/quickstart.yaml", "quickstat", "configs/a"])
def test_a_config_that_is_missing_stays_as_it_was_typed(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    assert find_config(missing) == Path(missing)
    with pytest.raises(UserError, match=f"--config {missing}: cannot be read.*quickstart"):
        training_arguments("fit", ["--config", missing])


def test_a_link_to_nothing_is_not_replaced_by_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").symlink_to("nowhere")
    assert find_config("quickstart") == Path("quickstart")


def test_the_help_of_fit_and_tune_names_the_shipped_configs():
    assert config_names() == NAMES
    for command in ("fit", "tune"):
        assert set(NAMES) <= set(re.findall(r"\w+", training_help(command)))


# -- the program as it was called ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train.py", "python train.py"),
        (str(REPO / "train.py"), f"python {REPO / 'train.py'}"),
        (str(REPO / "cifar_lightning" / "__main__.py"), "python -m cifar_lightning"),
        ("/usr/local/bin/cifar-lightning", "cifar-lightning"),
        ("/elsewhere/train.py", "cifar-lightning"),  # somebody's own, which imports the package
        ("/usr/lib/ipykernel_launcher.py", "cifar-lightning"),
        ("", "cifar-lightning"),
    ],
)
def test_commands_to_copy_name_the_program_as_it_was_called(monkeypatch, script, expected):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", [script])
    assert command_line("fit", "--resume", Path("my run")) == f"{expected} fit --resume 'my run'"


def test_only_one_place_knows_how_the_program_is_called():
    files = [path for path in (REPO / "cifar_lightning").rglob("*") if path.suffix in (".py", ".md", ".html")]
    assert [path.name for path in files if "python train.py" in path.read_text("utf-8")] == []


# -- the public API --------------------------------------------------------------------------------------------------


def test_the_public_api_is_the_reference_of_the_docs():
    reference = re.findall(r"^::: (\S+)$", (REPO / "docs" / "python-api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(reference) == sorted(
        f"cifar_lightning.{home}.{name}" for name, home in cifar_lightning._HOMES.items()
    )
    assert sorted(cifar_lightning.__all__) == sorted(cifar_lightning._HOMES)
    assert all(getattr(cifar_lightning, name).__doc__ for name in cifar_lightning.__all__)


def test_the_names_for_type_checkers_are_those_of_the_api():
    tree = ast.parse((REPO / "cifar_lightning" / "__init__.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    homes = {name.asname: node.module for node in imports for name in node.names if name.asname}
    assert homes == {name: f"cifar_lightning.{home}" for name, home in cifar_lightning._HOMES.items()}


# -- wheel and sdist -------------------------------------------------------------------------------------------------


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(REPO) for path in (REPO / "cifar_lightning").rglob("__init__.py")]
    assert listed == sorted([".".join(folder.parts) for folder in folders] + ["cifar_lightning.configs"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a new environment with a wheel that was built from the sdist; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(REPO / "cifar_lightning", source / "cifar_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONFIGS, source / "configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)

    def build(kind, cwd):
        code = f"from setuptools.build_meta import build_{kind} as build; build({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, timeout=60)
        return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))

    shutil.unpack_archive(build("sdist", source), folder, filter="data")
    wheel = build("wheel", next(path for path in folder.glob("cifar_lightning-*") if path.is_dir()))
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, timeout=60)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith(("tests", "configs", "benchmarks"))] == []
    return environment, site


def written(folder):
    """Return when each file was changed; of folders only that they are there, as Python keeps bytecode in them."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in paths}


@pytest.mark.slow
def test_an_installed_wheel_works_outside_the_repository(installed, tmp_path):
    environment, site = installed
    files = written(site)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        command = [environment / "bin" / command[0], *command[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    assert set(NAMES) <= set(re.findall(r"\w+", run("cifar-lightning", "fit", "--help")))
    assert "python -m cifar_lightning fit --config quickstart" in run("python", "-m", "cifar_lightning", "--help")
    assert "usage: python -m cifar_lightning" in run("python", "-m", "cifar_lightning", "fit", "--help-all")
    where = "import cifar_lightning; print(cifar_lightning.__file__)"
    assert run("python", "-c", where).strip() == str(site / "cifar_lightning" / "__init__.py")

    def program(*arguments, script=environment / "bin" / "cifar-lightning"):
        return start(*arguments, cwd=tmp_path, program=script, PYTHONPATH=str(site)).stdout

    assert "nothing was written" in program("fit", "--config", "quickstart", "--trainer.fast_dev_run", "true")
    small = ["--epochs", 1, "--data.limit", 300, "--trainer.enable_progress_bar", "false"]
    script = site / "cifar_lightning" / "__main__.py"
    shown = program("fit", "--config", "quickstart", *small, "--trainer.limit_test_batches", 4, script=script)
    assert "python -m cifar_lightning analyze runs/quickstart/1" in shown
    assert "cifar-lightning analyze runs/quickstart/1" in program("analyze", "runs/quickstart/1")
    page = (tmp_path / "runs" / "quickstart" / "1" / "report.html").read_text("utf-8")
    assert "cifar-lightning fit --config config.yaml" in page
    assert "train.py" not in page
    after = written(site)
    assert after == files, "an installed package is not written to"


@pytest.mark.slow
def test_the_examples_have_types_with_the_installed_package(installed, tmp_path):
    environment, _ = installed
    python, cache = environment / "bin" / "python", REPO / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--config-file", REPO / "pyproject.toml", "--cache-dir", cache]
    command += ["--python-executable", python, *sorted((REPO / "examples").glob("*.py"))]
    variables = {name: value for name, value in os.environ.items() if not name.endswith("PATH") or name == "PATH"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
