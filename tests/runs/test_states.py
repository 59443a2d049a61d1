"""States of runs, as `python train.py runs` lists them."""

import json
import shutil
import sys

import numpy as np
import pytest
import yaml
from made_run import make_run

from cifar_lightning.cli import main as cli
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_json, write_text_durably
from cifar_lightning.runs import states as states_module
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.lock import RunLock, is_locked
from cifar_lightning.runs.states import state_of, states_below, states_table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("made") / "run", n=20, epochs=3)
    config = {"model": {"name": "smallnet"}, "trainer": {"max_epochs": 5}}
    write_text_durably(run.config, yaml.safe_dump(config))
    return run


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "runs" / "smallnet" / "2")
    return RunFolder(tmp_path / "runs" / "smallnet" / "2")


def tested(run):
    write_json(run.test_metrics, {"accuracy": 0.75, "accuracy_interval_95": [0.65, 0.85]})
    run.report.touch()


def ended(run, **entry):
    write_json(run.environment, {"ended": {"by": "epochs", "epochs": 3, "step": 27, "planned_steps": 45, **entry}})


def test_the_states_of_a_run_follow_its_files(run):
    assert state_of(run)["state"] == "not begun"
    run.last_checkpoint.touch()
    state = state_of(run)
    assert [state[key] for key in ("state", "epochs", "max_epochs", "step")] == ["stopped", 3, 5, 30]
    assert state["elapsed_s"] == pytest.approx(3 * 10.5)
    ended(run, by="signal", epochs=2, step=25)
    state = state_of(run)
    assert [state[key] for key in ("state", "epochs", "step", "planned_steps")] == ["stopped", 2, 25, 45]
    ended(run)
    assert state_of(run)["state"] == "not tested"
    tested(run)
    state = state_of(run)
    assert (state["state"], state["accuracy"], state["accuracy_interval_95"]) == ("finished", 0.75, [0.65, 0.85])
    with RunLock(run.lock_file):
        assert state_of(run)["state"] == "training"
    assert state_of(run)["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "model: [1, 2"),
        ("config.yaml", "model: 3"),
        ("metrics.csv", "epoch,step\nten,3\n"),
        ("timing.csv", "epoch,elapsed_s\n-1,3\n"),
        ("test_metrics.json", '{"accuracy": 7}'),
        ("test_metrics.json", '{"accuracy": 0.5, "accuracy_interval_95": [0.1]}'),
        ("environment.json", '{"ended": 3}'),
        ("environment.json", "\x1b[31m"),
        ("seeds.json", '{"seeds": ["../../etc"]}'),
        ("seeds.json", '{"seeds": [0], "accuracy": {"mean": "high"}}'),
    ],
)
def test_a_damaged_file_is_named_and_nothing_of_it_reaches_the_terminal(run, name, text):
    (run.path / name).write_text(text)
    state = state_of(run)
    assert (state["state"], len(state["problems"])) == ("damaged", 1)
    assert name in state["problems"][0]
    assert states_table([state]).replace("\n", "").isprintable()


def test_settings_of_any_type_and_names_that_do_not_print_are_shown(run):
    config = {"model": {"name": "\x1b[31m" + "x" * 500}, "trainer": {"max_epochs": [1, 2]}}
    run.config.write_text(yaml.safe_dump(config))
    ended(run, epochs="three", step=-4, planned_steps=1e300)
    assert states_table([state_of(run)]).replace("\n", "").isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX links")
@pytest.mark.parametrize("kind", ["links to itself", "folders of seeds in each other"])
def test_a_folder_of_seeds_that_holds_folders_of_seeds_is_shown_at_once(tmp_path, monkeypatch, kind):
    path = tmp_path / "x"
    path.mkdir()
    if kind == "links to itself":  # 2^40 ways through it
        write_json(path / "seeds.json", {"seeds": [0, 1]})
        for name in "01":
            (path / name).symlink_to(".")
    else:
        for _ in range(3):
            path.mkdir(exist_ok=True)
            write_json(path / "seeds.json", {"seeds": [0] * 1000})
            path /= "0"
    calls = []

    def counted(*run, **kwargs):
        calls.append(run)
        assert len(calls) <= 6
        return state_of(*run, **kwargs)

    monkeypatch.setattr(states_module, "state_of", counted)
    found = [state["state"] for state in states_below(tmp_path)]
    assert found == (["damaged"] if kind == "links to itself" else ["not begun"] * 3)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX links")
def test_links_are_neither_followed_nor_read(run, tmp_path):
    (tmp_path / "runs" / "linked").symlink_to(run.path)
    run.metrics_csv.unlink()
    run.metrics_csv.symlink_to("/etc/passwd")
    assert [(state["run"], state["state"]) for state in states_below(tmp_path / "runs")] == [
        (str(run.path), "damaged"),
    ]


def test_all_runs_are_listed_in_the_order_of_their_numbers_seeds_below_their_folder(run, tmp_path):
    for name in ("10", "11/0", "11/2", "11/10"):
        shutil.copytree(run.path, run.path.parent / name)
    parent = RunFolder(run.path.parent / "11")
    write_json(parent.seeds, {"seeds": [0, 2, 10]})
    tested(RunFolder(parent.path / "0"))
    states = states_below(tmp_path / "runs")
    names = [state["run"].removeprefix(str(run.path.parent) + "/") for state in states]
    assert names == ["2", "10", "11", "11/0", "11/2", "11/10"]
    assert [state["state"] for state in states] == ["not begun", "not begun", "stopped", "finished", *["not begun"] * 2]
    for seed in (2, 10):
        tested(RunFolder(parent.path / str(seed)))
    spread = {"n": 3, "mean": 0.75, "std": 0.01, "min": 0.7, "max": 0.8}
    write_json(parent.seeds, {"seeds": [0, 2, 10], "accuracy": spread})
    state = state_of(parent)
    assert [state[key] for key in ("state", "accuracy", "std", "seeds")] == ["finished", 0.75, 0.01, [0, 2, 10]]
    assert "75.00 % (mean, SD 1.00 %)" in states_table([state])
    assert "75.00 % (mean) " in states_table([state | {"std": None}])
    with pytest.raises(UserError, match="elsewhere"):
        states_below(tmp_path / "elsewhere")


def test_the_command_prints_a_line_a_run_or_json(run, tmp_path, monkeypatch, capsys):
    tested(run)
    monkeypatch.chdir(tmp_path)
    assert cli.run_command(["runs"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "run"
    assert {"runs/smallnet/2", "75.00", "smallnet", "3", "5", "finished"} <= set(line.split())
    assert cli.run_command(["runs", "runs/smallnet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["accuracy"] == 0.75
    (tmp_path / "empty").mkdir()
    assert cli.run_command(["runs", "empty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.run_command(["runs", "empty"]) == 0
    assert capsys.readouterr().out.startswith("empty: ")


def test_looking_at_a_lock_neither_takes_nor_changes_it(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    assert not path.exists()
    path.write_bytes(b" 123\n")
    assert not is_locked(path)
    assert path.read_bytes() == b" 123\n"
    with RunLock(path):
        assert is_locked(path)
    RunLock(path).release()


def test_random_bytes_in_place_of_any_file_never_raise(run):
    rng = np.random.default_rng(0)
    tested(run)
    files = [run.config, run.environment, run.metrics_csv, run.timing_csv, run.test_metrics, run.seeds]
    for file in files:
        before = file.read_bytes() if file.exists() else b"{}"
        for _ in range(5):
            file.write_bytes(rng.bytes(rng.integers(1, 200)))
            assert states_table([state_of(run)])
        file.write_bytes(before)


def test_a_run_in_the_folder_of_others_does_not_hide_them(run, tmp_path):
    (run.path.parent / "config.yaml").write_text("")
    shown = [state["run"] for state in states_below(tmp_path / "runs")]
    assert shown == [str(run.path.parent), str(run.path)]
