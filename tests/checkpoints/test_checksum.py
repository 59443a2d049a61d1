"""The hash that a checkpoint carries."""

import hashlib
import io
import random
import zipfile

import pytest
import torch

from cifar_lightning.checkpoints.checksum import has_seal, is_intact, seal


@pytest.fixture(scope="module")
def sealed():
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(1000.0), "name": "x"}, buffer)
    return seal(buffer.getvalue())


def test_a_sealed_file_is_still_a_zip_archive_that_torch_reads(sealed, tmp_path):
    path = tmp_path / "sealed.ckpt"
    path.write_bytes(sealed)
    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap)
        assert read["weight"].tolist() == list(range(1000))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(sealed[: -len(archive.comment)]).hexdigest().encode()


def test_each_of_many_damages_is_noticed(sealed):
    assert is_intact(sealed)
    rng = random.Random(0)
    for _ in range(500):
        damaged = bytearray(sealed)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        assert not is_intact(bytes(damaged))


def test_a_file_of_others_has_no_seal(sealed):
    assert not has_seal(b"")
    assert not has_seal(sealed[:-1])
    assert not is_intact(sealed[:-71])


def test_only_an_archive_without_a_comment_is_sealed(sealed):
    with pytest.raises(AssertionError):
        seal(sealed)
