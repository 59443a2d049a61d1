"""Each problem of a machine is listed with what to do; nothing that is broken stops the doctor."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cifar_lightning.cli import doctor
from cifar_lightning.data.download import ARCHIVES
from cifar_lightning.training.precision import default_precision


@pytest.fixture(autouse=True)
def sound_machine(monkeypatch):
    """Without problems and without a GPU, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e11))


@pytest.fixture
def root(tmp_path):
    """Where CIFAR-10 lies."""
    (tmp_path / ARCHIVES["cifar10"].folder).mkdir()
    return tmp_path


def row(found, label):
    return [text for name, text in found.rows if name == label]


def plug_in_gpu(monkeypatch, free_bytes=100e9):
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 150e9))


def test_a_sound_machine_has_nothing_to_fix(root):
    found = doctor.look(root)
    assert (found.stopping, found.hints) == ([], [])
    assert row(found, "GPU") == ["none that torch can use"]
    assert row(found, "torch") == [importlib.metadata.version("torch")]


def test_small_disk_stops_and_small_shared_memory_does_not(root, monkeypatch):
    def usage(path):
        return SimpleNamespace(free=6.4e7 if Path(path) == small else 1e11)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    small = root
    (text,) = doctor.look(root).stopping
    assert "--run_dir" in text
    if Path("/dev/shm").exists():
        small = Path("/dev/shm")
        found = doctor.look(root)
        assert found.stopping == []
        assert "--shm-size" in found.hints[0]


def test_a_driver_without_a_usable_gpu_is_a_hint(root, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "580.1, runs CUDA up to 13.0")
    (text,) = doctor.look(root).hints
    assert "580.1" in text
    assert "CUDA_VISIBLE_DEVICES" in text
    plug_in_gpu(monkeypatch)
    assert doctor.look(root).hints == []


def test_choices_are_those_of_fit(root, monkeypatch):
    monkeypatch.setattr("cifar_lightning.data.memory.free_host_bytes", lambda: 8e9)
    on_cpu = doctor.look(root)
    chosen = default_precision(on_cuda=False)
    plug_in_gpu(monkeypatch)
    on_gpu = doctor.look(root)
    assert row(on_cpu, "precision") == [": ".join(chosen)]
    assert row(on_gpu, "precision")[0].startswith("16-mixed: ")
    assert row(on_gpu, "GPU") == ["NVIDIA H200, 150 GB, compute capability 9.0"]
    assert row(on_cpu, "workers")[0].startswith("0: ")
    assert row(on_gpu, "workers")[0].startswith("0: ")
    plug_in_gpu(monkeypatch, free_bytes=2e8)
    monkeypatch.setattr("cifar_lightning.data.memory.usable_cpus", lambda: 1)
    assert row(doctor.look(root), "workers")[0].startswith("1: ")


def test_apples_gpu_is_named_and_computes_in_float32(root, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = doctor.look(root)
    assert row(found, "GPU") == ["Apple's, by MPS"]
    assert row(found, "precision")[0].startswith("32-true: ")


def test_data_is_found_in_every_form(tmp_path):
    def found():
        return row(doctor.look(tmp_path), "data")

    assert found() == ["none found"]
    assert "cifar-lightning download" in doctor.look(tmp_path).hints[0]
    archive = ARCHIVES["cifar10"]
    (tmp_path / f"{archive.filename}.part").write_bytes(bytes(17_049_807))
    assert "partly downloaded (10%)" in found()[0]
    (tmp_path / archive.filename).touch()
    assert "unpacked by the first fit" in found()[0]
    (tmp_path / archive.folder).mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").touch()
    assert found()[0] == f"cifar10 in {tmp_path / archive.folder}"
    assert "--data.dataset folder" in found()[1]
    assert "--data.dataset folder" in row(doctor.look(tmp_path / "train"), "data")[0]  # no splits of their own


def test_outdated_and_missing_packages_are_listed(root, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "onnx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.5.0" if name == "lightning" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.look(root)
    (text,) = found.stopping
    assert text.startswith("lightning 2.5.0, <2.7,>=2.6.6 is needed: pip install")
    assert "cifar-lightning[export,shards,timm]" in found.hints[0]


def test_an_extra_of_an_excluded_version_is_a_hint(root, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.20.1" if name == "onnx" else real(name))
    found = doctor.look(root)
    assert found.stopping == []
    assert found.hints == ["onnx 1.20.1, >=1.21 is needed: pip install 'onnx>=1.21'"]


def test_a_folder_is_named_as_a_shell_reads_it(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        (tmp_path / "my photos" / name / "1.png").touch()
    (text,) = row(doctor.look(tmp_path / "my photos"), "data")
    assert text.endswith(f"--data.root '{tmp_path / 'my photos'}'")


def run_doctor(tmp_path, code):
    code = f"from cifar_lightning.cli import doctor; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_the_driver_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0 |'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run_doctor(tmp_path, "print(doctor._nvidia_driver())").stdout == "580.65, runs CUDA up to 13.0\n"
    fake.write_text("#!/bin/sh\nexit 9\n")
    found = run_doctor(tmp_path, "print(doctor._nvidia_driver())").stdout.strip()
    assert bool(found) == Path("/proc/driver/nvidia/version").exists()


@pytest.mark.parametrize("module", ["torch", "torchvision"])
def test_a_broken_torch_is_reported_with_the_rest(tmp_path, monkeypatch, module):
    (tmp_path / f"{module}.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = run_doctor(tmp_path, "print('problems', doctor.examine(batch_size=128))")
    assert done.returncode == 0, done.stderr
    assert "(libcudart.so.13: cannot open shared object file): pip install" in done.stdout
    assert "problems 1" in done.stdout
    assert "memory" in done.stdout
