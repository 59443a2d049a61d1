"""What SECURITY.md promises: foreign checkpoints and archives are data, and the docs ask for nothing unsafe."""

import ast
import hashlib
import io
import json
import pickle
import re
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from program import REPO, TINY, decode_here, fail

from benchmarks.faults.judge import Payload
from cifar_lightning import ImageClassifier
from cifar_lightning.checkpoints.loading import read_checkpoint, read_weights
from cifar_lightning.cli import fit as training
from cifar_lightning.cli import main as cli
from cifar_lightning.data import download as downloads
from cifar_lightning.errors import UserError
from cifar_lightning.inference.trained_model import load_trained_model
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.settings import safe_yaml

SOURCES = [*sorted((REPO / "cifar_lightning").rglob("*.py")), REPO / "train.py"]
SAFE_LOADERS = {"yaml.SafeLoader", "_LOADER", "_Undated"}  # the latter two are classes of settings/safe_yaml.py
DOCS = [path for folder in ("", "docs", "benchmarks") for path in sorted((REPO / folder).glob("*.md"))]


# -- the code ---------------------------------------------------------------------------------------------------------


def argument(call, name):
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def is_unsafe(call):
    """Whether a call may run what it reads."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    return (
        argument(call, "weights_only") not in ((None, "True") if name != "torch.load" else ("True",))
        or (
            name.partition(".")[0] in ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve")
            and last in ("load", "loads", "Unpickler", "open")
        )
        or (name.startswith("yaml.") and last in ("load", "load_all") and argument(call, "Loader") not in SAFE_LOADERS)
        or (name.startswith("yaml.") and ("unsafe" in last or "full" in last))
        or argument(call, "allow_pickle") not in (None, "False")
        or name in ("eval", "exec", "os.system", "os.popen")
        or argument(call, "shell") not in (None, "False")
        or (last in ("extractall", "extract") and argument(call, "filter") != "'data'")
        or last == "load_from_checkpoint"
    )


def unsafe_calls(text):
    """Return "line N: call" for each call in a program that may run what it reads."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if is_unsafe(call)]


def test_nothing_is_read_in_a_way_that_could_run_it():
    found = {path.relative_to(REPO).as_posix(): unsafe_calls(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "unsafe",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "read(f, weights_only=False)",
        "pickle.loads(b)",
        "pickle.Unpickler(f)",
        "joblib.load(f)",
        "shelve.open(f)",
        "yaml.load(f)",
        "yaml.load_all(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "yaml.full_load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "exec(x)",
        "os.system(x)",
        "os.popen(x)",
        "subprocess.run(x, shell=True)",
        "tar.extractall(f)",
        "tar.extract(f, filter='tar')",
        "ImageClassifier.load_from_checkpoint(f)",
    ],
)
def test_an_unsafe_call_is_noticed(unsafe):
    assert unsafe_calls(f"import os\nx = {unsafe}\n") == [f"line 2: {unsafe}"]


def test_the_files_that_read_what_is_foreign_are_among_those_looked_at():
    looked_at = {path.relative_to(REPO / "cifar_lightning").as_posix() for path in SOURCES[:-1]}
    assert {"checkpoints/loading.py", "data/shards.py", "data/download.py", "settings/safe_yaml.py"} <= looked_at
    assert issubclass(safe_yaml._LOADER, yaml.SafeLoader | getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert issubclass(safe_yaml._Undated, safe_yaml._LOADER)


def test_known_bad_versions_are_excluded():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = sum(project["optional-dependencies"].values(), project["dependencies"])
    allowed = {Requirement(line).name: Requirement(line).specifier for line in listed}
    for name, bad, good in (
        ("lightning", ["2.6.2", "2.6.3", "2.6.5", "2.7.0"], "2.6.6"),
        ("torch", ["2.5.1", "2.9.1"], "2.10.0"),
        ("onnx", ["1.20.1"], "1.21.0"),
        ("jsonargparse", ["5.0.0"], "4.53.0"),
        ("pillow", ["11.2.1"], "11.3.0"),
    ):
        assert good in allowed[name]
        assert not any(version in allowed[name] for version in bad)
    assert "3.11.3" not in Requirement(f"python{project['requires-python']}").specifier  # tarfile had no data filter


# -- the docs ---------------------------------------------------------------------------------------------------------


def offers_to_the_network(text):
    """Whether a text or program opens a port to other machines."""
    pattern = r"bind_all|0\.0\.0\.0|tensorboard\b[^\n`]*--host(?! *=? *(localhost|127\.0\.0\.1))"
    return re.search(pattern, text) is not None


def test_nothing_is_offered_to_the_network():
    texts = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in [*DOCS, *SOURCES]}
    texts["SECURITY.md"] = texts["SECURITY.md"].replace("without `--bind_all`", "")
    assert [name for name, text in texts.items() if offers_to_the_network(text)] == []
    assert "localhost only" in texts["docs/report.md"]
    for command in ("--bind_all", "--host 0.0.0.0", "--host=example.org"):
        assert offers_to_the_network(f"tensorboard --logdir runs {command}")
    assert not offers_to_the_network("tensorboard --logdir runs --host localhost")


def test_the_policy_names_what_is_trusted_and_the_versions_that_are_excluded():
    text = (REPO / "SECURITY.md").read_text(encoding="utf-8")
    for words in ("Configs are code", "weights_only=True", "localhost", "2.6.2", "CVE-2026-24747", "CVE-2026-27489"):
        assert words in text
    assert "SECURITY.md" in (REPO / "README.md").read_text(encoding="utf-8")


# -- a malicious checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path):
    """A checkpoint that carries code, and the file which that code would make."""
    made = tmp_path / "the payload ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": Payload(made)}, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    made.unlink()  # so it is a real one
    yield tmp_path / "evil.ckpt"
    assert not made.exists()


@pytest.mark.parametrize("read", [read_checkpoint, read_weights])
def test_a_checkpoint_with_code_is_refused_by_name(evil, read):
    with pytest.raises(UserError, match=r"evil\.ckpt: refused, .*could run code"):
        read(evil)


def test_a_plain_pickle_is_no_checkpoint(evil, tmp_path):
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(pickle.dumps(Payload(tmp_path / "the payload ran")))
    for read in (read_checkpoint, read_weights):
        with pytest.raises(UserError, match=r"plain\.ckpt: .*damaged checkpoint, or not a"):
            read(plain)


@pytest.mark.parametrize("flag", ["--init_weights", "--ckpt_path"])
def test_no_flag_runs_a_checkpoints_code(evil, flag, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training, "StopSignals", lambda: type("None", (), {"install": lambda self: None})())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *TINY, "--epochs", "1", flag, str(evil)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3
    assert "evil.ckpt: refused" in lines[0]


@pytest.mark.parametrize("command", ["test", "validate", "predict", "fit --resume", "predict-images", "export"])
def test_no_command_runs_the_code_in_a_foreign_run(evil, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training, "StopSignals", lambda: type("None", (), {"install": lambda self: None})())
    decode_here(monkeypatch)
    run = RunFolder(tmp_path / "foreign")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("data: {dataset: synthetic, image_size: 16, batch_size: 500}\ntrainer: {accelerator: cpu}\n")
    run.split.write_text(json.dumps({"sha256": {}, "train": [], "val": []}))
    for path in (run.best_checkpoint, run.last_checkpoint):
        path.write_bytes(evil.read_bytes())
    more = {"predict-images": [evil], "export": ["--format", "safetensors"], "predict": ["--output", "a.npz"]}
    message = fail(monkeypatch, capsys, tmp_path, *command.split(), run.path, *more.get(command, []))
    assert "ckpt" in message


@pytest.mark.parametrize("command", ["test", "validate", "predict", "inspect --config"])
def test_no_command_writes_the_file_that_a_foreign_run_names(command, monkeypatch, capsys, tmp_path):
    run = RunFolder(tmp_path / "foreign")
    run.checkpoints.mkdir(parents=True)
    run.best_checkpoint.touch()
    (theirs := tmp_path / ("page.html" if "inspect" in command else "labels.csv")).write_text("of the user")
    run.config.write_text(f"output: {theirs}\ndata: {{dataset: synthetic, image_size: 16}}\n")
    named = run.config if "--config" in command else run.path
    message = fail(monkeypatch, capsys, tmp_path, *command.split(), named)
    assert "output is of one command, not of a run; remove that line and give --output FILE" in message
    assert theirs.read_text() == "of the user"


# -- archives ---------------------------------------------------------------------------------------------------------


NESTED = {"class_path": "payload:run"}
ARGUMENTS = [NESTED, {"init_args": NESTED}, {"init_args": {"x": NESTED}}, {"init_args": {"x": [{"y": NESTED}]}}]


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
def test_arguments_in_a_foreign_checkpoint_run_nothing(kwargs, monkeypatch, tmp_path):
    (tmp_path / "payload.py").write_text("import pathlib\n\ndef run(**_):\n    pathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "foreign")
    run.checkpoints.mkdir(parents=True)
    data = {"class_names": ["a", "b"], "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    found = {"state_dict": {}, "ImageDataModule": data, "epoch": 0}
    imported = {"path": "torch.nn:Identity", "kwargs": kwargs}
    of_name = {"name": "torch.nn:Identity", "model_kwargs": kwargs}
    for more in (
        {"hyper_parameters": {"imported": imported}},
        {"imported": imported},
        {"imported_class": imported},
        {"hyper_parameters": of_name},
    ):
        torch.save(found | more, run.best_checkpoint)
        with pytest.raises(UserError):
            load_trained_model(run)
    with pytest.raises(UserError, match="init_args"):
        ImageClassifier("torch.nn:Identity", model_kwargs={"init_args": kwargs})
    assert not (tmp_path / "ran").exists()


def tar_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, b"" if fields else b"x"


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"),
        member("folder/../../outside"),
        member("folder/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        member("folder/link", type=tarfile.LNKTYPE, linkname="../outside"),
        member("folder/device", type=tarfile.CHRTYPE),
        member("folder/pipe", type=tarfile.FIFOTYPE),
    ],
    ids=["above", "above from below", "symlink", "hard link", "device", "pipe"],
)
def test_an_archive_that_reaches_outside_is_refused_even_with_the_right_hash(bad, monkeypatch, tmp_path):
    data = tar_of(member("folder/batch"), bad)
    archive = downloads.Archive("bad.tar.gz", len(data), hashlib.sha256(data).hexdigest(), "folder", "NONE", ())
    monkeypatch.setitem(downloads.ARCHIVES, "bad", archive)
    root = tmp_path / "in" / "data"
    root.mkdir(parents=True)
    (root / "bad.tar.gz").write_bytes(data)
    with pytest.raises(UserError, match="not safe to unpack") as caught:
        downloads.download("bad", root)
    assert len(str(caught.value).splitlines()) <= 3
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "data", "bad.tar.gz", ".bad.tar.gz.lock"}


def test_an_archive_is_not_opened_before_its_hash_is_right(monkeypatch, tmp_path):
    archive = downloads.Archive("a.tar.gz", 4, "0" * 64, "folder", "NONE", ("file:///nowhere",))
    monkeypatch.setitem(downloads.ARCHIVES, "a", archive)
    monkeypatch.setattr(tarfile, "open", lambda *arguments, **kwargs: pytest.fail("opened"))
    (tmp_path / "a.tar.gz").write_bytes(b"evil")
    with pytest.raises(UserError, match="could not be downloaded"):
        downloads.download("a", tmp_path)


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_the_tags_of_yaml_run_nothing(monkeypatch, capsys, tmp_path):
    (tmp_path / "evil.yaml").write_text("data: !!python/object/apply:os.mkdir ['ran']\n")
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--config", "evil.yaml")
    assert "not YAML" in message
    assert not Path("ran").exists()
    fail(monkeypatch, capsys, tmp_path, "fit", *TINY, "--trainer.callbacks=!!python/object/apply:os.mkdir ['ran']")
    assert not Path("ran").exists()
