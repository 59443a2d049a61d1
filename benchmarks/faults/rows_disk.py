"""Rows 4 to 6, 32, 35 and 36: full disks, folders that cannot be written, two runs in one folder, odd paths."""

import os
import shutil
from pathlib import Path

from benchmarks.faults.bench import Trial, kill_group, row, wait_for
from benchmarks.faults.images import small_set
from benchmarks.faults.judge import load
from benchmarks.faults.mounts import fill, small_disk, without_privileges


@row(4, "disk full where checkpoints go")
def full_disk(trial: Trial) -> str:
    """The disk fills up after the first checkpoint of a long run."""
    with small_disk(trial.place / "disk", "8m") as disk:
        out = disk / "run"
        process = trial.bench.start(trial.bench.fit(out, epochs=40), cwd=trial.place)
        last = trial.subject.last(out)
        if not wait_for(last.exists, process):
            raise RuntimeError(f"no checkpoint: {trial.bench.wait(process).stderr.strip()[-200:]}")
        fill(disk)
        done = trial.bench.wait(process)
        trial.reported("the run", done, "space", status=1)
        loadable = []
        for path in trial.subject.checkpoints(out).glob("*.ckpt"):
            try:
                loadable.append(load(path)["global_step"])
            except Exception:  # torch raises many types
                trial.kept(False, f"{path.name} is broken")
        trial.kept(bool(loadable), "no checkpoint is left")
        return f"exit 1, named; {len(loadable)} checkpoints intact"


@row(5, "disk full in TMPDIR")
def full_tmpdir(trial: Trial) -> str:
    """TMPDIR is full from the start of the run."""
    with small_disk(trial.place / "disk", "64k") as disk:
        fill(disk)
        out = trial.place / "run"
        done = trial.fit(out, env={"TMPDIR": str(disk)})
        if done.status == 0:
            trial.ended_like_the_reference("with a full TMPDIR", out)
            return "training is not affected: bitwise equal"
        trial.reported("with a full TMPDIR", done, "space")
        return "a clear error"


@row(6, "checkpoint folder not writable (not root)")
def unwritable(trial: Trial) -> str:
    """The folder of a new run and the checkpoints of a resumed one; nothing may be trained."""
    prefix = without_privileges()
    locked = trial.place / "locked"
    if trial.subject.is_plain:
        locked.mkdir()
        arguments = {"a new run": trial.bench.fit(locked)}
    else:
        run = trial.killed(trial.place / "run")
        (run / "checkpoints").chmod(0o555)
        locked.mkdir()
        arguments = {"a new run": trial.bench.fit(locked / "run"), "resume": trial.bench.resume(run)}
    locked.chmod(0o555)
    for what, command in arguments.items():
        notes = trial.place / f"notes {what}"
        notes.mkdir()
        done = trial.run(command, acts="note@batch:0", env={"FAULT_NOTES": str(notes)}, prefix=prefix)
        trial.reported(what, done, "locked" if what == "a new run" else "checkpoints")
        trial.expect(not list(notes.iterdir()), f"{what}: a step was trained before")
    return f"{' and '.join(arguments)}: refused before step 1"


@row(32, "two runs into one folder")
def two_in_one(trial: Trial) -> str:
    """A second fit, and a resume, while the first one trains."""
    out = trial.place / "run"
    process = trial.bench.start(trial.bench.fit(out, epochs=200), cwd=trial.place)
    try:
        if not wait_for(trial.subject.last(out).exists, process):
            raise RuntimeError("the first run did not start")
        seconds = {"fit": trial.bench.fit(out, epochs=1)}
        if not trial.subject.is_plain:
            seconds["resume"] = trial.bench.resume(out)
        for what, command in seconds.items():
            done = trial.run(command)
            if trial.subject.is_plain:
                trial.reported(what, done, "run")
            else:
                names = {"fit": ("--run_dir", "--resume"), "resume": (str(process.pid),)}[what]
                trial.reported(what, done, *names, status=2)
        trial.expect(process.poll() is None, "the first run ended")
    finally:
        kill_group(process)
    return "the second is refused, the first continues"


@row(35, "spaces, umlauts, non-UTF-8 in paths")
def odd_paths(trial: Trial) -> str:
    """In paths of images, classes and run folder; compared with the same run with ASCII paths."""
    odd_names = ("ant ä", b"bee \xff", "cat 中")
    data = small_set(trial.place / "data")
    odd_place = os.fsencode(trial.place) + b"/M\xfcll \xc3\xa4 \xf0\x9f\x90\x88"
    try:
        odd_data = small_set(Path(os.fsdecode(odd_place + b"/Bilder \xff")), odd_names)
    except OSError:  # the file system accepts UTF-8 only
        odd_place = os.fsencode(trial.place / "Müll 🐈")
        odd_data = small_set(Path(os.fsdecode(odd_place + b"/Bilder")), ("ant ä", "bee ö", "cat 中"))
    odd_image = next((odd_data / "train").iterdir()) / "00.png"
    settings = {"epochs": 1, "batch_size": 18, "workers": 2, "every": 2}
    out, odd_out = trial.place / "run", Path(os.fsdecode(odd_place + b"/run \xff"))
    for what, images, folder in (("plain paths", data, out), ("odd paths", odd_data, odd_out)):
        command = [os.fsencode(str(part)) for part in trial.subject.fit(images, folder, **settings)]
        trial.worked(what, trial.run(command))
    one, other = (load(trial.subject.last(folder))["state_dict"] for folder in (out, odd_out))
    trial.expect(all(one[name].equal(other[name]) for name in one), "the weights differ from those with plain paths")
    if not trial.subject.is_plain:
        run = os.fsencode(odd_out)
        trial.worked("analyze", trial.run(["analyze", run]))
        trial.worked("predict-images", trial.run(["predict-images", run, os.fsencode(odd_image), "--output", "-"]))
        trial.worked("resume", trial.run(["fit", "--resume", run, "--epochs", "2"]))
    what = "fit works" if trial.subject.is_plain else "fit, analyze, predict-images and resume work"
    return f"{what}; weights equal those with plain paths"


@row(36, "read-only data folder", plain=False)
def read_only_data(trial: Trial) -> str:
    """With a cache elsewhere, and without any."""
    prefix = without_privileges()
    data, no_cache = small_set(trial.place / "data"), trial.place / "no_cache"
    no_cache.mkdir()
    folders = [path for path in (data, *data.rglob("*")) if path.is_dir()]
    settings = {"epochs": 1, "batch_size": 18, "workers": 0}
    writable = Path(shutil.copytree(data, trial.place / "writable"))
    trial.worked("writable", trial.run(trial.subject.fit(writable, trial.place / "run", **settings)))
    for folder in (*folders, no_cache):
        folder.chmod(0o555)
    try:
        ways = {
            "elsewhere": (trial.place / "cache", str(trial.place / "cache")),
            "none": (no_cache, "CIFAR_LIGHTNING_CACHE"),
        }
        for what, (cache, name) in ways.items():
            out = trial.place / f"run_{what}"
            env = {"CIFAR_LIGHTNING_CACHE": str(cache)}
            done = trial.run(trial.subject.fit(data, out, **settings), env=env, prefix=prefix)
            if trial.worked(f"cache {what}", done):
                trial.expect(name in done.stdout + done.stderr, f"cache {what}: {name} is not reported")
                one, other = (load(trial.subject.last(run))["state_dict"] for run in (out, trial.place / "run"))
                trial.expect(all(one[name].equal(other[name]) for name in one), f"cache {what}: other weights")
        trial.expect(not (data / ".cifar_lightning_cache").exists(), "a cache in the read-only folder")
    finally:
        for folder in (*folders, no_cache):
            folder.chmod(0o755)
    return "trains with a cache elsewhere and without any, reports which; the same weights"
