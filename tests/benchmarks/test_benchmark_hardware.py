"""Results of two machines are never mixed: in a file of one measurement, and against another commit of a peer."""

import argparse
import json
import re
import sys

import pytest
from program import REPO, git

from benchmarks.accuracy import ablations
from benchmarks.hardware import hardware_name, results_file
from benchmarks.speed import (
    guards,
    loader,
    models,
    overhead,
    policies,
    predict,
    shards,
    speedrun,
    startup,
    streaming,
    transforms,
    winograd,
)
from benchmarks.speed.results import write_results
from cifar_lightning import UserError
from cifar_lightning.runs.environment import describe_environment

RUN = {"num_usable_cpus": 2, "cpu": "A", "device": "cpu"}


def test_a_machine_is_named_by_cores_processor_instructions_and_gpu():
    assert hardware_name(RUN) == "2 cores of A, no GPU"
    assert hardware_name(RUN | {"cpu_instructions": "AVX2", "device": "B"}) == "2 cores of A (AVX2), B"
    assert hardware_name().startswith(f"{describe_environment()['num_usable_cpus']} cores of ")


@pytest.fixture
def cores(monkeypatch):
    """The cores that this process may use: 8, and then those that a program restricts it to."""
    cores = list(range(8))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(cores), raising=False)
    monkeypatch.setattr(
        "os.sched_setaffinity", lambda pid, chosen: cores.__setitem__(slice(None), chosen), raising=False
    )
    return cores


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not choose its cores")
@pytest.mark.parametrize("program", [loader, shards, streaming])
def test_a_program_on_two_cores_takes_a_file_of_two_cores(program, cores, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text('{"hardware": "elsewhere"}')
    work = [] if program is loader else ["--work", "x"]
    monkeypatch.setattr("sys.argv", ["program", *work, "--json", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit):
        program.main()
    assert cores == [0, 1]
    assert "this machine is 2 cores of" in capsys.readouterr().err


def test_results_of_another_machine_are_refused_before_anything_is_measured(cores, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    assert results_file(str(path)) == path
    write_results(path, ratios=[1.5])
    found = json.loads(path.read_text())
    assert (found["hardware"], found["ratios"]) == (hardware_name(), [1.5])
    assert results_file(str(path)) == path
    for content in ({"hardware": "elsewhere"}, [{"hardware": hardware_name()}, {"hardware": "elsewhere"}], {}, 1):
        path.write_text(json.dumps(content))
        with pytest.raises(argparse.ArgumentTypeError, match="elsewhere" if "elsewhere" in str(content) else "results"):
            results_file(str(path))
    path.write_text('{"hardware": "elsewhere"}')
    measure = (guards, loader, models, overhead, policies, predict, shards, startup, streaming, transforms, winograd)
    for program in (ablations, *measure):
        needed = ["--data", "x"] if program is ablations else ["--work", "x"] if program in (shards, streaming) else []
        monkeypatch.setattr("sys.argv", ["program", *needed, "--json", str(path)])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 2, program


def test_every_results_file_names_its_machine():
    kept_apart = {"insight_rates", "own_code"}  # no speed in them
    for path in (REPO / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        for line in content if isinstance(content, list) else [content]:
            assert path.stem in kept_apart or re.fullmatch(r"\d+ cores of .+, .+", line["hardware"]), path


def test_a_peer_of_another_commit_than_the_results_is_refused_and_named(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(speedrun, "hardware_name", lambda: "here")
    line = {"who": "airbench", "hardware": "here", "commit": commit}
    other, peers = {**line, "commit": "f1c599c"}, {"airbench": tmp_path}
    assert speedrun.other_versions([line, {**other, "hardware": "elsewhere"}, {**other, "who": "ours"}], peers) == ""
    message = speedrun.other_versions([line, other], peers)
    assert commit in message
    assert "f1c599c" in message
    with pytest.raises(UserError, match=commit):
        loader.changed_for_cpu("airbench", tmp_path, "", {"device": "cpu"})
