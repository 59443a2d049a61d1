"""The README does what it says: its blocks run or parse, its recipes fit, its table is what was measured."""

import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cifar_lightning.cli.fit import fit_parser
from cifar_lightning.cli.flags import ALIASES, FRONT_ONLY, check_config, table
from cifar_lightning.cli.main import QUICK, training_arguments
from cifar_lightning.cli.parser import config_text
from cifar_lightning.errors import UserError
from cifar_lightning.models.registry import build_model
from cifar_lightning.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MARKS = ("run", "parse", "by hand", "ci")
# Flags that the README names and other programs than train.py take.
FOREIGN_FLAGS = {
    "--index-url",
    "--force-reinstall",
    "--logdir",
    "--peer",
    "--recipe",
    "--rounds",
    "--num",
    "--seeds",
    "--block",
    "--suite",
    "--precision",
    "--work",
    "--data",
    "--subject",
    "--help",
    "--help-all",
    "--print_completion",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: how it is tested, its language, its text and the line it starts at."""

    mark: str | None
    language: str
    text: str
    line: int


def read_blocks(text):
    lines, blocks, at = text.splitlines(), [], 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            mark = re.fullmatch(r"<!-- block: (.+) -->", lines[at - 1])
            content = "".join(f"{line}\n" for line in lines[at + 1 : end])
            blocks.append(Block(mark and mark[1], lines[at][3:], content, at + 1))
            at = end
        at += 1
    return blocks


BLOCKS = read_blocks(README)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
PYTHON_RUN = [block for block in BLOCKS if block.mark == "run"]
COMMANDS = [line for block in BLOCKS if block.mark == "parse" for line in block.text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def parser():
    return fit_parser()


@pytest.fixture
def checkout_with_a_run(parser, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    run = RunFolder(tmp_path / "runs" / "smallnet" / "1")
    run.checkpoints.mkdir(parents=True)
    run.best_checkpoint.touch()
    run.last_checkpoint.touch()
    run.config.write_text(config_text(parser, parser.parse_args([])), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return run


def arguments_of(command):
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "train.py"], f"a block marked parse holds only such lines, not: {command}"
    return words[2:]


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value) if isinstance(value, list) else value


def stated_by(recipe):
    return list(leaves(yaml.safe_load(recipe.read_text(encoding="utf-8"))))


# -- blocks -----------------------------------------------------------------------------------------------------


def test_every_block_says_how_it_is_tested():
    assert len(BLOCKS) * 2 == len(re.findall("```", README)), "an indented fence, or one within a line"
    assert [(block.line, block.mark) for block in BLOCKS if block.mark not in MARKS] == []
    assert README.count("<!-- block:") == len(BLOCKS)
    assert {block.language for block in BLOCKS if block.mark == "run"} == {"python"}


@pytest.mark.parametrize("block", PYTHON_RUN, ids=lambda block: f"line-{block.line}")
def test_a_python_block_trains_a_network_that_has_learned(block, tmp_path):
    (tmp_path / "block.py").write_text(block.text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "block.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.splitlines()[-1].removeprefix("test accuracy "))
    assert 0.4 < accuracy <= 1, "ten classes: chance is 0.1"


def test_your_own_loop_is_about_twenty_lines_without_lightning():
    (block,) = [block for block in PYTHON_RUN if "lightning.pytorch" not in block.text]
    assert "Trainer" not in block.text
    assert len([line for line in block.text.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("command", COMMANDS, ids=[command.partition("  #")[0].strip() for command in COMMANDS])
def test_a_command_is_one_that_the_program_takes(command, parser, checkout_with_a_run):
    name, *arguments = arguments_of(command)
    if name in QUICK:
        parsed = QUICK[name].parser(name).parse(arguments)
        assert "run" not in parsed or parsed.run == Path("runs/smallnet/1")
        return
    flags, resumed = training_arguments(name, arguments)
    parsed = parser.parse_args(flags)
    if name in ("test", "validate", "predict"):
        assert Path(parsed["ckpt_path"]) == Path("runs/smallnet/1/checkpoints/best.ckpt")
    assert (resumed is not None) == ("--resume" in arguments)


def test_a_misspelt_flag_or_a_missing_run_would_be_noticed(checkout_with_a_run):
    with pytest.raises(UserError, match="max_epoch"):
        training_arguments("fit", ["--trainer.max_epoch", "3"])
    with pytest.raises(UserError, match="runs/smallnet/2"):
        training_arguments("test", ["runs/smallnet/2"])


def test_every_flag_that_is_named_exists():
    of_quick = {
        option for name in QUICK for action in QUICK[name].parser(name)._actions for option in action.option_strings
    }
    known = {*table(), *ALIASES, *FRONT_ONLY} | {option.removeprefix("--") for option in of_quick}
    named = {flag for code in re.findall(r"`([^`]+)`", PROSE) for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code)}
    assert len(named) > 12
    assert sorted(flag for flag in named - FOREIGN_FLAGS if flag.removeprefix("--") not in known) == []


def test_the_defaults_in_the_table_of_flags_are_the_signatures(parser):
    defaults = parser.get_defaults()
    rows = re.findall(r"^\| (`--.+?) \| (.+?) \|", PROSE, re.MULTILINE)
    told = {}
    for flags, values in rows:
        names = [ALIASES.get(flag, flag) for flag in re.findall(r"`--([\w.]+)`", flags)]
        told |= dict(zip(names, values.replace("`", "").split(", "), strict=False))
    told = {name: value for name, value in told.items() if re.fullmatch(r"[\d.]+|cifar10|data|adamw", value)}
    assert len(told) >= 9
    assert {name: str(defaults[name]) for name in told} == told


# -- set-up -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_the_two_set_up_commands_as_they_stand_here():
    ci = [block for block in BLOCKS if block.mark == "ci"]
    assert [block.language for block in ci] == ["bash", "bash"]
    command = ["bash", str(ROOT / ".ci" / "run"), "--print-set-up-commands"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "".join(block.text for block in ci)
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    assert ci[0].text == f"{install}. && python train.py fit --config configs/quickstart.yaml\n"
    assert ci[1].text == f"{install}'.[dev]' && python -m pytest -n auto\n"


def test_ci_and_the_readme_name_every_file_of_a_run():
    run = RunFolder(Path("run"))
    paths = {getattr(run, name) for name in dir(run) if not name.startswith("_")}
    names = {path.relative_to("run").as_posix() for path in paths if isinstance(path, Path) and path != run.path}
    names = names - {".lock", "checkpoints"} | {"events.out.tfevents.*"}
    tuned = {"lr_range.json", "lr_range.png"}  # not in every run
    section = PROSE.partition("## What a run leaves")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == names
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    listed = re.search(r'names = """(.+?)"""', script, re.DOTALL)
    assert set(listed[1].split()) == names - tuned


# -- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_signatures_and_names_its_command(path, parser):
    check_config(path)
    parsed = parser.parse_args(["--config", str(path)])
    values = dict(leaves(parsed.as_dict()))
    assert {name: values[name] for name, _ in stated_by(path)} == dict(stated_by(path))
    build_model(parsed["model"]["name"], **(parsed["model"]["model_kwargs"] or {}))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25
    header = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    assert f"#   python train.py fit --config configs/{path.name}" in header


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "smallnet"], ids=lambda path: path.stem)
def test_a_recipe_states_only_what_differs(path, parser):
    defaults = dict(leaves(parser.get_defaults().as_dict()))
    stated_name = dict(stated_by(path)).get("model.name", "smallnet")
    model = type(build_model(stated_name))
    for name, parameter in inspect.signature(model).parameters.items():
        defaults[f"model.model_kwargs.{name}"] = parameter.default
    stated = stated_by(path)
    assert stated
    assert [name for name, value in stated if value == defaults[name]] == []


def test_the_smallnet_recipe_is_plain_fit(parser):
    with_recipe = parser.parse_args(["--config", str(ROOT / "configs" / "smallnet.yaml")])
    plain = parser.parse_args([])
    with_recipe.pop("config")
    plain.pop("config")
    assert with_recipe == plain


# -- what the text claims -----------------------------------------------------------------------------------------


def test_the_tables_are_those_that_the_benchmarks_wrote():
    for name, measured in runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["tables"]().items():
        between = re.search(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", README, re.MULTILINE | re.DOTALL)
        assert between[1].strip() == measured.strip()


def test_links_and_named_files_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    named = re.findall(r"\b(?:configs|benchmarks|cifar_lightning|tests)/[\w/.]*\w", README)
    assert {"LICENSE", "CHANGELOG.md", "configs/smallnet_cpu.yaml"} <= {*links, *named}
    assert sorted(path for path in {*links, *named} if not (ROOT / path).exists()) == []
    diagrams = "".join(block.text for block in BLOCKS if block.language == "mermaid")
    modules = set(re.findall(r"\w+\.py", diagrams))
    assert len(modules) > 5
    assert sorted(name for name in modules if not (ROOT / "cifar_lightning" / name).exists()) == []


def test_nothing_is_offered_to_the_network():
    assert "0.0.0.0" not in README
    assert "--bind_all" not in README
    assert "localhost only" in README
