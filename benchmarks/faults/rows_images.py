"""Rows 22 to 25, 37 and 42 to 46: faulty class folders and images, and outdated caches."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.bench import Trial, row, wait_for
from benchmarks.faults.images import (
    bomb,
    damaged_fax,
    damaged_images,
    encoded,
    nested_eps,
    odd_images,
    recorded_ghostscript,
    small_set,
)
from benchmarks.faults.judge import Done, load
from benchmarks.speed.process_memory import memory_of

_SETTINGS = {"epochs": 1, "batch_size": 18, "workers": 0}
_MORE_MB = 300  # of memory for images of a million pixels: 24 MB as RGB, and room for chance
_CACHE = Path(".cifar_lightning_cache", "train-16.npy")


def _fit(trial: Trial, data: Path, name: str = "run") -> Done:
    return trial.run(trial.subject.fit(data, trial.place / f"{name}_{data.name}", **_SETTINGS))


@row(22, "missing, extra, empty or hidden class folders")
def class_folders(trial: Trial) -> str:
    """One at a time; the class that differs must be named, hidden folders are ignored."""
    good, sets = small_set(trial.place / "good"), {}
    for fault in ("missing", "extra", "empty", "hidden"):
        sets[fault] = Path(shutil.copytree(good, trial.place / fault))
    shutil.rmtree(sets["missing"] / "test" / "bee")
    shutil.copytree(good / "test" / "bee", sets["extra"] / "test" / "dog")
    for path in (sets["empty"] / "train" / "cat").iterdir():
        path.unlink()
    shutil.copytree(good / "train" / "bee", sets["hidden"] / "train" / ".ipynb_checkpoints")
    for fault, name in (("missing", "bee"), ("extra", "dog"), ("empty", "cat")):
        trial.reported(fault, _fit(trial, sets[fault]), name)
    done = _fit(trial, sets["hidden"])
    if trial.worked("hidden", done):
        last = load(trial.subject.last(trial.place / "run_hidden"))
        classes = [len(value) for name, value in last["state_dict"].items() if name.endswith("bias")][-1]
        trial.expect(classes == 3, f"hidden: {classes} classes and not 3")
    return "missing, extra and empty are named, hidden is ignored"


@row(23, "images: zero bytes, text, truncated PNG/JPEG, flipped byte")
def damaged(trial: Trial) -> str:
    """All at once: one is named, all are counted and listed in a file."""
    data, bad = small_set(trial.place / "data"), damaged_images()
    for name, content in bad.items():
        (data / "train" / "bee" / name).write_bytes(content)
    done = _fit(trial, data)
    trial.reported("all at once", done, "train/bee/bad_", f"{len(bad)} of {60 + len(bad)}")
    listed = [path.read_text() for path in data.rglob("unreadable.jsonl")]
    trial.expect(bool(listed) and all(name in listed[0] for name in bad), "not all of them are listed")
    return f"one named, {len(bad)} of {60 + len(bad)} counted, all listed"


@row(24, "gray, RGBA, palette, CMYK, 16-bit, other sizes")
def odd(trial: Trial) -> str:
    """Images must be converted as documented; floating-point images are refused."""
    data, images = small_set(trial.place / "data"), odd_images()
    for name, (content, _) in images.items():
        (data / "train" / "bee" / name).write_bytes(content)
    if trial.worked("converted", _fit(trial, data)) and not trial.subject.is_plain:
        names = sorted(path.name for path in (data / "train" / "bee").iterdir())
        decoded = np.load(data / _CACHE)[20 : 20 + len(names)].astype(int)
        for name, (_, rgb) in images.items():
            pixels = decoded[names.index(name)]
            trial.expect(np.abs(pixels - rgb).max() <= 3, f"{name} became {pixels[0, 0].tolist()}, not {list(rgb)}")
    if trial.subject.is_plain:
        _check_as_torchvision_reads(trial, data, images)
    (data / "train" / "bee" / "odd_float.tif").write_bytes(encoded(Image.new("F", (16, 16), 0.5), "TIFF"))
    trial.refused("floating point", _fit(trial, data, "float"), "odd_float.tif")
    return f"{len(images)} kinds converted as documented, floating point refused"


def _check_as_torchvision_reads(trial: Trial, data: Path, images: dict) -> None:
    from torchvision.datasets.folder import default_loader

    for name, (_, rgb) in images.items():
        pixels = np.asarray(default_loader(str(data / "train" / "bee" / name))).astype(int)
        trial.expect(np.abs(pixels - rgb).max() <= 3, f"{name} became {pixels[0, 0].tolist()}, not {list(rgb)}")


@row(25, "decompression bomb")
def decompression_bomb(trial: Trial) -> str:
    """A small file with 400 million pixels."""
    data = small_set(trial.place / "data")
    (data / "train" / "bee" / "bomb.png").write_bytes(bomb())
    trial.refused("the bomb", _fit(trial, data), "bomb.png")
    return "refused, file named"


@row(37, "cached images older than the folder, or cache cut short", plain=False)
def old_cache(trial: Trial) -> str:
    """The training must equal that without a cache."""
    data = small_set(trial.place / "data")
    trial.worked("first start", _fit(trial, data, "first"))
    image = data / "train" / "ant" / "07.png"
    image.write_bytes(encoded(Image.new("RGB", (16, 16), (1, 2, 3))))
    done = _fit(trial, data, "older")
    trial.expect(_CACHE.name in done.stdout, "older: the cache is not reported")
    trial.expect(np.load(data / _CACHE)[7, 0, 0].tolist() == [1, 2, 3], "older: the cache was not rebuilt")
    cache = data / _CACHE
    whole = cache.read_bytes()
    cache.write_bytes(whole[: len(whole) // 2])
    done = _fit(trial, data, "cut")
    trial.expect(_CACHE.name in done.stdout, "cut short: the cache is not reported")
    trial.expect(cache.read_bytes() == whole, "cut short: the cache was not rebuilt")
    one, other = (load(trial.subject.last(trial.place / f"{name}_data"))["state_dict"] for name in ("older", "cut"))
    trial.expect(all(one[name].equal(other[name]) for name in one), "the weights differ")
    return "detected, reported and rebuilt"


@row(42, "images of extreme aspect, 1,000,000 x 1")
def extreme_aspect(trial: Trial) -> str:
    """Training with them must take little more memory than without."""
    data = small_set(trial.place / "data")
    without = _peak_mb(trial, data, "without")
    for name, size in (("wide", (1_000_000, 1)), ("tall", (1, 1_000_000))):
        Image.new("L", size, 90).save(data / "train" / "bee" / f"{name}.png")
    more = _peak_mb(trial, data, "with") - without
    trial.expect(more < _MORE_MB, f"{more:,.0f} MB more than without them")
    return f"{max(0, more):.0f} MB more than without them"


def _peak_mb(trial: Trial, data: Path, name: str) -> float:
    """Train; return the most memory that the program and its workers took together."""
    process = trial.bench.start(
        trial.subject.fit(data, trial.place / name, **_SETTINGS), cwd=trial.place / f"in_{name}"
    )
    most = 0.0

    def sample() -> bool:
        nonlocal most
        with suppress(OSError):  # one has ended
            pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
            most = max(most, memory_of([pid for pid in pids if os.getpgid(pid) == process.pid]).total_mb)
        return False

    wait_for(sample, process, poll_s=0.02)  # a look takes 5 ms, filling 300 MB more than 20
    trial.worked(name, trial.bench.wait(process))
    return most


@row(43, "an image that holds a program's language: EPS in IPTC")
def nested_program(trial: Trial) -> str:
    """A recording `gs` is the first in PATH; it must not be started."""
    env, calls = recorded_ghostscript(trial.place)
    data = small_set(trial.place / "data")
    (data / "train" / "bee" / "bad_nested.jpg").write_bytes(nested_eps())
    done = trial.run(trial.subject.fit(data, trial.place / "run", **_SETTINGS), env=env)
    trial.refused("EPS in IPTC", done, "bad_nested.jpg")
    trial.expect(not calls.exists(), "Ghostscript was started")
    return "nothing started, file named"


@row(44, "a damaged image that a C library reports by a message alone")
def only_a_message(trial: Trial) -> str:
    """A group-4 TIFF, for which libtiff prints an error and Pillow returns pixels."""
    data = small_set(trial.place / "data")
    (data / "train" / "bee" / "bad_fax.tif").write_bytes(damaged_fax())
    trial.refused("group-4 TIFF", _fit(trial, data), "bad_fax.tif")
    return "refused, file named"


@row(45, "labels exchanged under an unchanged-looking cache", plain=False)
def exchanged_labels(trial: Trial) -> str:
    """Two class folders exchange their names; sizes and times are kept. The labels must follow, also in a resume."""
    data = small_set(trial.place / "data")
    for path in data.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(1000, b"\0"))  # of one size, as in a set of raw images
        os.utime(path, (1, 1))
    trial.worked("first start", _fit(trial, data, "first"))
    before = np.load(data / _CACHE)
    for split in ("train", "test"):
        ant, bee, aside = (data / split / name for name in ("ant", "bee", "aside"))
        ant.rename(aside)
        bee.rename(ant)
        aside.rename(bee)
    first = trial.place / "first_data"
    more = trial.run([*trial.subject.resume(data, first), "--epochs", 2])
    trial.reported("resume", more, "not the images")
    trial.worked("exchanged", _fit(trial, data, "exchanged"))
    after = np.load(data / _CACHE)
    trial.expect(np.array_equal(after[:20], before[20:40]), "the cached images have their old labels")
    return "noticed: decoded again, and the resume is refused"


@row(46, "test images that are training images, and images with two labels")
def leaked_images(trial: Trial) -> str:
    """A third of the test images are in train, one of them in another class: counted at the start and in the report."""
    data = small_set(trial.place / "data")
    for path in (data / "train" / "ant").glob("0[0-3].png"):
        shutil.copyfile(path, data / "test" / "ant" / path.name)
    shutil.copyfile(data / "train" / "ant" / "04.png", data / "test" / "bee" / "04.png")
    own = {} if trial.subject.is_plain else {"extra": ("--data.val_fraction", 0)}  # no leaked image is held out
    done = trial.run(trial.subject.fit(data, trial.place / "run_data", **_SETTINGS, **own))
    trial.worked("leaked", done)
    trial.expect("5 of 15 test images" in done.stdout + done.stderr, "the number of test images in train is not said")
    if not trial.subject.is_plain:
        report = (trial.place / "run_data" / "report.html").read_text(encoding="utf-8")
        trial.expect("5 of 15 test images" in report, "the report does not say it")
        trial.expect("another label" in done.stdout, "the image with two labels is not said")
    return "counted on the terminal and in the report"
