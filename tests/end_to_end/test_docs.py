"""README and docs/ do what they say: blocks run or parse, links lead somewhere, tables hold what was measured."""

import inspect
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from program import start

from cifar_lightning.cli.flags import ALIASES, FRONT_ONLY, GROUPS, check_config, own_classes, table
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import QUICK, run_command, training_arguments
from cifar_lightning.cli.parser import config_text
from cifar_lightning.errors import UserError
from cifar_lightning.models.registry import build_model
from cifar_lightning.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MARKS = ("run", "parse", "by hand", "ci")
RUNS = ("runs/smallnet/1", "runs/smallnet_cpu/1", "runs/own_images/1", "smallnet")  # that the pages' commands name
# Flags of other programs, and those that are no flag of a command but stand alone.
FOREIGN_FLAGS = {"--index-url", "--logdir", "--help", "--help-all", "--version", "--print_completion"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, how it is tested, its language, its text and the line it starts at."""

    page: str
    mark: str | None
    language: str
    text: str
    line: int


def read_blocks(page):
    lines, blocks, at = TEXTS[page].splitlines(), [], 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            mark = re.fullmatch(r"<!-- block: (.+) -->", lines[at - 1])
            content = "".join(f"{line}\n" for line in lines[at + 1 : end])
            blocks.append(Block(page.name, mark and mark[1], lines[at][3:], content, at + 1))
            at = end
        at += 1
    return blocks


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PROSE = {page.name: without_blocks(text) for page, text in TEXTS.items()}
SPANS = [span for text in PROSE.values() for span in re.findall(r"`([^`\n]+)`", text)]
PYTHON_RUN = [block for block in BLOCKS if block.mark == "run"]
YAML = [block for block in BLOCKS if block.language == "yaml"]
PARSED = [block for block in BLOCKS if block.mark == "parse" and block not in YAML]
COMMANDS = [line for block in PARSED for line in block.text.replace("\\\n", "").splitlines() if line.strip()]
IN_PROSE = [
    span
    for span in SPANS
    if span.startswith("python train.py ") and not re.search(r"--(help|version)|\b[A-Z]{3,}\b", span)
]
COMMANDS = list(dict.fromkeys([*COMMANDS, *IN_PROSE]))
BENCHMARKS = [
    line.partition("  #")[0].strip()
    for line in [*SPANS, *(line for block in BLOCKS for line in block.text.splitlines())]
    if line.startswith("python -m benchmarks.")
]


@pytest.fixture
def checkout_with_a_run(parser, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("smallnet", "smallnet_cpu", "own_images"):
        run = RunFolder(tmp_path / "runs" / name / "1")
        run.checkpoints.mkdir(parents=True)
        run.best_checkpoint.touch()
        run.last_checkpoint.touch()
        run.config.write_text(config_text(parser, parser.parse_args([])), encoding="utf-8")
    blocks = read_blocks(ROOT / "docs" / "extending.md")
    named = ("class ChannelShift", "class Rescaled")  # by commands of the pages
    own = "\n".join(block.text for block in blocks if any(name in block.text for name in named))
    (tmp_path / "my_package.py").write_text(own, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


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


def stated_by(config):
    return list(leaves(yaml.safe_load(config.read_text(encoding="utf-8"))))


# -- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_how_it_is_tested(page):
    blocks, text = read_blocks(page), TEXTS[page]
    assert len(blocks) * 2 == len(re.findall("```", text)), "an indented fence, or one within a line"
    assert [(block.line, block.mark) for block in blocks if block.mark not in MARKS] == []
    assert text.count("<!-- block:") == len(blocks)
    assert {block.language for block in blocks if block.mark == "run"} <= {"python"}


def of_readme_or_slow(block):
    marks = () if block.page == README.name else (pytest.mark.slow,)  # each trains for 10 s
    return pytest.param(block, id=f"{block.page}-{block.line}", marks=marks)


@pytest.mark.parametrize("block", list(map(of_readme_or_slow, PYTHON_RUN)))
def test_a_python_block_runs_and_a_model_that_it_tests_has_learned(block, tmp_path):
    (tmp_path / "block.py").write_text(block.text, encoding="utf-8")
    # Lightning would take Apple's GPU, which has too little memory on hosted runners.
    done = start(cwd=tmp_path, program=tmp_path / "block.py", PYTHONPATH=str(ROOT), DISABLE_MPS="1")
    if "test accuracy" in block.text:
        accuracy = float(done.stdout.splitlines()[-1].removeprefix("test accuracy "))
        assert 0.4 < accuracy <= 1, "ten classes: chance is 0.1"


def test_a_loop_of_your_own_is_about_twenty_lines_without_lightning():
    of_page = [block for block in PYTHON_RUN if block.page == "python-api.md"]
    (block,) = [block for block in of_page if "lightning.pytorch" not in block.text]
    assert "Trainer" not in block.text
    assert len([line for line in block.text.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("command", COMMANDS, ids=[command.partition("  #")[0].strip() for command in COMMANDS])
def test_a_command_is_one_that_the_program_takes(command, parser, checkout_with_a_run):
    name, *arguments = arguments_of(command)
    if name in QUICK:
        parsed = QUICK[name].parser(name).parse(arguments)
        assert "run" not in parsed or parsed.run in map(Path, RUNS)
        return
    if any(word.endswith(".help") for word in arguments):
        assert run_command([name, *arguments]) == 0
        return
    flags, resumed = training_arguments(name, arguments)
    parsed = TrainingCLI("fit", flags).settings if own_classes(flags) else parser.parse_args(flags)
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
    groups = (name for group in GROUPS for name in (group, f"{group}.help"))
    known = {*table(), *ALIASES, *FRONT_ONLY, *groups} | {option.removeprefix("--") for option in of_quick}
    ours = [span for span in SPANS if "benchmarks." not in span]
    named = {flag for span in ours for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", span)}
    assert len(named) > 40
    # `--peer`, `--subject` and the like stand alone where a benchmark was named before.
    of_benchmarks = {flag for command in BENCHMARKS for flag in flags_of(module_of(command))}
    unknown = {flag for flag in named - FOREIGN_FLAGS - of_benchmarks if flag.removeprefix("--") not in known}
    objects = tuple(f"--{name}." for name, row in table().items() if row.get("open"))  # which have flags of their own
    assert {flag for flag in unknown if not flag.startswith(objects)} == set()


def module_of(command):
    return ROOT.joinpath(*command.split()[2].split(".")).with_suffix(".py")


def flags_of(module):
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', module.read_text(encoding="utf-8")))


@pytest.mark.parametrize("command", list(dict.fromkeys(BENCHMARKS)))
def test_a_benchmark_that_is_named_is_there_and_has_the_flags(command):
    assert module_of(command).is_file()
    named = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
    assert named <= flags_of(module_of(command))


def test_the_defaults_in_the_table_of_flags_are_the_signatures(parser):
    defaults = parser.get_defaults()
    rows = re.findall(r"^\| (`--.+?) \| (.+?) \|", PROSE["command-line.md"], re.MULTILINE)
    stated = {}
    for flags, values in rows:
        names = [ALIASES.get(flag, flag) for flag in re.findall(r"`--([\w.]+)`", flags)]
        stated |= dict(zip(names, values.replace("`", "").split(", "), strict=False))
    prose = re.compile(r"by |no limit|all GPUs|or 1|--|runs/")
    stated = {name: value for name, value in stated.items() if name in table() and not prose.match(value)}
    assert len(stated) >= 35
    assert {name: str(defaults[name]).lower() for name in stated} == stated


# -- set-up -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_the_two_set_up_commands_as_they_stand_here():
    ci = [block for block in BLOCKS if block.mark == "ci"]
    assert [(block.page, block.language) for block in ci] == [("README.md", "bash")] * 2
    command = ["bash", str(ROOT / ".ci" / "run"), "--print-set-up-commands"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "".join(block.text for block in ci)
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    assert ci[0].text == f"{install}. && python train.py fit --config configs/quickstart.yaml\n"
    assert ci[1].text == f"{install}'.[dev]' && python -m pytest -n auto\n"
    assert ci[0].text in TEXTS[ROOT / "docs" / "index.md"]


def test_ci_and_the_docs_name_every_file_of_a_run():
    run = RunFolder(Path("run"))
    names = {path.relative_to("run").as_posix() for path in run.files_by("fit", "test", "tune", "skip", "compare")} | {
        run.tensorboard
    }
    section = PROSE["run-folder-and-resume.md"].partition("## Files")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == names
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'folder.files_by("fit", "test")' in script


# -- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_the_signatures_and_names_its_command(path, parser):
    check_config(path)
    parsed = parser.parse_args(["--config", str(path)])
    values = dict(leaves(parsed.as_dict()))
    assert {name: values[name] for name, _ in stated_by(path)} == dict(stated_by(path))
    build_model(parsed["model"]["name"], **(parsed["model"]["model_kwargs"] or {}))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25
    header = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    assert f"#   python train.py fit --config configs/{path.name}" in header


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{block.page}-{block.line}")
def test_a_config_on_a_page_fits_the_signatures(block, parser, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(block.text, encoding="utf-8")
    check_config(path)
    values = dict(leaves(parser.parse_args(["--config", str(path)]).as_dict()))
    assert {name: values[name] for name, _ in stated_by(path)} == dict(stated_by(path))


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "smallnet"], ids=lambda path: path.stem)
def test_a_config_states_only_what_differs(path, parser):
    defaults = dict(leaves(parser.get_defaults().as_dict()))
    stated_name = dict(stated_by(path)).get("model.name", "smallnet")
    model = type(build_model(stated_name))
    for name, parameter in inspect.signature(model).parameters.items():
        defaults[f"model.model_kwargs.{name}"] = parameter.default
    stated = stated_by(path)
    assert stated
    assert [name for name, value in stated if value == defaults[name]] == []


def test_the_smallnet_config_is_plain_fit(parser):
    with_config = parser.parse_args(["--config", str(ROOT / "configs" / "smallnet.yaml")])
    plain = parser.parse_args([])
    with_config.pop("config")
    plain.pop("config")
    assert with_config == plain


# -- what the text claims -----------------------------------------------------------------------------------------


def test_the_tables_are_those_that_the_benchmarks_wrote():
    from benchmarks.accuracy.table import PAGES_OF, tables

    for name, measured in tables().items():
        text = PAGES_OF[name].read_text(encoding="utf-8")
        between = re.search(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", text, re.MULTILINE | re.DOTALL)
        assert between[1].strip() == measured.strip()


def test_the_readme_says_which_images_the_results_are_of():
    from benchmarks.accuracy.record import results_of

    datasets = {line["dataset"] for path in CONFIGS for line in results_of(path.stem)}
    flags = "--data.dataset folder --data.root ROOT --seed_everything SEED --data.seed SEED"
    assert "folder" not in datasets or flags in TEXTS[README]


def slugs_of(text):
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(TEXTS[page]))
    for link in [link for link in links if not link.startswith("https://")]:
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        assert target.exists(), link
        assert not anchor or anchor in slugs_of(target.read_text(encoding="utf-8")), link
        if page != README:
            assert target.is_relative_to(ROOT / "docs"), f"{link}: the site holds nothing else"


def test_files_that_are_named_are_there():
    everything = "\n".join(TEXTS.values())
    named = re.findall(r"(?<![\w/])(?:configs|benchmarks|cifar_lightning|tests|docs|examples)/[\w/.-]*\w", everything)
    in_package = re.findall(r"(?<![\w/])[a-z]+/\w+\.py", TEXTS[ROOT / "docs" / "architecture.md"])
    assert {"configs/smallnet_cpu.yaml", "cifar_lightning/training/tta.py"} <= set(named)
    assert len(set(in_package)) > 10
    assert sorted(path for path in set(named) if not (ROOT / path).exists()) == []
    assert sorted(path for path in set(in_package) if not (ROOT / "cifar_lightning" / path).exists()) == []


def test_every_page_is_in_the_readme_the_index_and_the_site():
    pages = {page.name for page in PAGES if page != README}
    assert set(re.findall(r"\(docs/([\w-]+\.md)[)#]", TEXTS[README])) == pages
    assert set(re.findall(r"^- \[.+?\]\(([\w-]+\.md)\)", PROSE["index.md"], re.MULTILINE)) == pages - {"index.md"}
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [value for _, value in leaves({str(at): value for at, value in enumerate(site["nav"])})]
    assert set(re.findall(r"[\w-]+\.md", str(listed))) == pages


def test_the_readme_fits_a_screen_and_its_images_are_small():
    assert len(TEXTS[README].splitlines()) <= 150
    images = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert {image.name for image in images} >= {"report.png", "terminal.png"}
    assert all(image.stat().st_size < 100_000 for image in images)
    assert all(any(f"images/{image.name}" in text for text in TEXTS.values()) for image in images)


def test_only_the_fields_words_are_used():
    own = re.compile("picture|answer", re.IGNORECASE)
    texts = {path.name: path.read_text(encoding="utf-8") for path in [*PAGES, *CONFIGS]}
    assert {name: own.findall(text) for name, text in texts.items() if own.search(text)} == {}
