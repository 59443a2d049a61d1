"""Rows 1 to 3, 7 to 9 and 14: a run is killed or stopped by a signal and resumed in a new process."""

import random
import shutil
from pathlib import Path

from benchmarks.faults.bench import Trial, kill_group, row, wait_for
from benchmarks.faults.judge import last_resume, load
from benchmarks.faults.mounts import other_file_system

_SEED = 5
# Where a process is killed while it writes a checkpoint; the numbers select writes of the second epoch.
_IN_A_WRITE = {
    "in the middle of its bytes": "SIGKILL@write:8",
    "before it is flushed": "SIGKILL@fsync:8",
    "before it is renamed": "SIGKILL@replace:16",
    "while it is renamed": "SIGKILL@replaced:17",
}
_STEPS_PER_EPOCH = 30
_LEAST_STEP = 35  # the checkpoint before the one that is written there


@row(1, "SIGKILL at random steps, new process, 2 workers")
def killed_at_random(trial: Trial) -> str:
    """Kill the whole process group at random moments between the first and the last checkpoint."""
    bench = trial.bench
    rng, reference = random.Random(_SEED), trial.bench.reference
    moments = [rng.uniform(0, 0.95 * reference.training_s) for _ in range(bench.kills)]
    num_equal = num_inside = 0
    for number, moment_s in enumerate(moments):
        place = trial.place / str(number)
        out = place / "run"
        _kill_after(trial, out, moment_s)
        done = bench.run(bench.resume(out), cwd=place)
        if not trial.subject.is_plain:
            num_inside += last_resume(out).get("step", 0) % _STEPS_PER_EPOCH != 0
        if done.status != 0:
            trial.kept(False, f"resume ended with {done.status} ({done.stderr.strip()[-120:]})")
        elif trial.ended_like_the_reference(f"killed after {moment_s:.2f} s", out):
            num_equal += 1
        shutil.rmtree(place)
    inside = "" if trial.subject.is_plain else f", {num_inside} resumed inside an epoch"
    return f"{num_equal} of {len(moments)} equal{inside}"


def _kill_after(trial: Trial, out: Path, moment_s: float) -> None:
    """Start a training and kill it some seconds after its first checkpoint."""
    process = trial.bench.start(trial.bench.fit(out), cwd=out.parent)
    if not wait_for(trial.subject.last(out).exists, process):
        raise RuntimeError(f"no checkpoint: {trial.bench.wait(process).stderr.strip()[-200:]}")
    wait_for(lambda: False, process, timeout_s=moment_s)
    kill_group(process)


@row(2, "SIGKILL while a checkpoint is written")
def killed_in_a_write(trial: Trial) -> str:
    """Kill at each stage of a write."""
    return _kill_in_writes(trial, _IN_A_WRITE)


@row(3, "the same with TMPDIR on another filesystem")
def killed_in_a_write_elsewhere(trial: Trial) -> str:
    """The same where a rename from TMPDIR would be a copy."""
    with other_file_system(trial.place) as tmpdir:
        places = {name: acts for name, acts in _IN_A_WRITE.items() if "flushed" not in name}
        return _kill_in_writes(trial, places, TMPDIR=str(tmpdir))


def _kill_in_writes(trial: Trial, places: dict[str, str], **env: str) -> str:
    reached = []
    for number, (name, acts) in enumerate(places.items()):
        out = trial.place / f"run{number}"
        if trial.subject.is_plain:  # it writes two files each time, the second is last.ckpt
            acts = f"{acts.partition(':')[0]}:9"
        done = trial.fit(out, acts=acts, env=env)
        if done.status >= 0:
            if trial.subject.is_plain:
                continue  # it never flushes
            raise RuntimeError(f"{acts} was not reached: {done.stderr.strip()[-200:]}")
        reached.append(name)
        trial.kept(_num_loadable(trial, out) > 0, f"killed {name}: no checkpoint loads")
        resumed = trial.resume(out, env=env)
        if trial.worked(f"killed {name}, resume", resumed):
            if not trial.subject.is_plain:
                trial.ended_like_the_reference(f"killed {name}", out)
                step = last_resume(out).get("step", 0)
                trial.kept(
                    step >= _LEAST_STEP, f"killed {name}: resumed at step {step}, more than one interval is lost"
                )
            else:
                steps = [load(trial.subject.last(run))["global_step"] for run in (out, trial.bench.reference.out)]
                trial.kept(steps[0] == steps[1], f"killed {name}: ended after {steps[0]} steps, not {steps[1]}")
    return f"{len(reached)} places: {', '.join(reached)}"


def _num_loadable(trial: Trial, out: Path) -> int:
    """Count the checkpoints that a run can resume from."""
    num = 0
    for path in trial.subject.checkpoints(out).glob("*.ckpt"):
        try:
            load(path)
        except Exception:  # torch raises many types
            continue
        num += 1
    return num


@row(7, "SIGTERM in an epoch")
def terminated_in_an_epoch(trial: Trial) -> str:
    """To the process alone, as Docker does, and to its whole group, as SLURM and systemd do."""
    for what, acts in (("to the process", "SIGTERM@train:47"), ("to its group", "group-SIGTERM@train:52")):
        _stopped_and_resumed(trial, what, acts, 143)
    return "exit 143 to the process and to its group; resumed bitwise"


@row(8, "SIGTERM during validation")
def terminated_in_validation(trial: Trial) -> str:
    """In the middle of the second epoch's validation."""
    _stopped_and_resumed(trial, "in validation", "SIGTERM@val:8", 143)
    return "exit 143, resumed bitwise"


@row(9, "Ctrl-C inside a batch")
def interrupted_inside_a_batch(trial: Trial) -> str:
    """A terminal sends Ctrl-C to the whole process group."""
    _stopped_and_resumed(trial, "Ctrl-C", "group-SIGINT@train:47", 130)
    return "exit 130, no batch skipped: resumed bitwise"


def _stopped_and_resumed(trial: Trial, what: str, acts: str, status: int) -> None:
    out = trial.place / acts.partition("@")[0]
    done = trial.fit(out, acts=acts)
    trial.expect(done.status == status, f"{what}: exit status {done.status} and not {status}")
    if not trial.subject.is_plain:
        lines = (done.stdout + done.stderr).splitlines()
        trial.expect(any("--resume" in line for line in lines), f"{what}: --resume is not named")
        trial.expect("Traceback" not in done.stderr, f"{what}: a traceback")
    if not trial.kept(trial.subject.last(out).exists(), f"{what}: no checkpoint"):
        return
    step = load(trial.subject.last(out))["global_step"]
    expected = _steps_at(acts)
    trial.kept(step in expected, f"{what}: saved after step {step}, not {expected[0]}")
    if trial.worked(f"{what}, resume", trial.resume(out)):
        trial.ended_like_the_reference(what, out)


def _steps_at(acts: str) -> tuple[int, ...]:
    """Return the steps at which a run stopped there may save: the running batch is finished, no more."""
    where, _, number = acts.partition("@")[2].partition(":")
    return (30, 60) if where == "val" else (int(number) + 1,)


@row(14, "control: random states not restored", plain=False)
def without_the_random_states(trial: Trial) -> str:
    """The same killed run, resumed with and without its random states."""
    killed = trial.killed(trial.place / "killed")
    equal, other = (Path(shutil.copytree(killed, trial.place / name)) for name in ("equal", "other"))
    trial.worked("resume", trial.resume(equal))
    trial.worked("resume without the random states", trial.resume(other, acts="no-rng@start"))
    fault = trial.bench.difference(equal)
    trial.expect(not fault, f"with the random states: {fault}")
    trial.expect(bool(trial.bench.difference(other)), "without the random states: equal, so row 1 shows nothing")
    return "equal with them, different without"
