"""Shards in a bucket: trained from it as from a folder, also when a shard or the bucket was away."""

import json
import shutil

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from program import TINY, decode_here, start

from cifar_lightning.data import shards as shards_module
from cifar_lightning.data.image_folder import ClassFolders
from cifar_lightning.data.shard_writer import write_shards
from cifar_lightning.data.shards import Shards
from cifar_lightning.errors import RunError, UserError

pytestmark = pytest.mark.slow
BATCH = 10


@pytest.fixture
def root(tmp_path, monkeypatch):
    """About 17 shards of 12 training images."""
    decode_here(monkeypatch)
    random = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 10)):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for at in range(count):
                image = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(tmp_path / "data" / split / name / f"{at}.png")
    write_shards(ClassFolders(tmp_path / "data", 16), tmp_path / "shards", shard_bytes=10_000)
    return tmp_path / "shards"


def started(monkeypatch):
    """Start a server; all that run in this process have the same buckets."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    return server


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    server = started(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("CIFAR_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "_ATTEMPTS", 1)
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    yield server, client
    client.close()
    server.stop()


def upload(client, root):
    for path in root.rglob("*.*"):
        client.upload_file(str(path), "photos", f"set/{path.relative_to(root)}")


def results_of(run):
    rows = (run / "metrics.csv").read_text().splitlines()
    return rows, json.loads((run / "test_metrics.json").read_text())["accuracy"]


def stop_after(server, num_shards):
    """Let the server hand out some training shards and then be away, in the middle of a request."""
    answer, asked = server._server.app, []

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if "/train/chunk" in path and environ["REQUEST_METHOD"] == "GET":
            asked.append(path)
        if len(asked) > num_shards:
            server._server.shutdown()
            server._server.server_close()
            raise ConnectionAbortedError("away")
        return answer(environ, start_response)

    server._server.app = app


def test_a_fit_resumes_when_the_bucket_is_back_and_ends_as_from_a_folder(root, bucket, tmp_path, monkeypatch):
    server, client = bucket
    upload(client, root)
    stop_after(server, 10)  # a worker has 4 shards of its own and 4 ahead when the first batches are trained
    flags = ["--data.dataset", "shards", *TINY[2:], "--batch_size", BATCH, "--epochs", 2]
    flags += ["--data.num_workers", 1, "--trainer.num_sanity_val_steps", 0, "--checkpoint.every_n_train_steps", 1]
    stopped = start("fit", *flags, "--data.root", "s3://photos/set", "--run_dir", "run", cwd=tmp_path, check=False)
    assert stopped.returncode == 1, stopped.stderr
    assert "s3://photos/set/train/chunk-0-" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (tmp_path / "run/checkpoints/last.ckpt").exists(), "it was to stop in the middle of training"
    assert not (tmp_path / "run/test_metrics.json").exists()
    server = started(monkeypatch)
    start("fit", "--resume", "run", cwd=tmp_path)
    start("fit", *flags, "--data.root", root, "--run_dir", "local", cwd=tmp_path)
    assert results_of(tmp_path / "run") == results_of(tmp_path / "local")

    server.stop()
    with pytest.raises(UserError, match="s3://photos/set"):
        Shards("s3://photos/set")


def test_downloaded_shards_make_room_and_one_that_is_missing_or_cut_is_downloaded_again(root, bucket, monkeypatch):
    _, client = bucket
    upload(client, root)
    client.delete_object(Bucket="photos", Key="set/train/chunk-0-3.bin")
    with pytest.raises(RunError, match=r"s3://photos/set/train/chunk-0-3\.bin"):
        Shards("s3://photos/set").load("train").images[:]
    upload(client, root)
    ours, local = (Shards(place) for place in ("s3://photos/set", str(root)))
    images, expected = ours.load("train").images, local.load("train").images[:]
    folder = ours._place.cache / "train"
    with monkeypatch.context() as full:
        full.setattr(shards_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 0))
        assert np.array_equal(images[:], expected)
    assert len(list(folder.glob("*.bin"))) < images.num_shards
    (held,) = list(folder.glob("*.bin"))[:1]
    held.write_bytes(held.read_bytes()[:-1])
    with pytest.raises(UserError, match=held.name):
        ours.load("train").images[:]
    assert np.array_equal(ours.load("train").images[:], expected)
