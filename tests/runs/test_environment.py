"""What the numbers of a run may depend on."""

import os
import sys
from pathlib import Path

from program import git

from cifar_lightning.files import write_json
from cifar_lightning.runs.contents import read_environment
from cifar_lightning.runs.environment import _describe_checkout, describe_environment, portable


def test_the_environment_names_versions_and_command_and_is_json(tmp_path):
    environment = describe_environment()
    write_json(tmp_path / "environment.json", environment)
    assert read_environment(tmp_path / "environment.json") == environment
    import torch

    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["num_cpus"] >= environment["num_usable_cpus"] >= 1
    assert environment["cpu"]
    assert environment["command"] == portable([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def test_settings_are_kept_without_the_folders_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    given = [
        "/usr/bin/python3",
        f"{tmp_path}/train.py",
        "--data.root=/mnt/ada/my photos/cats",
        "/home/ada/x/y",
        "--lr",
        0.1,
    ]
    assert portable(given) == ["python3", "train.py", "--data.root=my photos/cats", "~/x/y", "--lr", 0.1]
    assert portable({"a": ("/home/ada/w.pt", None), "b": {"c": "{d: /srv/e.pt}"}}) == {
        "a": ("~/w.pt", None),
        "b": {"c": "{d: e.pt}"},
    }
    assert portable(["/home/ada", str(tmp_path), f"/mnt{tmp_path}/x", "/mnt/home/ada/x"]) == ["~", ".", "x", "x"]
    for same in ("https://example.org/a/b", "runs/a/b", "../a/b", "1/2", "/", "~/a"):
        assert portable(same) == same
    assert portable("folder: 9 images, in /srv/ada/photos") == "folder: 9 images, in photos"


def test_folders_of_windows_are_left_out_there_as_well(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "getcwd", lambda: r"D:\ada\work")
    monkeypatch.setattr(os.path, "expanduser", lambda path: r"C:\Users\ada")
    for given, kept in {
        r"C:\Users\ada\venv\Scripts\cifar-lightning.exe": r"~/venv\Scripts\cifar-lightning.exe",
        r"C:\Users\eve\venv\Scripts\cifar-lightning.exe": "cifar-lightning.exe",
        r"--data.root=D:\ada\work\my photos\cats": r"--data.root=my photos\cats",
        r"D:\ada\work": ".",
        "E:/ada/w.pt": "w.pt",
        r"{d: \\server\ada\e.pt}": "{d: e.pt}",
        r'{"d": "E:\\ada\\e.pt"}': '{"d": "e.pt"}',
        r"folder: 9 images, in E:\ada\photos": "folder: 9 images, in photos",
    }.items():
        assert portable(given) == kept
    for same in (
        "s3://bucket/a/b",
        "https://example.org/a/b",
        r"runs\a\b",
        r"..\a\b",
        "C:",
        r"\d+\w",
        r'"\\d+\\w"',
        "a: /",
        "x://a/b",
    ):
        assert portable(same) == same


def test_a_home_folder_of_windows_is_found_in_every_spelling(monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: r"D:\work")
    monkeypatch.setattr(os.path, "expanduser", lambda path: r"C:\Users\Ada L")
    for given in ("C:/Users/Ada L/x", r"C:\Users\Ada L\x", r"C:\\Users\\Ada L\\x"):
        assert portable(given) == "~/x"
    assert portable(r"C:\Users\Ada L") == "~"


def test_regular_expressions_stay_as_they_are_where_windows_has_no_folders(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for same in (r'{"pattern": "\\d+\\w+\\s"}', r"a:\d+\w", r"\\server\ada\e.pt"):
        assert portable(same) == same


def test_the_commit_is_of_a_checkout_that_tracks_the_package_and_of_no_other(tmp_path, monkeypatch):
    tracked, installed = tmp_path / "runs.py", tmp_path / "venv.py"
    tracked.write_text("x")
    installed.write_text("x")
    assert _describe_checkout(tracked) == (None, None)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "runs.py")
    git(tmp_path, "commit", "-qm", "x")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a git hook
    assert _describe_checkout(tracked) == (git(tmp_path, "rev-parse", "HEAD"), False)
    assert _describe_checkout(installed) == (None, None)
    tracked.write_text("changed")
    assert _describe_checkout(tracked) == (git(tmp_path, "rev-parse", "HEAD"), True)
