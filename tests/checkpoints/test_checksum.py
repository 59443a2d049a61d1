"""The checksum in a checkpoint."""

import hashlib
import io
import random
import zipfile

import pytest
import torch

from cifar_lightning.checkpoints.checksum import add_checksum, has_checksum, is_intact


@pytest.fixture(scope="module")
def archive():
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(1000.0), "name": "x"}, buffer)
    return add_checksum(buffer.getvalue())


def test_a_file_with_a_checksum_is_still_a_zip_archive_that_torch_reads(archive, tmp_path):
    path = tmp_path / "archive.ckpt"
    path.write_bytes(archive)
    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert read["weight"].tolist() == list(range(1000))
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.comment == b"sha256:" + hashlib.sha256(archive[: -len(file.comment)]).hexdigest().encode()


def test_each_of_500_damages_is_detected(archive):
    assert is_intact(archive)
    rng = random.Random(0)
    for _ in range(500):
        damaged = bytearray(archive)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        assert not is_intact(bytes(damaged))


def test_other_files_have_no_checksum(archive):
    assert not has_checksum(b"")
    assert not has_checksum(archive[:-1])
    assert not is_intact(archive[:-71])


def test_only_an_archive_without_a_comment_gets_a_checksum(archive):
    with pytest.raises(AssertionError):
        add_checksum(archive)
