"""What `benchmarks/speed/speedrun.py` relies on: peers that are what is expected, and a clock whose windows fit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from fitting import NARROW, quiet_trainer, small_data
from program import REPO, git

from benchmarks.accuracy.record import comparable
from benchmarks.hardware import hardware_name
from benchmarks.speed import speedrun, speedrun_peers
from benchmarks.speed.peers import commit_of
from benchmarks.speed.speedrun_clock import Clock
from benchmarks.speed.speedrun_peers import PEERS, load
from cifar_lightning import ImageClassifier, UserError


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", None)
    monkeypatch.setattr(torch.cuda, "synchronize", None)


def test_a_peer_that_is_missing_or_of_another_version_is_refused(tmp_path, without_gpu):
    with pytest.raises(UserError, match=r"airbench94_muon\.py: No such file"):
        load("airbench", tmp_path)
    (tmp_path / "airbench94_muon.py").write_text("import torch\n")
    with pytest.raises(UserError, match="another version"):
        load("airbench", tmp_path)
    (tmp_path / "cifar10_speedrun.py").touch()
    with pytest.raises(UserError, match="a GPU alone"):
        load("hiverge", tmp_path)


def test_a_changed_checkout_of_a_peer_is_another_version(tmp_path):
    assert commit_of(tmp_path) is None
    (tmp_path / "airbench94_muon.py").write_text("lr = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Peer")
    git(tmp_path, "tag", "-a", "v1", "-m", "A version")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit
    (tmp_path / "airbench94_muon.py").write_text("lr = 2\n")
    assert commit_of(tmp_path) == f"{commit}-dirty"
    assert "changed files" in speedrun.other_versions([], {"airbench": tmp_path})
    git(tmp_path, "checkout", "-q", ".")
    lines = [{"who": "airbench", "commit": "of another version", "hardware": hardware_name()}]
    assert speedrun.other_versions([], {"airbench": tmp_path}) == ""
    assert speedrun.other_versions(lines, {"airbench": tmp_path})


def test_a_peer_is_put_on_the_cpu_by_the_listed_changes_alone(tmp_path, without_gpu, monkeypatch):
    monkeypatch.setattr("sys.argv", ["speedrun"])
    changes = PEERS["airbench"].on_cpu
    text = "TEXT = r'''" + "\n".join(changes) + "'''"
    (tmp_path / "airbench94_muon.py").write_text(f"{text}\nNAME = __name__\nif __name__ == '__main__':\n    1 / 0\n")
    names = load("airbench", tmp_path)
    assert names["NAME"] == "peer"
    assert names["TEXT"] == "\n".join(changes.values())
    assert torch.cuda.synchronize() is None
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    end.record()
    assert begin.elapsed_time(end) >= 0


def test_steps_are_counted_after_warming_up_on_a_gpu(tmp_path, monkeypatch):
    torch.save(dict.fromkeys(("train_images", "train_labels", "test_images", "test_labels")), tmp_path / "images.pt")
    begun = []

    class Loader:
        def __iter__(self):
            return iter(range(8))

    def main(run, model):
        begun.append(run)
        assert list(Loader()) == list(range(8))

    inner = SimpleNamespace(compile=lambda **_: None)
    inner.to = lambda **_: inner
    names = {"CifarNet": lambda: inner, "CifarLoader": Loader, "main": main}
    monkeypatch.setattr(speedrun_peers, "load", lambda *_: names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(waits)))
    (found,) = speedrun_peers.run("airbench", tmp_path, tmp_path / "images.pt", [0], 5)
    assert begun == ["warmup", "run"]
    assert len(found["step_s"]) == 5
    assert len(waits) == 2, "before the first step that is counted and after the last"


def test_the_clocks_windows_hold_each_other(tmp_path):
    clock = Clock(str(tmp_path / "clock.json"))
    module, data = ImageClassifier(image_size=16, lr=0.01, model_kwargs=NARROW), small_data()
    run = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[clock])
    run.fit(module, data)
    run.test(module, data, verbose=False)
    figures = json.loads((tmp_path / "clock.json").read_text())
    assert len(figures["train_s"]) == 2
    assert sum(figures["train_s"]) + figures["evaluate_s"] <= figures["seconds"]
    assert figures["seconds"] - figures["evaluate_s"] <= figures["fit_s"]


def test_only_runs_of_a_recipe_as_it_is_now_are_put_together():
    settings = yaml.safe_load((REPO / "configs" / "speedrun94.yaml").read_text(encoding="utf-8"))
    where = {"recipe": "speedrun94", "precision": "32-true", "hardware": "here", "seed": 0}
    ours = {**where, "who": "ours", "accuracy": 0.9, "settings": settings}
    earlier = {**ours, "settings": {**settings, "trainer": {"max_epochs": 3}}}
    peer = {**where, "who": "airbench", "accuracy": 0.9}
    repeated = {**ours, "accuracy": 0.8}
    lines = [repeated, ours, earlier, peer, {**ours, "recipe": "speedrun95"}, {"who": "epochs in turn"}]
    assert comparable(lines, "speedrun94") == [ours, peer]


def test_times_are_compared_for_each_precision_apart_and_on_this_machine_alone(capsys, monkeypatch):
    monkeypatch.setattr(speedrun, "hardware_name", lambda: "here")

    def run(who, precision, seconds, hardware="here"):
        return {"who": who, "precision": precision, "seconds": seconds, "accuracy": 0.94, "hardware": hardware}

    lines = [run("ours", "32-true", 80), run("airbench", "32-true", 100), run("airbench", "32-true", 1, "elsewhere")]
    lines += [run("ours", "bf16-mixed", 40), run("ours", "bf16-mixed", 60)]
    speedrun.summarize(lines, {"airbench": Path("checkout")})
    printed = capsys.readouterr().out.splitlines()
    assert "ours, bf16-mixed: 94.00 % (± 0.00, n=2), 50 s (median)" in printed
    assert [line for line in printed if line.startswith("ratio=")] == ["ratio=0.800", "ratio=0.500"]
    assert printed[-1] == "ratio=0.500"
