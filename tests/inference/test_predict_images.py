"""Predictions for image files: as one image at a time, in order, whole files or none, short messages."""

import csv
import json
import os
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import made_predictions
from PIL import Image

from benchmarks.faults.images import nested_eps, recorded_ghostscript
from cifar_lightning import ImageClassifier, UserError, load
from cifar_lightning.cli import main as cli
from cifar_lightning.data import image_decoding
from cifar_lightning.errors import RunError
from cifar_lightning.files import check_output
from cifar_lightning.inference import predict_images as predict
from cifar_lightning.inference.predict_images import find_labels, predict_images, rank_classes
from cifar_lightning.inference.trained_model import TrainedModel, load_trained_model
from cifar_lightning.metrics.calibration import fit_temperature
from cifar_lightning.metrics.significance import wilson_interval
from cifar_lightning.models import winograd
from cifar_lightning.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("decoding_here")

SIZE = 16
CLASSES = ["Äpfel", "b, c", "d"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a model with random weights and used batch statistics, seen from a folder that is empty otherwise."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    save(run)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return run


def save(run, **changes):
    module = ImageClassifier("smallnet", len(CLASSES), SIZE, model_kwargs={"widths": [4, 4, 8]}).train()
    colours = torch.randn(64, 3, 1, 1) + torch.randn(64, 3, SIZE, SIZE) / 4
    with torch.no_grad():
        for _ in range(20):
            module(colours)
        module.model.head.weight.mul_(10)
        module.model.head.bias.sub_(module.eval()(colours).mean(0))  # so that no class wins always
    weights = module.state_dict() | changes
    data = {"class_names": CLASSES, "image_size": SIZE, "mean": list(MEAN), "std": list(STD)}
    checkpoint = {"state_dict": weights, "hyper_parameters": dict(module.hparams), "ImageDataModule": data, "epoch": 0}
    torch.save(checkpoint, run.best_checkpoint)


def noise(seed, height=SIZE, width=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_images(num, folder=Path("images")):
    """Write noise on different backgrounds, so that the classes differ; return the paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k:03}.png" for k in range(num)]
    for k, path in enumerate(paths):
        Image.fromarray((noise(k) // 4 + np.random.default_rng(k).integers(0, 192, 3)).astype(np.uint8)).save(path)
    return paths


def naive_probs(run, path):
    """One image at a time, by hand: RGB, the shorter side to 16, the middle square, normalised, softmax."""
    module = ImageClassifier("smallnet", len(CLASSES), SIZE, model_kwargs={"widths": [4, 4, 8]}).eval()
    module.load_state_dict(torch.load(run.best_checkpoint, weights_only=True)["state_dict"])
    with Image.open(path) as image:
        image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("RGBA", "LA"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image)[top : top + SIZE, left : left + SIZE].astype(np.float64) / 255
    normalized = torch.from_numpy((pixels - MEAN) / STD).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        return module(normalized).softmax(1)[0].tolist()


def read_csv(path=Path("out.csv")):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ranked(row, top_k=3):
    columns = [("class", "probability"), *((f"class_{k}", f"probability_{k}") for k in range(2, top_k + 1))]
    return [(row[name], float(row[prob])) for name, prob in columns]


def assert_as_naive(run, rows):
    for row in rows:
        probs = naive_probs(run, row["path"])
        order = sorted(range(len(CLASSES)), key=lambda k: -probs[k])
        assert [name for name, _ in ranked(row)] == [CLASSES[k] for k in order]
        assert [prob for _, prob in ranked(row)] == pytest.approx([probs[k] for k in order], abs=1e-6)


def test_rows_equal_one_image_at_a_time_in_sorted_order(run, capsys):
    paths = save_images(40)
    assert predict_images(run, [Path("images")], output=Path("out.csv")) == 0
    rows = read_csv()
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert_as_naive(run, rows)
    assert len({row["class"] for row in rows}) > 1, "a test that any prediction passes"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("40 images in ")
    assert first.endswith(" images/s): out.csv")
    counted = {name: sum(row["class"] == name for row in rows) for name in CLASSES}
    assert f"{max(counted, key=counted.get)} {max(counted.values())}" in second


def test_any_mode_size_and_format_is_seen_as_in_training(run):
    gray16 = Image.fromarray((np.arange(SIZE * SIZE, dtype=np.uint16) * 250).reshape(SIZE, SIZE))
    alpha = np.dstack([noise(1), noise(2)[..., :1]])
    made = {
        "gray.png": Image.fromarray(noise(3)[..., 0]),
        "rgba.png": Image.fromarray(alpha),
        "palette.gif": Image.fromarray(noise(4)).quantize(32),
        "gray16.png": gray16,
        "one_bit.png": Image.fromarray(noise(5)[..., 0]).convert("1"),
        "wide.png": Image.fromarray(noise(6, 20, 50)),
        "tall.webp": Image.fromarray(noise(7, 100, 30)),
        "tiny.bmp": Image.fromarray(noise(8, 3, 3)),
        "photo.jpg": Image.fromarray(noise(9, 17, 19)),
        "cmyk.tif": Image.fromarray(noise(10)).convert("CMYK"),
    }
    for name, image in made.items():
        image.save(name)
    assert predict_images(run, [Path(name) for name in made], output=Path("out.csv")) == 0
    rows = read_csv()
    assert [row["path"] for row in rows] == list(made)
    assert_as_naive(run, rows)


@pytest.mark.parametrize("chunk_bytes", [predict._CHUNK_BYTES, 1])
def test_unusual_images_are_remarked_once(chunk_bytes, run, capsys, monkeypatch):
    monkeypatch.setattr(predict, "_CHUNK_BYTES", chunk_bytes)
    save_images(2, Path("a"))
    for number in range(2):
        transparent = np.dstack([noise(number), np.zeros((SIZE, SIZE), np.uint8)])
        Image.fromarray(transparent).save(f"a/b{number}.png")
        Image.new("RGB", (9, 9), (7, 8, 9)).save(f"a/c{number}.png")
        twelve_bits = np.random.default_rng(number).integers(0, 4096, (SIZE, SIZE), dtype=np.uint16)
        Image.fromarray(twelve_bits).save(f"a/d{number}.png")
    assert predict_images(run, [Path("a")], output=Path("out.csv")) == 0
    assert len(read_csv()) == 8
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for words in (("2 of 8", "alpha 0", "a/b0.png"), ("2 of 8", "one colour", "a/c0.png"), ("16-bit", "4,095")):
        assert sum(all(word in line for word in words) for line in lines) == 1, lines


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_batch_size_changes_nothing(run, batch_size):
    paths = save_images(40)
    predict_images(run, paths, output=Path("a.csv"), batch_size=256)
    predict_images(run, paths, output=Path("b.csv"), batch_size=batch_size)
    for one, other in zip(read_csv("a.csv"), read_csv("b.csv"), strict=True):
        assert [name for name, _ in ranked(one)] == [name for name, _ in ranked(other)]
        assert [prob for _, prob in ranked(one)] == pytest.approx([prob for _, prob in ranked(other)], abs=1e-6)


def test_fewer_multiplications_from_some_images_on_change_no_class_and_hardly_a_probability(run, monkeypatch):
    monkeypatch.setattr(predict, "_FASTER_FROM", 40)
    monkeypatch.setattr(predict, "keep_freed_memory", lambda: None)  # of this process, for the tests that follow
    monkeypatch.setattr(winograd, "_WORTHWHILE", 0)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    made, convolve = [], winograd._convolve
    monkeypatch.setattr(winograd, "_convolve", lambda *tensors: made.append(1) or convolve(*tensors))
    save_images(40)
    (first := Path("one")).mkdir()
    Path("images/000.png").rename(first / "000.png")
    predict_images(run, [Path("images")], output=Path("plain.csv"))
    assert not made
    predict_images(run, [first, Path("images")], output=Path("fast.csv"), in_float32=True)
    assert len(made) == 6, "each of the model's convolutions"
    plain, fast = read_csv(Path("plain.csv")), read_csv(Path("fast.csv"))[1:]
    assert [row["class"] for row in plain] == [row["class"] for row in fast]
    probs = [[float(row["probability"]) for row in rows] for rows in (plain, fast)]
    assert probs[0] != probs[1]
    assert probs[0] == pytest.approx(probs[1], abs=1e-4)


@pytest.mark.real_workers
def test_many_chunks_and_worker_processes_change_nothing(run, monkeypatch, capfd):
    paths = save_images(23)
    paths[5].write_bytes(b"broken")
    paths[22].write_bytes(b"broken")
    assert predict_images(run, paths, output=Path("a.jsonl")) == 2
    monkeypatch.setattr(predict, "_CHUNK_BYTES", 11 * 3 * SIZE**2)
    monkeypatch.setattr(image_decoding, "_IMAGES_PER_WORKER", 5)
    monkeypatch.setattr(image_decoding, "usable_cpus", lambda: 2)
    monkeypatch.setattr(image_decoding, "_LOGGED_FROM", 11)
    capfd.readouterr()
    assert predict_images(run, paths, output=None) == 2
    captured = capfd.readouterr()
    expected = [json.loads(line) for line in Path("a.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, other in zip(captured.out.splitlines(), expected, strict=True):
        row = json.loads(line)
        assert (row["path"], row["class"]) == (other["path"], other["class"])
        assert [one["probability"] for one in row["top"]] == pytest.approx(
            [one["probability"] for one in other["top"]], abs=1e-6
        )
    assert captured.err.count("cannot be read") == 2
    assert "Decoded 11 images" in captured.err


def test_equal_logits_give_the_first_class_as_argmax_does(run):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1000))
    torch.nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 3.0] * 500)
    trained = replace(load_trained_model(run), model=model, class_names=tuple(map(str, range(1000))))
    lower, higher = model[1].bias.softmax(0)[:2].tolist()
    for ranked in rank_classes(trained, np.zeros((2, 1, 1, 3), np.uint8), 501):
        names, probs = zip(*ranked, strict=True)
        assert [*map(int, names)] == [*range(1, 1000, 2), 0]
        assert probs == pytest.approx([*[higher] * 500, lower])


def test_a_model_that_diverged_is_an_error_and_leaves_no_file(run):
    save(run, **{"model.head.bias": torch.full((3,), torch.nan)})
    with pytest.raises(UserError, match="predicts NaN"):
        predict_images(run, save_images(2), output=Path("out.csv"))
    assert os.listdir() == ["images"]


# -- images that cannot be read -------------------------------------------------------------------------------


def test_unreadable_images_are_listed_and_all_others_predicted(run, capsys):
    paths = save_images(8)
    whole = paths[2].read_bytes()
    paths[0].write_bytes(whole[: len(whole) // 2])
    paths[3].write_bytes(b"")
    paths[4].write_bytes(b"no image")
    paths[7].write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    assert predict_images(run, [Path("images")], output=Path("out.csv"), batch_size=2) == 4
    rows = read_csv()
    assert [row["path"] for row in rows] == [str(paths[k]) for k in (1, 2, 5, 6)]
    assert_as_naive(run, rows)
    *printed, count = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in printed] == [str(paths[k]) for k in (0, 3)]
    assert all("cannot be read (" in line for line in printed)
    assert count.startswith("4 files ")
    assert count.endswith("skipped_files.jsonl")
    assert [row["path"] for row in skipped()] == [str(paths[k]) for k in (0, 3, 4, 7)]


def skipped(path="skipped_files.jsonl"):
    return [json.loads(line) for line in Path(path).read_text("ascii").splitlines()]


def test_all_files_of_a_folder_are_predicted_or_listed_with_a_reason(run, capsys):
    """The first two are images though no suffix says so; no other one may be left out without a word."""
    image = save_images(1, Path("top/b"))[0].read_bytes()
    for name in ("IMG_0001", "photo.unknown"):
        Path("top", name).write_bytes(image)
    odd = ["a.heic", "no_suffix", "x.unknown", "bad.png"]
    not_images = ["notes.txt", "clip.MP4", "all.zip", "page.eps", ".hidden.png", ".git/x.png"]
    for name in odd + not_images:
        Path("top", name).parent.mkdir(exist_ok=True)
        Path("top", name).write_bytes(b"no image")
    if os.name == "posix":
        Path("top/linked").symlink_to(Path("top/b").resolve())
        Path("top/gone.png").symlink_to("nowhere")
    assert predict_images(run, [Path("top")], output=Path("out.csv")) == 5
    assert [row["path"] for row in read_csv()] == [f"top/{name}" for name in ("IMG_0001", "b/000.png", "photo.unknown")]
    reasons = {row["path"]: row["reason"] for row in skipped()}
    listed = [*odd, *not_images[:-1], ".git", "linked", "gone.png"]
    assert reasons.keys() == {f"top/{name}" for name in listed}
    assert all(reasons.values())
    assert reasons["top/linked"] == "link to a folder"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("5 files cannot be read, 7 files skipped")
    assert predict_images(run, [Path("top")], output=None) == 5
    assert "7 files skipped" in capsys.readouterr().err


def test_a_list_of_skipped_files_never_replaces_that_of_a_run_or_of_another_output(run):
    save_images(1)
    Path("images/notes.txt").write_text("")
    Path("skipped_files.jsonl").write_text("of another output")
    predict_images(run, [Path("images")], output=Path("b.csv"))
    assert Path("skipped_files.jsonl").read_text() == "of another output"
    assert [row["path"] for row in skipped("b.csv.skipped_files.jsonl")] == ["images/notes.txt"]
    predict_images(run, [Path("images")], output=Path("b.csv"), force=True)
    assert Path("skipped_files.jsonl").read_text() == "of another output"
    run.config.write_text("")
    run.skipped_files.write_text("of the run")
    predict_images(run, [Path("images")], output=run.path / "b.csv", force=True)
    assert run.skipped_files.read_text() == "of the run"


def test_a_list_of_files_that_all_have_a_row_by_now_is_removed_with_the_output_that_is_replaced(run):
    paths = save_images(2)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b"")
    predict_images(run, paths, output=Path("out.csv"))
    predict_images(run, paths, output=Path("b.csv"))
    paths[0].write_bytes(whole)
    predict_images(run, [paths[1]], output=Path("c.csv"), force=True)
    assert len(skipped()) == len(skipped("b.csv.skipped_files.jsonl")) == 1
    predict_images(run, paths, output=Path("b.csv"), force=True)
    assert list(Path().glob("*skipped*")) == [Path("skipped_files.jsonl")], "that of out.csv"
    predict_images(run, paths, output=Path("out.csv"), force=True)
    assert list(Path().glob("*skipped*")) == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_needs_too_much_memory_names_the_flag(error, run, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(TrainedModel, "logits", fail)
    with pytest.raises(RunError, match="out of memory with 2 images at a time: lower --batch_size"):
        predict_images(run, save_images(3), output=Path("out.csv"), batch_size=2)
    assert os.listdir() == ["images"]


def test_an_unreadable_image_takes_one_line_whatever_its_name(run, capsys):
    Path("a\nb.png").write_bytes(b"no image")
    assert predict_images(run, [Path("a\nb.png")], output=None) == 1
    assert capsys.readouterr().err == "a\\nb.png cannot be read (not an image format that Pillow knows)\n"


def test_an_unreadable_image_is_named_or_20_where_no_file_lists_all(run, capsys):
    paths = [Path(f"{k:02}.png") for k in range(23)]
    for path in paths:
        path.write_bytes(b"no image")
    for before in (None, "of images that could be read"):
        if before:
            Path("out.csv").write_text(before)
        capsys.readouterr()
        with pytest.raises(RunError, match=r"--output out\.csv: not written; none of 23 files can be read"):
            predict_images(run, paths, output=Path("out.csv"), top_k=2, force=True)
        assert before is None or Path("out.csv").read_text() == before
    captured = capsys.readouterr()
    assert [line.split(" ")[0] for line in captured.err.splitlines()] == ["00.png", "23"]
    assert len(skipped()) == len(skipped("out.csv.skipped_files.jsonl")) == 23, "that of the output that stays is kept"
    assert captured.out == ""
    assert predict_images(run, paths, output=None) == 23
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[19].startswith("19.png cannot")
    assert captured.err.splitlines()[20].startswith("and 3 more")


# -- finding ----------------------------------------------------------------------------------------------------


def test_folders_are_searched_for_visible_images_and_named_files_always_tried(run):
    (shown,) = save_images(1, Path("top/b"))
    image = shown.read_bytes()
    for name in ("top/z.PNG", "top/a.jpeg", "top/b-/x.png", "top/.hidden.png", "top/.git/x.png", "top/notes.txt", "x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(image)
    predict_images(run, [Path("x"), Path("top"), Path("top/.hidden.png")], output=Path("out.csv"))
    expected = ["x", "top/a.jpeg", "top/b-/x.png", "top/b/000.png", "top/z.PNG", "top/.hidden.png"]
    assert [row["path"] for row in read_csv()] == [str(Path(name)) for name in expected]


def test_absolute_paths_stay_absolute(run):
    path = save_images(1)[0].resolve()
    predict_images(run, [path, path.parent], output=Path("out.csv"))
    assert [row["path"] for row in read_csv()] == [str(path), str(path)]


@pytest.mark.parametrize("name", ["Grüße, „x“.png", "two words.png", "new\nline.png", 'quo"te.png'])
def test_odd_names_come_back_from_csv_json_and_stdout(run, name, capsys):
    save_images(1)[0].rename(name)
    predict_images(run, [Path(name)], output=Path("out.csv"))
    predict_images(run, [Path(name)], output=Path("out.json"))
    capsys.readouterr()
    predict_images(run, [Path(name)], output=None)
    assert read_csv()[0]["path"] == name
    assert json.loads(Path("out.json").read_text(encoding="utf-8"))["path"] == name
    printed = capsys.readouterr().out
    assert json.loads(printed)["path"] == name
    assert printed.isascii(), "stdout may have any encoding"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are not UTF-8")
def test_names_that_are_not_utf8_are_written_escaped(run, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    save_images(1)[0].rename(name)
    Path(os.fsdecode(b"bad\xe9.png")).write_bytes(b"no image")
    out = Path(os.fsdecode(b"out\xe9.csv"))
    assert predict_images(run, [Path(name), Path(os.fsdecode(b"bad\xe9.png"))], output=out) == 1
    assert read_csv(out)[0]["path"] == "caf\\udce9.png"
    predict_images(run, [Path(name)], output=Path("out.jsonl"))
    assert json.loads(Path("out.jsonl").read_text(encoding="utf-8"))["path"] == name


# -- output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_csv_and_json_hold_the_same_top_k(run, top_k):
    paths = save_images(3)
    predict_images(run, paths, output=Path("out.csv"), top_k=top_k)
    predict_images(run, paths, output=Path("out.JSONL"), top_k=top_k)
    rows = read_csv()
    assert (
        list(rows[0])
        == ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"][: 1 + 2 * top_k]
    )
    for row, line in zip(rows, Path("out.JSONL").read_text(encoding="utf-8").splitlines(), strict=True):
        top = [{"class": name, "probability": prob} for name, prob in ranked(row, top_k)]
        assert json.loads(line) == {"path": row["path"], **top[0], "top": top}


def test_calibrated_probabilities_are_those_of_logits_divided_by_the_temperature(run):
    paths = save_images(3)
    with pytest.raises(UserError, match="--calibrated"):
        predict_images(run, paths, output=Path("out.csv"), calibrated=True)
    assert not Path("out.csv").exists()
    logits, targets = made_predictions(3, 300, sharpness=4)
    np.savez(run.predictions_val, logits=logits, targets=targets, indices=np.arange(300), class_names=np.array(CLASSES))
    temperature = fit_temperature(logits, targets)
    assert abs(temperature - 1) > 0.1
    predict_images(run, paths, output=Path("out.csv"), calibrated=True)
    for row in read_csv():
        probs = (torch.tensor(naive_probs(run, row["path"])).log() / temperature).softmax(0).sort(descending=True)
        assert [name for name, _ in ranked(row)] == [CLASSES[k] for k in probs.indices]
        assert [prob for _, prob in ranked(row)] == pytest.approx(probs.values.tolist(), abs=1e-5)
    run.config.write_text("{}")
    from_python = load(run.path).predict(paths, calibrated=True)
    assert [prediction.top for prediction in from_python] == [ranked(row) for row in read_csv()]


def test_images_in_folders_of_classes_have_labels_and_an_accuracy(run, capsys):
    for number, name in enumerate(CLASSES):
        save_images(4, Path("photos", unicodedata.normalize("NFD", name), *["inner"] * (number == 1)))
    (lone,) = save_images(1, Path("other"))
    Path("photos/.hidden").mkdir()
    if os.name == "posix":
        for folder in ("photos/lost+found", "photos/d/@eaDir"):
            Path(folder).mkdir()
            Path(folder, "000.png").write_bytes(lone.read_bytes())
        Path("photos/Icon\r").write_text("")
    Path("photos/notes.txt").write_text("")
    predict_images(run, [Path("photos"), lone], output=Path("out.csv"))
    *rows, last = read_csv()
    assert [row["label"] for row in rows] == [name for name in CLASSES for _ in range(4)]
    assert (last["path"], last["label"]) == (str(lone), "")
    num_correct = sum(row["label"] == row["class"] for row in rows)
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"{num_correct} of 12 " in line
    assert "{:.1f} to {:.1f} %".format(*(100 * end for end in wilson_interval(num_correct, 12))) in line
    predict_images(run, [Path("photos"), lone], output=None)
    out, err = capsys.readouterr()
    labels = [json.loads(line)["label"] for line in out.splitlines()]
    assert labels == [row["label"] for row in rows] + [None]
    assert f"{num_correct} of 12 " in err


def test_a_given_file_in_no_class_folder_of_a_given_folder_gets_no_label(run):
    save_images(1, Path("photos/d"))
    given = [*save_images(1, Path("photos/.hidden")), *save_images(1, Path("aside"))]
    Path("photos/link").symlink_to("../aside")
    given += [Path("photos/link/000.png"), Path("photos/../aside/000.png")]
    predict_images(run, [Path("photos"), *given], output=Path("out.csv"))
    assert [row["label"] for row in read_csv()] == ["d", "", "", "", ""]


def test_the_images_are_not_looked_through_for_folders_without_class_folders(tmp_path):
    class Counted(list):
        times = 0

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    for name in ("photos/b", "one", "two"):
        (tmp_path / name).mkdir(parents=True)
    tops = [tmp_path / name for name in ("photos", "one", "two")]
    found = Counted(str(tmp_path / name) for name in ("photos/b/0.png", "photos/1.png", "one/2.png", "two/3.png"))
    assert find_labels(tops, found, ["a", "b"]) == {found[0]: "b"}
    assert found.times == 1


def test_folders_that_are_not_all_classes_give_no_labels(run, capsys):
    for name in ("b, c", "d", "unknown"):
        save_images(1, Path("photos") / name)
    predict_images(run, [Path("photos")], output=Path("out.csv"))
    assert "label" not in read_csv()[0]
    out, err = capsys.readouterr()
    assert "unknown" in err
    assert "Accuracy" not in out
    predict_images(run, [Path("photos/d"), Path("photos/unknown")], output=Path("out.csv"), force=True)
    assert "label" not in read_csv()[0]
    assert capsys.readouterr().err == ""


def test_stdout_gets_json_lines_alone(run, capsys):
    paths = save_images(4)
    paths[1].write_bytes(b"no image")
    assert predict_images(run, paths, output=None) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["path"] for line in captured.out.splitlines()] == [str(paths[k]) for k in (0, 2, 3)]
    assert captured.err.startswith(str(paths[1]))


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(run, monkeypatch):
    paths = save_images(2)
    Path("out.csv").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(predict, "load_trained_model", lambda run: pytest.fail("work was done"))
        with pytest.raises(UserError, match=r"--output out\.csv: exists; .* --force"):
            predict_images(run, paths, output=Path("out.csv"))
    assert Path("out.csv").read_text() == "old"
    predict_images(run, paths, output=Path("out.csv"), force=True)
    assert len(read_csv()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_pipe_or_device_is_no_output_even_with_force(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path("/dev/null")):
        with pytest.raises(UserError, match="is a device or a pipe"):
            check_output(path, force=True)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(28, "No space left on device"), r"--output out\.csv: cannot be written \(No space left on device\)"),
        (KeyboardInterrupt("Ctrl-C"), "Ctrl-C"),
    ],
)
def test_output_is_whole_or_as_before(run, monkeypatch, error, seen):
    paths = save_images(2)
    Path("out.csv").write_text("old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((UserError, KeyboardInterrupt), match=seen):
        predict_images(run, paths, output=Path("out.csv"), force=True)
    assert Path("out.csv").read_text() == "old"
    assert sorted(os.listdir()) == ["images", "out.csv"]


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predictions.csv", "test_metrics.json", "skipped_files.jsonl"])
def test_a_file_of_a_run_is_not_replaced_also_with_force(run, monkeypatch, name):
    (path,) = save_images(1)
    monkeypatch.setattr(predict, "load_trained_model", lambda run, **settings: pytest.fail("the model was loaded"))
    run.config.touch()
    run.split.touch()
    for folder, force in ((run.path, True), (Path("."), False)):
        if not force:
            monkeypatch.chdir(run.path)
        with pytest.raises(UserError, match=f"--output .*{name}: is a file of the run; choose another name"):
            predict_images(run, [path], output=folder / name, force=force)
    assert sorted(os.listdir(run.path)) == ["checkpoints", "config.yaml", "split.json"]


def test_predictions_next_to_a_config_of_ones_own_are_written(run):
    Path("config.yaml").touch()
    paths = save_images(1)
    for force in (False, True):
        assert predict_images(run, paths, output=Path("predictions.csv"), force=force) == 0
    assert Path("predictions.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": ["absent.png"]}, r"absent\.png: no such file or folder"),
        ({"paths": ["images", "empty"]}, "empty: no images in this folder"),
        ({"paths": []}, "PATH: give image files"),
        ({"top_k": 0}, "--top_k 0: 1 or more"),
        ({"top_k": 4}, "--top_k 4: the run has 3 classes"),
        ({"batch_size": 0}, "--batch_size 0: 1 or more"),
        ({"output": "out.txt"}, r"--output out\.txt: give a \.csv, or a \.jsonl"),
        ({"output": "out"}, r"--output out: give a \.csv"),
        ({"output": "absent/out.csv"}, r"--output absent/out\.csv: there is no folder absent"),
        ({"output": "folder.csv", "force": True}, r"--output folder\.csv: is a folder"),
    ],
)
def test_mistakes_are_named_in_one_line_before_any_image_is_read(run, monkeypatch, arguments, message):
    save_images(1)
    for folder in ("empty", "folder.csv"):
        Path(folder).mkdir()
    Path("empty/notes.txt").write_text("none")
    monkeypatch.setattr(image_decoding, "decode_all", lambda *arguments: pytest.fail("an image was read"))
    if "top_k" not in arguments:
        monkeypatch.setattr(predict, "load_trained_model", lambda run: pytest.fail("the model was loaded"))
    before = sorted(os.listdir())
    paths = [Path(path) for path in arguments.pop("paths", ["images"])]
    output = Path(arguments.pop("output", "out.csv"))
    with pytest.raises(UserError, match=message) as raised:
        predict_images(run, paths, output=output, **arguments)
    assert str(raised.value).count("\n") <= 1
    assert sorted(os.listdir()) == before


def test_a_folder_that_takes_no_files_is_named(run, monkeypatch):
    save_images(1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--output out\.csv: the folder \. cannot be written"):
        predict_images(run, [Path("images")], output=Path("out.csv"))


@pytest.mark.real_workers
def test_whole_commands_with_worker_processes_start_no_program_for_an_eps_in_an_image(run, monkeypatch, capsys):
    variables, calls = recorded_ghostscript(Path.cwd())
    monkeypatch.setenv("PATH", variables["PATH"])
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        save_images(3, Path("data", folder))
    Path("data/train/a/nested.jpg").write_bytes(nested_eps())
    run.config.write_text("{}")
    for command, status in (
        (["fit", "--data.dataset", "folder", "--data.root", "data", "--run_dir", "fitted"], 2),
        (["predict-images", str(run.path), "data", "--output", "out.csv"], 1),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == status
        assert "nested.jpg" in capsys.readouterr().err
    assert len(read_csv()) == 12
    assert not calls.exists()
