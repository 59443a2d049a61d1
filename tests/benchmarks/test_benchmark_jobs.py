"""The list of long runs: what is done comes from the results alone, and the next one is continued where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from program import git

from benchmarks.accuracy import jobs, record, table
from benchmarks.accuracy.jobs import Wanted, next_run, read_jobs, states
from cifar_lightning.errors import UserError
from cifar_lightning.runs.folder import RunFolder

CPU, GPU = "2 cores of A (AVX2), no GPU", "2 cores of A, B100"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Configs, a job file and results that were made up, on a machine without a GPU and without bf16 instructions."""
    for folder in ("configs", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "configs" / "plain.yaml").write_text("trainer: {max_epochs: 3}\n")
    (tmp_path / "configs" / "half.yaml").write_text("trainer: {precision: bf16-mixed}\ndata: {dataset: cifar100}\n")
    job_file = tmp_path / "jobs.yaml"
    job_file.write_text(
        "- {config: plain, device: cpu, seeds: [0, 1], flags: --epochs  2}\n"
        "- {config: half, device: cpu, seeds: [0]}\n"
        "- {config: plain, device: gpu, seeds: [0]}\n"
    )
    for module in (jobs, record):
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(jobs, "needed_for", lambda precision: "bf16" if precision == "bf16-mixed" else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def save_results(folder, *lines):
    (folder / "results" / "plain.json").write_text(json.dumps(lines))


def result(flags="--epochs 2", seed=0, hardware=CPU, max_epochs=3):
    settings = {"trainer": {"max_epochs": max_epochs}}
    return {"flags": flags, "seed": seed, "data_seed": seed, "hardware": hardware, "settings": settings}


def test_a_run_is_done_by_a_result_of_its_config_flags_seed_and_kind_of_machine_alone(made):
    wanted = read_jobs(made / "jobs.yaml")
    assert [one.seed for one in wanted] == [0, 1, 0, 0]
    others = [result(""), result(seed=2), result(hardware=GPU), result(max_epochs=2)]
    others.append({"who": "ours", "seed": 0, "hardware": CPU})
    save_results(made, *others)
    assert states(wanted, made / "runs")[:2] == ["not begun", "not begun"]
    assert next_run(wanted, states(wanted, made / "runs")) == wanted[0]
    save_results(made, *others, result())
    found = states(wanted, made / "runs")
    assert found[:2] == ["done", "not begun"]
    assert next_run(wanted, found) == Wanted("plain", "cpu", "--epochs 2", 1)


def test_what_this_machine_cannot_run_is_skipped_with_the_reason(made, monkeypatch):
    wanted = read_jobs(made / "jobs.yaml")
    save_results(made, result(), result(seed=1))
    found = states(wanted, made / "runs")
    assert next_run(wanted, found) is None
    assert "bf16" in found[2].removeprefix("skipped: ")
    assert "GPU" in found[3].removeprefix("skipped: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert next_run(wanted, states(wanted, made / "runs")) == wanted[3]


def test_a_run_is_begun_with_its_seed_and_resumed_where_it_has_a_checkpoint(made):
    one, half = Wanted("plain", "cpu", "--epochs 2", 1), Wanted("half", "cpu", "", 0)
    run = one.run_in(made / "runs")
    assert len({str(each.run_in(made)) for each in (one, half, Wanted("plain", "cpu", "", 1))}) == 3
    begun = one.command(run, Path("images"))
    assert begun[:3] == ["fit", "--config", str(made / "configs" / "plain.yaml")]
    assert record.other_flags(begun) == "--epochs 2", "the result must have the flags of the job"
    pairs = dict(zip(begun[1::2], begun[2::2], strict=True))
    assert (pairs["--seed_everything"], pairs["--data.seed"], pairs["--data.root"]) == ("1", "1", "images")
    assert pairs["--run_dir"] == str(run.path)
    assert "images" not in half.command(half.run_in(made), Path("images")), "of another data set"
    run.checkpoints.mkdir(parents=True)
    run.last_checkpoint.touch()
    assert one.command(run, Path("images")) == ["fit", "--resume", str(run.path)]


def test_the_next_run_is_trained_and_recorded_and_a_stop_is_passed_on(made, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jobs", "--jobs", str(made / "jobs.yaml"), "--runs", str(made / "runs")])
    commit_configs(made)
    commands, recorded, statuses = [], [], [143, 0]
    monkeypatch.setattr(jobs, "run_to_end", lambda command: commands.append(command) or statuses.pop(0))
    monkeypatch.setattr(jobs, "add_runs", lambda config, runs, note: recorded.append((config, *runs)))
    with pytest.raises(SystemExit) as stopped:
        jobs.main()
    assert stopped.value.code == 143
    assert recorded == []
    jobs.main()
    assert commands[0] == commands[1]
    assert recorded == [("plain", made / "runs" / "plain-cpu-epochs-2" / "0")]
    monkeypatch.setattr("sys.argv", [*jobs.sys.argv, "--list"])
    capsys.readouterr()
    jobs.main()
    assert len(commands) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 4 ")
    (made / "configs" / "plain.yaml").write_text("trainer: {max_epochs: 9}\n")
    monkeypatch.setattr("sys.argv", jobs.sys.argv[:-1])
    with pytest.raises(SystemExit, match="has changed"):
        jobs.main()
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- {config: missing, device: cpu, seeds: [0]}", "missing"),
        ("- {config: plain, device: tpu, seeds: [0]}", "device"),
        ("- {config: plain, device: cpu, seeds: []}", "seeds"),
        ("- {config: plain, device: cpu, seeds: [-1]}", "seeds"),
        ("- {config: plain, device: cpu, seeds: [0], done: true}", "done"),
        ("- {config: plain, device: cpu, seeds: [1, 1]}", "seed 1"),
        ("- {config: plain, device: cpu, seeds: [0], flags: --seed_everything 3}", "--seed_everything 3"),
        ("- {config: plain, device: cpu, seeds: [0], flags: epochs 3}", "epochs 3"),
        ("- {config: plain, device: cpu, seeds: [0], flags: --model.name 'a}", "--model.name 'a"),
        ("config: plain", "jobs.yaml"),
        ("- {", "jobs.yaml"),
    ],
)
def test_a_wrong_job_file_is_refused_and_the_mistake_named(made, text, named):
    (made / "jobs.yaml").write_text(text)
    with pytest.raises(UserError, match=named) as refused:
        read_jobs(made / "jobs.yaml")
    assert ": :" not in str(refused.value)
    assert "http" not in str(refused.value)


def commit_configs(folder):
    git(folder, "init", "-q")
    git(folder, "add", "configs")
    git(folder, "commit", "-qm", "Configs")
    return git(folder, "rev-parse", "HEAD")


def test_a_recorded_run_keeps_the_settings_of_its_config_at_its_commit(made):
    commit = commit_configs(made)
    (made / "configs" / "plain.yaml").write_text("trainer: {max_epochs: 9}\n")
    assert record.committed_settings(commit, "plain") == {"trainer": {"max_epochs": 3}}
    with pytest.raises(SystemExit, match="no such config"):
        record.committed_settings(commit, "none")


def test_a_run_is_neither_begun_nor_continued_whose_result_would_not_count(made):
    one = Wanted("plain", "cpu", "--epochs 2", 0)
    new, begun = RunFolder(made / "new"), RunFolder(made / "begun")
    begun.checkpoints.mkdir(parents=True)
    begun.last_checkpoint.touch()
    begun.environment.write_text(json.dumps({"commit": commit_configs(made)}))
    for run in (new, begun):
        one.check_settings(run)
    (made / "configs" / "plain.yaml").write_text("trainer: {max_epochs: 9}\n")
    with pytest.raises(SystemExit, match=r"plain\.yaml has changed.*commit it"):
        one.check_settings(new)
    commit_configs(made)
    one.check_settings(new)
    with pytest.raises(SystemExit, match=r"begun: configs/plain\.yaml has changed.*move"):
        one.check_settings(begun)


def test_every_run_that_is_wanted_has_a_row_in_a_table():
    wanted = {run.config for run in read_jobs(jobs.ROOT / "benchmarks" / "jobs.yaml")}
    assert wanted
    assert wanted <= {config for _, config in (*table.ROWS, *table.SPEED_ROWS)}


def test_a_result_tells_another_processor_and_precision_and_no_other_flag_may_change():
    def resumed(**changed):
        return {"epoch": 29, "changed": changed}

    moved = resumed(**{"trainer.precision": "32-true"}) | {"processor_change": "Xeon instead of EPYC"}
    found = record.moves(Path("run"), {"resumed": [resumed(), moved]})
    assert found == ["not bitwise: Xeon instead of EPYC", "32-true from epoch 30 on"]
    assert record.moves(Path("run"), {}) == []
    with pytest.raises(SystemExit):
        record.moves(Path("run"), {"resumed": [moved, resumed(**{"trainer.max_epochs": 200})]})


def test_a_run_that_has_not_ended_is_not_recorded(tmp_path):
    for ended in ({}, {"ended": None}, {"ended": {"by": "signal"}}):
        (tmp_path / "environment.json").write_text(json.dumps(ended))
        with pytest.raises(SystemExit, match="--resume"):
            record.summarize(tmp_path, "plain", "")


def test_a_run_that_was_tested_on_other_images_is_not_recorded(made, monkeypatch):
    kept = [result() | {"commit": "a", "test_sha256": "b", "dataset": "folder"}]
    save_results(made, *kept)
    monkeypatch.setattr(record, "summarize", lambda *_: kept[0] | {"test_sha256": "c"})
    with pytest.raises(SystemExit):
        record.add_runs("plain", [made], "")
    monkeypatch.setattr(record, "summarize", lambda *_: kept[0] | {"seed": 1})
    record.add_runs("plain", [made], "")
    monkeypatch.setattr(record, "summarize", lambda *_: kept[0] | {"seed": 1, "dataset": "cifar10", "test_sha256": "c"})
    record.add_runs("plain", [made], "")  # in the order of the archive
    assert [line["seed"] for line in json.loads((made / "results" / "plain.json").read_text())] == [0, 1]


def test_a_run_of_a_changed_checkout_keeps_settings_that_it_trained_with_alone(made):
    committed, changed = {"trainer": {"max_epochs": 3}}, {"trainer": {"max_epochs": 9, "max_steps": -1}}
    begun = {"commit": commit_configs(made), "dirty": True, "command": ["train.py", "fit", "--data.root", "x"]}
    assert record.trained_settings(begun, "plain", committed) == committed
    assert record.trained_settings({**begun, "dirty": False}, "plain", changed) == committed
    for flags in (["--epochs", "9"], ["--trainer.max_epochs=9"]):
        assert record.trained_settings({**begun, "command": flags}, "plain", changed) == committed
    resumed = [{"changed": {"trainer.max_epochs": 9}}]
    assert record.trained_settings({**begun, "resumed": resumed}, "plain", changed) == committed
    with pytest.raises(SystemExit, match=r"trainer\.max_epochs 9.* 3"):
        record.trained_settings(begun, "plain", changed)
