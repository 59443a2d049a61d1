"""Whatever stands in a run's files, a reader returns what its schema says or refuses the file by name."""

import io
import itertools
import json
import os
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
from made_run import make_run

from benchmarks.faults.mutations import mutate_bytes
from cifar_lightning.errors import UserError
from cifar_lightning.files import csv_table, write_text_durably
from cifar_lightning.formatting import csv_cell
from cifar_lightning.report.results import read_predictions
from cifar_lightning.runs import contents
from cifar_lightning.runs.folder import RunFolder, create_run, open_run

READERS = {
    "config": contents.read_config,
    "split": contents.read_split,
    "environment": contents.read_environment,
    "test_metrics": contents.read_test_metrics,
    "metrics_csv": contents.read_table,
    "timing_csv": contents.read_table,
    "confusion_matrix_csv": contents.read_matrix,
    "predictions": read_predictions,
    "gallery": contents.read_gallery,
    "explanations": contents.read_explanations,
}


def special(path, kind):
    """Put something else in the place of a file; return what must stay as it is."""
    target = path.parent.parent / "the user's own"
    target.write_bytes(path.read_bytes() if path.is_file() else b"mine")
    if path.is_dir():
        target = path.rename(path.parent.parent / "elsewhere")
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(
            {"link": target, "device": "/dev/zero", "dangling": "nowhere", "memory": "/proc/self/mem"}[kind]
        )
    return target


KINDS = ["link", "device", "dangling", "memory", "fifo", "folder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(name, kind, tmp_path):
    path = tmp_path / "run" / "file"
    path.parent.mkdir()
    path.write_bytes(b"x")
    special(path, kind)
    with pytest.raises(UserError, match="run/file: cannot be read"):
        READERS[name](path)


@pytest.mark.parametrize(
    "odd",
    [None, 3, "text", {"a": 1}, [3], [{}], [{"first": 3}], [{"kind": "", "text": "", "num_images": 1, "first": [3]}]],
)
def test_a_strange_list_of_identical_images_is_refused(odd, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"duplicates": odd}))
    with pytest.raises(UserError, match=r"split\.json: damaged: duplicates"):
        contents.read_split(tmp_path / "split.json")


@pytest.mark.parametrize("name", READERS)
def test_a_huge_file_is_refused_before_memory_is_taken(name, tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(UserError, match="file: "):
        READERS[name](tmp_path / "file")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


OWN = ["metrics_csv", "report", "last_checkpoint", "lock_file", "checkpoints", "tensorboard"]


@pytest.mark.parametrize(
    ("name", "kind"), [each for each in itertools.product(OWN, KINDS) if each != ("checkpoints", "folder")]
)
def test_a_run_with_links_or_special_files_in_place_of_its_own_is_not_opened(name, kind, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    path = run.path / "events.out.tfevents.1" if name == "tensorboard" else getattr(run, name)
    target = special(path, kind)
    before = target.read_bytes() if target.is_file() else sorted(target.iterdir())
    for use in (
        lambda: open_run(run.path),
        lambda: open_run(run.path, lock=True),
        lambda: create_run(tmp_path, "run", run.path),
    ):
        with pytest.raises(UserError, match=path.name):
            use()
    assert before == (target.read_bytes() if target.is_file() else sorted(target.iterdir()))


# -- wrong values -----------------------------------------------------------------------------------------------------

DEEP, DIGITS = b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 6000
WRONG = [
    ("split", b'{"sizes": {"val": "x"}}', "sizes.val"),
    ("split", b'{"sizes": [1]}', "sizes"),
    ("split", b'{"train": [1, 2, null]}', "train.2"),
    ("split", b'{"seed": %s}' % DIGITS, "damaged"),
    ("split", b'{"sha256": {"test": 5}}', "sha256.test"),
    ("split", DEEP, "damaged"),
    ("split", b"[]", "damaged"),
    ("environment", b'{"command": "rm"}', "command"),
    ("environment", b'{"command": [1]}', "command.0"),
    ("environment", b'{"versions": {"torch": [2]}}', "versions.torch"),
    ("environment", b'{"resumed": 5}', "resumed"),
    ("environment", b'{"resumed": [{"versions": 1}]}', "resumed.0.versions"),
    ("environment", b'{"commit": {}}', "commit"),
    ("environment", b"\xff\xfe", "damaged"),
    ("test_metrics", b'{"accuracy_no_tta": "90 %"}', "accuracy_no_tta"),
    ("test_metrics", b'{"accuracy_one_view": []}', "accuracy_no_tta"),
    ("test_metrics", b'{"accuracy_no_tta": 1e300}', "accuracy_no_tta"),
    ("config", b"model: [1]", "model"),
    ("config", b"data: {5: 1}", "data"),
    ("config", b"model: {lr: 2024-01-01}", "date"),
    ("config", b"model: !!set {a}", "set"),
    ("config", b"model: {lr: 0x%s}" % (b"f" * 6000), "64 bits"),
    ("config", b"model: {lr: %s}" % DIGITS, "damaged"),
    ("metrics_csv", b"epoch,lr\n1e308,1\n", "epoch"),
    ("metrics_csv", b"epoch,lr\n0,1e308\n", "lr"),
    ("metrics_csv", b"epoch,lr\ninf,1\n", "epoch"),
    ("metrics_csv", b"epoch,lr\nnan,1\n", "epoch"),
    ("metrics_csv", b"epoch,lr\n-1,1\n", "epoch"),
    ("metrics_csv", b"epoch,val/acc\n0,90\n", "val/acc"),
    ("metrics_csv", b"step,val/acc\n0,1\n", "epoch"),
    ("timing_csv", b"epoch,elapsed_s\n0.5,1\n", "epoch"),
    ("timing_csv", b"epoch,elapsed_s\n,1\n", "epoch"),
    ("confusion_matrix_csv", b"t,a,b\na,1,1000000000000\nb,1,1\n", "10,000,000"),
    ("confusion_matrix_csv", b"t,a,b\na,1,-1\nb,1,1\n", "0 or more"),
    ("confusion_matrix_csv", b"t,a,b\na,1,1.5\nb,1,1\n", "1.5"),
    ("confusion_matrix_csv", b"t\n", "square"),
]


@pytest.mark.parametrize(("name", "data", "named"), WRONG)
def test_the_error_names_the_file_and_the_field(name, data, named, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError) as caught:
        READERS[name](tmp_path / "file")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file'}: damaged: ")
    assert named in message
    assert len(message) < 400


def npz(**headers):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (header, data) in headers.items():
            padded = header.encode().ljust(117) + b"\n"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + data)
    return buffer.getvalue()


def header(descr, shape):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}"


ZEROS = bytes(50_000_000)  # 50 kB in the archive
ARRAYS = [
    (header("|u1", "(10000000000000, 1, 1, 3)"), b""),
    (header("|u1", "(100000, 100000, 100000, 3)"), ZEROS),
    (header("|u1", "(-1, 1, 1, 3)"), b""),
    (header("|u1", "(0, 1, 1, 3)"), b""),
    (header("|u1", "(9, 1, 1, 3)"), b"short"),
    (header("|u1", "(3,)"), b"abc"),
    (header("|O", "(1, 1, 1, 3)"), b""),
    (header("<U9999999", "(1, 1, 1, 3)"), b""),
    (header("<f8", "(1, 1, 1, 3)"), bytes(24)),
    ("(" * 117, b""),
    ("", b""),
]


@pytest.mark.parametrize("images", ARRAYS, ids=range(len(ARRAYS)))
def test_an_array_is_checked_before_memory_is_taken(images, tmp_path):
    (tmp_path / "gallery.npz").write_bytes(npz(images=images, indices=(header("<i8", "(1,)"), bytes(8))))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"gallery\.npz: damaged: "):
        contents.read_gallery(tmp_path / "gallery.npz")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


# -- mutations --------------------------------------------------------------------------------------------------------

SEED = int(os.environ.get("CIFAR_LIGHTNING_TEST_SEED", "0"))


def explained():
    buffer = io.BytesIO()
    arrays = {"indices": np.arange(2), "cam": np.ones((2, 4, 4), np.uint8), "reasons": np.array(["", ""])}
    arrays |= {"neighbours": np.ones((2, 3, 4, 4, 3), np.uint8), "neighbour_names": np.array([["a", "b", "c"]] * 2)}
    np.savez_compressed(buffer, **arrays, neighbour_labels=np.ones((2, 3), np.int64))
    return buffer.getvalue()


@pytest.mark.parametrize("name", READERS)
def test_any_mutation_is_read_or_refused_by_name(name, tmp_path):
    """CIFAR_LIGHTNING_TEST_SEED chooses other mutations."""
    run = make_run(tmp_path / "run", n=60, names=("ant", "bee", "cow"), image_size=4)
    contents_of = {
        "test_metrics": b'{"accuracy": 0.5, "accuracy_no_tta": 0.5}',
        "confusion_matrix_csv": b"t,a,b\na,1,2\nb,3,4\n",
        "explanations": explained(),
    }
    path = getattr(run, name)
    data = contents_of.get(name) or path.read_bytes()
    path.write_bytes(data)
    READERS[name](path)
    rng, refusals = random.Random(SEED), []
    for _ in range(500):
        path.write_bytes(mutate_bytes(data, rng))
        try:
            READERS[name](path)
        except UserError as error:
            refusals.append(str(error))
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)
    assert len(refusals) > 50


@pytest.mark.parametrize("labels", ["cab", "abx", "aab"])
def test_a_matrix_has_its_rows_in_the_order_of_its_columns(labels, tmp_path):
    rows = "".join(f"{label},{9 * (label == 'a')},0,9\n" for label in labels)
    (tmp_path / "confusion_matrix.csv").write_text(f",a,b,c\n{rows}")
    with pytest.raises(UserError, match=r"confusion_matrix\.csv: damaged: row [cxa] in place of [abc]"):
        contents.read_matrix(tmp_path / "confusion_matrix.csv")


@pytest.mark.parametrize("name", ["two\nlines", "two\r\nlines", "a\u2028b", "a\x0bb", 'a"b', "a,b", "=1"])
def test_a_matrix_keeps_the_names_of_its_classes(name, tmp_path):
    path, cell = tmp_path / "confusion_matrix.csv", csv_cell(name)
    write_text_durably(path, csv_table(["", cell, "plain"], [[cell, 3, 0], ["plain", 1, 4]]))
    names, matrix = contents.read_matrix(path)
    assert names == (name, "plain")
    assert matrix.tolist() == [[3, 0], [1, 4]]
