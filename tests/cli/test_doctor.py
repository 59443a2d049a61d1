"""Each thing that can be wrong with a machine is named with its mend; nothing that is broken breaks the doctor."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_lightning.cli import doctor
from cifar_lightning.cli.doctor import Facts, Gpu, choices, describe, problems
from cifar_lightning.data.download import ARCHIVES

EXTRAS = dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "safetensors", "timm"), "1.0")
VERSIONS = {"torch": "2.15.0", "torchvision": "0.29.2", "lightning": "2.6.6", "torchmetrics": "1.9.0", **EXTRAS}
GPU = Gpu("NVIDIA H200", 150e9, "9.0")


def machine(**facts):
    """A machine where nothing is wrong, but for what is given."""
    return Facts(**{"versions": VERSIONS, "data": ("cifar10 in data",), "num_threads": 2, **facts})


def test_a_sound_machine_has_nothing_to_mend():
    assert problems(machine()) == ([], [])
    assert problems(machine(gpus=(GPU,), cuda_build="13.0", driver="580.1", driver_cuda=(13, 0))) == ([], [])


@pytest.mark.parametrize(
    ("facts", "stops", "expected"),
    [
        ({"driver": "580.1", "driver_cuda": (13, 0)}, False, "--index-url https://download.pytorch.org/whl/cu130"),
        ({"driver": "560.1", "driver_cuda": (12, 7)}, False, "--index-url https://download.pytorch.org/whl/cu126"),
        ({"driver": "unknown"}, False, "built for CPUs alone: pip install --force-reinstall torch torchvision"),
        ({"driver": "560.1", "driver_cuda": (12, 8), "cuda_build": "13.0"}, False, "whl/cu128"),
        ({"driver": "580.1", "driver_cuda": (13, 0), "cuda_build": "13.2"}, False, "CUDA_VISIBLE_DEVICES"),
        ({"torch_error": "operator torchvision::nms does not exist"}, True, "different builds: pip install"),
        ({"torch_error": "libcudart.so: not found"}, True, "torch cannot be imported (libcudart.so: not found): pip"),
        ({"outdated": ("torch 2.1.0, >=2.10 is needed",)}, True, "torch 2.1.0, >=2.10 is needed: pip install -U"),
        ({"disk_bytes": 1e7}, True, "little disk"),
        ({"shared_bytes": 6.4e7}, False, "--shm-size"),
        ({"data": ()}, False, "python train.py download"),
        ({"versions": {**VERSIONS, "onnx": None}}, False, "cifar-lightning[export,timm]"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(facts, stops, expected):
    stopping, hints = problems(machine(**facts))
    (text,) = stopping + hints
    assert expected in text
    assert bool(stopping) is stops


def test_what_is_there_is_shown():
    rows = describe(machine(gpus=(GPU,), cuda_build="13.0", cudnn="91002", driver="580.1", driver_cuda=(13, 0)))
    text = "\n".join(f"{label} {line}" for label, line in rows)
    for part in ("NVIDIA H200, 150 GB, compute capability 9.0", "built for CUDA 13.0", "580.1, runs CUDA up to 13.0"):
        assert part in text
    assert "GPU none that torch can use" in "\n".join(f"{label} {line}" for label, line in describe(machine()))


def test_the_choices_are_those_of_fit_with_reasons():
    on_cpu, on_gpu = dict(choices(machine(), 128)), dict(choices(machine(gpus=(GPU,)), 128))
    assert on_cpu["precision"].startswith("32-true: ")
    assert on_gpu["precision"].startswith("16-mixed: ")
    assert on_cpu["workers"].startswith("0: ")
    assert dict(choices(machine(free_bytes=2e8), 128))["workers"].startswith("2: ")
    assert on_gpu["batch size"].startswith("128: ")


def test_data_is_found_in_every_form(tmp_path):
    assert doctor._look_at_data(tmp_path) == []
    archive = ARCHIVES["cifar10"]
    (tmp_path / f"{archive.filename}.part").write_bytes(bytes(17_049_807))
    assert "half downloaded (10%)" in doctor._look_at_data(tmp_path)[0]
    (tmp_path / archive.filename).touch()
    assert "unpacked by the first fit" in doctor._look_at_data(tmp_path)[0]
    (tmp_path / archive.folder).mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    found = doctor._look_at_data(tmp_path)
    assert found[0] == f"cifar10 in {tmp_path / archive.folder}"
    assert "--data.dataset folder" in found[1]


def test_a_driver_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0 |'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._look_at_driver() == ("580.65", (13, 0))
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._look_at_driver() == (None, None) or Path("/proc/driver/nvidia").exists()


def test_requirements_are_read_from_the_installed_project(monkeypatch):
    real = importlib.metadata.version
    assert doctor._look_at_requirements() == []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.5.0" if name == "lightning" else real(name))
    assert doctor._look_at_requirements() == ["lightning 2.5.0, <2.7,>=2.6.6 is needed"]


def run_doctor(tmp_path, monkeypatch):
    code = "from cifar_lightning.cli.doctor import examine; print('problems', examine(batch_size=128))"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_on_this_machine_the_versions_are_the_installed_ones(tmp_path, monkeypatch):
    done = run_doctor(tmp_path, monkeypatch)
    assert done.returncode == 0, done.stderr
    for name in ("torch", "lightning"):
        assert f"{importlib.metadata.version(name)}" in done.stdout
    assert "python train.py download" in done.stdout
    assert "problems 0" in done.stdout


def test_a_broken_torch_is_reported_beside_the_rest(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_doctor(tmp_path, monkeypatch)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported (libcudart.so.13: cannot open shared object file)" in done.stdout
    assert "problems 1" in done.stdout
    assert "memory" in done.stdout
