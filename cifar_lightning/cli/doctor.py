"""What is installed, what the device can do, what `fit` would choose and why, and what to fix."""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

from cifar_lightning.data.download import ARCHIVES
from cifar_lightning.data.image_folder import holds_class_folders
from cifar_lightning.data.memory import choose_num_workers, free_device_bytes, free_host_bytes
from cifar_lightning.formatting import program, reason_of, shell_line
from cifar_lightning.runs.environment import describe_environment, version_of

_SHOWN = ("torch", "torchvision", "lightning", "torchmetrics")
_EXTRAS = ("onnx", "onnxscript", "onnxruntime", "litdata", "timm")
_NEEDED_BYTES = 1e9  # archive, what it unpacks to, and a few runs
_CIFAR_BYTES = 185e6  # decoded: 60,000 images of 3,072 bytes
_SHARED_BYTES = 2e8  # batches on their way from two workers


@dataclass
class Findings:
    """What was found on this machine."""

    rows: list[tuple[str, str]] = field(default_factory=list)  # label and text, in the order of printing
    stopping: list[str] = field(default_factory=list)  # problems that would stop `fit`, each with what to do
    hints: list[str] = field(default_factory=list)  # other problems


def examine(root: Path = Path("data"), *, batch_size: int) -> int:
    """Print what was found, what `fit` would choose and what to fix; return the number of problems that stop `fit`.

    `root` is where the data lies, or will.
    """
    found = look(root)
    found.rows.append(("batch size", f"{batch_size}: the default, whatever the device; --batch_size changes it"))
    for label, text in found.rows:
        print(f"{label:<13} {text}")
    print("\nTo fix" if found.stopping or found.hints else "\nNothing to fix.")
    for number, text in enumerate((*found.stopping, *found.hints), start=1):
        print(f"  {number}. {text}")
    return len(found.stopping)


def look(root: Path) -> Findings:
    """Return what can be found out, whatever is broken."""
    found = Findings()
    _look_at_packages(found)
    _look_at_machine(found, root)
    _look_at_data(found, root)
    _look_at_torch(found)
    return found


def _look_at_packages(found: Findings) -> None:
    found.rows.append(("Python", platform.python_version()))
    found.rows += [(name, version_of(name) or "not installed") for name in _SHOWN]
    extras = {name: version_of(name) for name in _EXTRAS}
    found.rows.append(("extras", ", ".join(f"{name} {version or '-'}" for name, version in extras.items())))
    if not all(extras.values()):
        found.hints.append("extras: pip install 'cifar-lightning[export,shards,timm]', for ONNX, shards and timm")
    if version_of("cifar-lightning") is None:
        found.hints.append("cifar-lightning is not installed: pip install -e . in a copy of the repository")
        return
    for text in importlib.metadata.requires("cifar-lightning") or []:
        requirement = Requirement(text)
        version = version_of(requirement.name)
        is_optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if is_optional and (version is None or requirement.name not in _EXTRAS):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            (found.hints if is_optional else found.stopping).append(
                f"{requirement.name} {version or 'missing'}, {requirement.specifier} is needed: "
                f"pip install {shell_line(f'{requirement.name}{requirement.specifier}')}"
            )


def _look_at_machine(found: Findings, root: Path) -> None:
    environment = describe_environment()
    found.rows.append(("CPU", f"{environment['cpu']}, {environment['num_usable_cpus']} cores"))
    found.rows.append(("memory", f"{free_host_bytes() / 1e9:.1f} GB free"))
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    disk_bytes = shutil.disk_usage(existing).free
    found.rows.append(("disk", f"{disk_bytes / 1e9:.1f} GB free"))
    if disk_bytes < _NEEDED_BYTES:
        found.stopping.append(
            "disk: too little for CIFAR-10 and runs; free some, or choose others with --data.root and --run_dir"
        )
    shared = Path("/dev/shm")
    if shared.exists() and shutil.disk_usage(shared).free < _SHARED_BYTES:
        found.hints.append("/dev/shm is small: keep --data.num_workers 0, or start the container with --shm-size 1g")


def _look_at_data(found: Findings, root: Path) -> None:
    sets = []
    for name, archive in ARCHIVES.items():
        path = root / archive.filename
        unfinished = path.with_name(f"{path.name}.part")
        if (root / archive.folder).is_dir():
            sets.append(f"{name} in {root / archive.folder}")
        elif path.is_file():
            sets.append(f"{name} as {path}, unpacked by the first fit")
        elif unfinished.is_file():
            done = unfinished.stat().st_size / archive.size_bytes
            sets.append(f"{name} partly downloaded ({done:.0%}): {program()} download --dataset {name} resumes it")
    if holds_class_folders(root):
        sets.append(f"class folders in {root}: --data.dataset folder --data.root {shell_line(root)}")
    found.rows += [("data", text) for text in sets or ["none found"]]
    if not sets:
        found.hints.append(f"no data: {program()} download, or --data.dataset synthetic, which needs none")


def _look_at_torch(found: Findings) -> None:
    driver = _nvidia_driver()
    try:
        import torch
        import torchvision  # noqa: F401 - only whether it fits torch

        from cifar_lightning.training.precision import default_precision

        on_cuda = torch.cuda.is_available()
        on_mps = torch.backends.mps.is_available() and not on_cuda
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        found.rows.append(("torch build", f"for {build}, {torch.get_num_threads()} threads on the CPU"))
        for index in range(torch.cuda.device_count() if on_cuda else 0):
            gpu = torch.cuda.get_device_properties(index)
            text = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, compute capability {gpu.major}.{gpu.minor}"
            found.rows.append(("GPU", text))
        if on_cuda:
            found.rows.append(("cuDNN", str(torch.backends.cudnn.version())))
        else:
            found.rows.append(("GPU", "Apple's, by MPS" if on_mps else "none that torch can use"))
        precision, why = default_precision(on_cuda, on_mps)
        device = torch.device("cuda" if on_cuda else "cpu")
        num_workers = choose_num_workers(_CIFAR_BYTES, free_device_bytes(device))
    except Exception as error:  # a broken installation may raise anything, and the rest must still be shown
        found.stopping.append(
            f"torch cannot be imported with torchvision ({reason_of(error)}): "
            "pip install --force-reinstall torch torchvision"
        )
        return
    if driver:
        found.rows.append(("NVIDIA driver", driver))
        if not on_cuda:
            found.hints.append(
                f"torch, built for {build}, sees no GPU under NVIDIA driver {driver}: look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES; https://pytorch.org/get-started has the build for each CUDA"
            )
    found.rows.append(("precision", f"{precision}: {why}"))
    fits = "does not fit" if num_workers else "fits"
    memory = "the GPU's free memory" if on_cuda else "the free memory"
    found.rows.append(("workers", f"{num_workers}: CIFAR-10 (185 MB) {fits} into half of {memory}"))


def _nvidia_driver() -> str:
    """Return the driver's version and the newest CUDA that it runs; empty where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = shutil.which("nvidia-smi") or "nvidia-smi"
        done = subprocess.run([command], capture_output=True, text=True, timeout=10, check=True)
        if found := re.search(r"Driver Version:\s*([\d.]+)(?:\s*CUDA Version:\s*([\d.]+))?", done.stdout):
            return f"{found[1]}, runs CUDA up to {found[2] or 'an unknown version'}"
    return "of unknown version" if Path("/proc/driver/nvidia/version").exists() else ""
