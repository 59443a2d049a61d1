"""The streaming benchmark varies images as it says, compares finished batches, and counts shared memory once."""

import json
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from program import REPO, start

from benchmarks.speed.process_memory import IS_KNOWN, memory_of
from benchmarks.speed.streaming import Way, compare, epochs_until_ahead
from benchmarks.speed.streaming_images import NUM_VARIANTS, SIDES_PX, _vary, make_images
from cifar_lightning.errors import UserError

needs_proc = pytest.mark.skipif(not IS_KNOWN, reason="memory is read from Linux's /proc")


def test_the_variants_of_a_image_are_itself_its_mirror_a_brighter_and_a_shifted_one():
    pixels = np.random.default_rng(0).integers(20, 180, (32, 32, 3), dtype=np.uint8)
    kinds = range(NUM_VARIANTS)
    same, mirrored, brighter, shifted = (
        np.asarray(_vary(Image.fromarray(pixels), kind, np.random.default_rng(3))).astype(int) for kind in kinds
    )
    assert (same == pixels).all()
    assert (mirrored == pixels[:, ::-1]).all()
    assert np.abs(brighter - 1.3 * pixels).max() <= 1
    x, y = np.random.default_rng(3).integers(-4, 4, 2, endpoint=True)
    assert (x, y) != (0, 0)
    rows, columns = (slice(max(0, -by), 32 - max(0, by)) for by in (y, x))
    moved_rows, moved_columns = (slice(max(0, by), 32 + min(0, by)) for by in (y, x))
    assert (shifted[rows, columns] == pixels[moved_rows, moved_columns]).all()


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_images_are_written_once_and_another_set_is_never_mixed_into_them(tmp_path):
    root = make_images(tmp_path / "work", None, 40)
    files = sorted((root / "train").rglob("*.*"))
    assert len(files) == 40
    assert {path.suffix for path in files} == {".png", ".jpg"}
    sides = {side for path in files for side in size_of(path)}
    assert SIDES_PX[0] <= min(sides) < max(sides) <= SIDES_PX[1]
    assert len(sides) > 10
    assert all(len(list(folder.iterdir())) == 4 for folder in (root / "test").iterdir())
    written = [path.stat().st_mtime_ns for path in files]
    assert make_images(tmp_path / "work", None, 40) == root
    assert [path.stat().st_mtime_ns for path in files] == written
    with pytest.raises(UserError, match="other images"):
        make_images(tmp_path / "work", None, 80)
    of_files = make_images(tmp_path / "of_files", root, 80)
    assert len(list((of_files / "train").rglob("*.*"))) == 80
    assert sorted(path.name for path in (of_files / "train").iterdir()) == sorted(
        path.name for path in (root / "train").iterdir()
    )


def test_a_writing_that_was_cut_off_is_done_again(tmp_path):
    root = make_images(tmp_path, None, 40)
    note = tmp_path / "images.json"
    note.write_text(note.read_text().replace("true", "false"))
    lost = next((root / "train").rglob("*.png"))
    lost.unlink()
    make_images(tmp_path, None, 40)
    assert lost.is_file()


@pytest.mark.parametrize(("num", "named"), [(42, "multiple of 4"), (36, "40 or more"), (0, "40 or more")])
def test_a_number_that_makes_no_set_is_refused(num, named, tmp_path):
    with pytest.raises(UserError, match=named):
        make_images(tmp_path, None, num)
    assert list(tmp_path.iterdir()) == []


def test_the_ways_take_turns_and_a_round_begins_after_the_queue_is_used_up():
    taken = []
    ways = {name: Way(map(taken.append, [name] * 1000), 5, []) for name in ("ours", "torchvision")}
    rates = compare(ways, {"ours": 6, "torchvision": 2}, batch_size=10, rounds=2, pause_s=0)
    assert taken == (["ours"] * (8 + 6) + ["torchvision"] * (8 + 2)) * 2
    assert {name: len(values) for name, values in rates.items()} == {"ours": 2, "torchvision": 2}


def test_the_first_decoding_pays_after_as_many_epochs_as_its_time_is_saved():
    assert epochs_until_ahead(30, 1000, ours=100, peer=50) == 3  # 10 s an epoch against 20
    assert epochs_until_ahead(30, 1000, ours=50, peer=100) == float("inf")


@needs_proc
def test_memory_counts_a_files_pages_apart_and_pages_of_two_processes_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(64_000_000))
    before = memory_of([os.getpid()])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        code = "import mmap; f = open('file', 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)"
        code += "; print(sum(m[::4096]), flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, **pipes) as other:
            assert other.stdout.readline() == b"0\n"
            both = memory_of([os.getpid(), other.pid])
            other.communicate(b"\n")
    assert both.mapped_mb - before.mapped_mb == pytest.approx(64, abs=10)
    kept = mmap.mmap(-1, 64_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may have kept that much
    for at in range(0, len(kept), 4096):
        kept[at] = 1
    assert memory_of([os.getpid()]).own_mb - before.own_mb == pytest.approx(64, abs=10)
    assert len(kept) == 64_000_000


@pytest.mark.slow
def test_the_last_line_is_the_ratio_of_the_json(tmp_path):
    settings = ["--work", tmp_path / "work", "--images", 400, "--batch_size", 50, "--rounds", 2, "--seconds", 0.2]
    settings += ["--json", tmp_path / "figures"]
    done = start("benchmarks.speed.streaming", *settings, program="-m", cwd=REPO)
    figures = json.loads((tmp_path / "figures").read_text(encoding="utf-8"))
    ours, peer = (figures["images_per_s"][name] for name in ("ours", "torchvision"))
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    assert figures["ratios"] == ratios
    assert done.stdout.splitlines()[-1] == f"ratio={sum(ratios) / 2:.1f}"
    assert 0 < figures["decode_s"] < figures["seconds_to_start"]["ours the first time"]
    if IS_KNOWN:
        assert [len(figures["memory"][name]) for name in ("ours", "torchvision")] == [23, 7]
        assert all(sample["mapped_mb"] < sample["total_mb"] for sample in figures["memory"]["ours"])
