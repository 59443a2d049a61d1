"""The hash that a checkpoint carries."""

import hashlib
import io
import random
import zipfile

import pytest
import torch

from cifar_lightning.checkpoints.checksum import add_checksum, has_checksum, is_intact


@pytest.fixture(scope="module")
def has_sum():
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(1000.0), "name": "x"}, buffer)
    return add_checksum(buffer.getvalue())


def test_a_sealed_file_is_still_a_zip_archive_that_torch_reads(has_sum, tmp_path):
    path = tmp_path / "has_sum.ckpt"
    path.write_bytes(has_sum)
    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert read["weight"].tolist() == list(range(1000))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(has_sum[: -len(archive.comment)]).hexdigest().encode()


def test_each_of_many_damages_is_noticed(has_sum):
    assert is_intact(has_sum)
    rng = random.Random(0)
    for _ in range(500):
        damaged = bytearray(has_sum)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        assert not is_intact(bytes(damaged))


def test_a_file_of_others_has_no_seal(has_sum):
    assert not has_checksum(b"")
    assert not has_checksum(has_sum[:-1])
    assert not is_intact(has_sum[:-71])


def test_only_an_archive_without_a_comment_is_sealed(has_sum):
    with pytest.raises(AssertionError):
        add_checksum(has_sum)
