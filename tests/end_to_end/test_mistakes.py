"""What a mistake on the command line or in the images is answered with, in process."""

import pytest
from PIL import Image
from program import fail

from cifar_lightning.data import download


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch_size", "4501"], ["--data.batch_size 4501", "4,500"]),
        (["--trainer.accelerator", "foo"], ["foo"]),
        (["--model.model_kwargs", "{depth: 3}"], ["depth"]),
        # Found when the folder had been made.
        (["--model.name", "speednet", "--data.image_size", "16", "--batch_size", "1"], ["--batch_size 1", "BatchNorm"]),
    ],
)
def test_a_mistake_gets_a_short_message_and_leaves_no_run(monkeypatch, capsys, tmp_path, arguments, expected):
    base = [] if "--data.dataset" in arguments else ["--data.dataset", "synthetic"]
    message = fail(monkeypatch, capsys, tmp_path, "fit", *base, *arguments)
    for part in expected:
        assert part in message


def test_without_network_and_data_the_message_names_every_way_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(download, "_urls", lambda archive: ("http://127.0.0.1:9/cifar-10-python.tar.gz",))
    message = fail(monkeypatch, capsys, tmp_path, "fit", "--data.root", "images")
    for part in ("cifar-10-python.tar.gz", "images", "CIFAR_LIGHTNING_CIFAR10_URL", "--data.dataset synthetic"):
        assert part in message


def test_an_unreadable_image_is_named(monkeypatch, capsys, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    (tmp_path / "own" / "train" / "b" / "2.png").write_bytes(b"not an image")
    arguments = [
        "fit",
        "--data.dataset",
        "folder",
        "--data.root",
        "own",
        "--batch_size",
        2,
        "--data.val_fraction",
        0.25,
    ]
    assert "2.png" in fail(monkeypatch, capsys, tmp_path, *arguments)
