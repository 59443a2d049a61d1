"""What is installed, what the device can do, what `fit` would choose and why, and how to fix what is wrong.

`look` finds the facts, and survives whatever is broken; the other functions only turn facts into lines.
"""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cifar_lightning.data.download import ARCHIVES
from cifar_lightning.data.memory import free_host_bytes
from cifar_lightning.runs.environment import describe_environment

_SHOWN = ("torch", "torchvision", "lightning", "torchmetrics")
_NEEDED_BYTES = 1e9  # archive, what it unpacks to, and a few runs
_CIFAR_BYTES = 185e6  # decoded: 60,000 images of 3,072 bytes
_SHARED_BYTES = 2e8  # batches on their way from two workers
# https://pytorch.org/get-started: the CUDA builds on offer, newest first.
_CUDA_BUILDS = ((13, 0), (12, 8), (12, 6))
_INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: name, memory in bytes, compute capability such as 9.0."""

    name: str
    memory_bytes: float
    capability: str


@dataclass(frozen=True)
class Facts:
    """What was found on this machine.

    Attributes:
        python: Version.
        cpu: Name of the processor.
        num_cores: That this process may use.
        free_bytes: Memory.
        disk_bytes: Free where runs and data go.
        shared_bytes: Free in /dev/shm; None where there is none.
        versions: Of packages; None: not installed.
        outdated: Requirements of this project that are not met, with what is there.
        torch_error: Why torch or torchvision cannot be imported; empty if they can.
        cuda_build: CUDA version that torch was built with; None: for CPUs alone.
        cudnn: Version; None without.
        gpus: That torch can use.
        num_threads: That torch takes; None where it cannot be imported.
        driver: NVIDIA driver's version; None where there is none.
        driver_cuda: Newest CUDA that the driver runs.
        data: A line for each data set found.
    """

    python: str = "3.12.0"
    cpu: str = "a processor"
    num_cores: int = 1
    free_bytes: float = 8e9
    disk_bytes: float = 1e11
    shared_bytes: float | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    outdated: tuple[str, ...] = ()
    torch_error: str = ""
    cuda_build: str | None = None
    cudnn: str | None = None
    gpus: tuple[Gpu, ...] = ()
    num_threads: int | None = None
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    data: tuple[str, ...] = ()


def examine(root: Path = Path("data"), *, batch_size: int) -> int:
    """Print what was found, what `fit` would choose and what to fix.

    Args:
        root: Where the data lies, or will.
        batch_size: The default of `fit`.

    Returns:
        The number of problems that would stop `fit`.
    """
    facts = look(root)
    for label, text in (*describe(facts), *choices(facts, batch_size)):
        print(f"{label:<13} {text}")
    stopping, hints = problems(facts)
    print("\nTo fix" if stopping or hints else "\nNothing to fix.")
    for number, text in enumerate((*stopping, *hints), start=1):
        print(f"  {number}. {text}")
    return len(stopping)


# -- facts to lines ----------------------------------------------------------------------------------------------------


def describe(facts: Facts) -> list[tuple[str, str]]:
    """Return (label, text) of what is there."""
    build = f"built for CUDA {facts.cuda_build}" if facts.cuda_build else "built for CPUs alone"
    rows = [("Python", facts.python)]
    for name in _SHOWN:
        version = facts.versions.get(name) or "not installed"
        rows.append((name, f"{version}, {build}" if name == "torch" and not facts.torch_error else version))
    rows += [
        ("GPU", f"{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB, compute capability {gpu.capability}")
        for gpu in facts.gpus
    ]
    if not facts.gpus:
        rows.append(("GPU", "none that torch can use"))
    if facts.driver:
        newest = f", runs CUDA up to {'.'.join(map(str, facts.driver_cuda))}" if facts.driver_cuda else ""
        rows.append(("NVIDIA driver", facts.driver + newest))
    if facts.cudnn:
        rows.append(("cuDNN", facts.cudnn))
    threads = f", torch takes {facts.num_threads} threads" if facts.num_threads else ""
    rows.append(("CPU", f"{facts.cpu}, {facts.num_cores} cores{threads}"))
    rows.append(("memory", f"{facts.free_bytes / 1e9:.1f} GB free"))
    enough = "enough for CIFAR-10" if facts.disk_bytes >= _NEEDED_BYTES else "too little for CIFAR-10 and runs"
    rows.append(("disk", f"{facts.disk_bytes / 1e9:.1f} GB free, {enough}"))
    rows += [("data", text) for text in facts.data or ("none found",)]
    rows.append(("extras", ", ".join(f"{name} {version or '-'}" for name, version in _extras(facts).items())))
    return rows


def choices(facts: Facts, batch_size: int) -> list[tuple[str, str]]:
    """Return (label, text) of what `fit` would choose, by the same rules, and why."""
    if facts.gpus:
        precision = "16-mixed: the GPU is faster in half precision"
        where, free = "the GPU's memory", facts.gpus[0].memory_bytes
    else:
        precision = "32-true: there is no GPU; bf16-mixed is faster on CPUs with AVX512-BF16 or AMX alone"
        where, free = "memory", facts.free_bytes
    resident = free / 2 > _CIFAR_BYTES
    fits = f"0: CIFAR-10 (185 MB) fits into half of {where}"
    workers = fits if resident else f"2: CIFAR-10 (185 MB) does not fit into half of {where} and is streamed"
    return [
        ("precision", precision),
        ("workers", workers),
        ("batch size", f"{batch_size}: the default, whatever the device; --batch_size changes it"),
    ]


def problems(facts: Facts) -> tuple[list[str], list[str]]:
    """Return what stops `fit`, and what is only worth fixing; each says how."""
    stopping, hints = list[str](), list[str]()
    if facts.torch_error:
        stopping.append(_torch_fix(facts))
    for text in facts.outdated:
        stopping.append(f"{text}: pip install -U cifar-lightning, or pip install -e . in a copy of the repository")
    if facts.disk_bytes < _NEEDED_BYTES:
        stopping.append("little disk: free some, or choose other folders with --data.root and --run_dir")
    if facts.driver and not facts.gpus and not facts.torch_error:
        hints.append(_gpu_fix(facts))
    if facts.shared_bytes is not None and facts.shared_bytes < _SHARED_BYTES:
        hints.append("/dev/shm is small: keep --data.num_workers 0, or start the container with --shm-size 1g")
    if not facts.data:
        hints.append("no data: python train.py download, or --data.dataset synthetic, which needs none")
    if not all(_extras(facts).values()):
        hints.append("extras: pip install 'cifar-lightning[export,timm]', for `export` and timm's models")
    return stopping, hints


def _torch_fix(facts: Facts) -> str:
    if "torchvision::nms" in facts.torch_error:
        return (
            "torch and torchvision are from different builds: "
            f"pip install --force-reinstall torch torchvision{_index(facts)}"
        )
    return f"torch cannot be imported ({facts.torch_error}): pip install --force-reinstall torch torchvision"


def _gpu_fix(facts: Facts) -> str:
    if facts.cuda_build is None:
        return (
            "an NVIDIA GPU, but torch is built for CPUs alone: "
            f"pip install --force-reinstall torch torchvision{_index(facts)}"
        )
    built = tuple(int(part) for part in facts.cuda_build.split(".")[:2])
    # Drivers run programs of newer minor versions of their CUDA, but not of the next major one.
    if facts.driver_cuda and facts.driver_cuda[0] < built[0]:
        return (
            f"the driver runs CUDA up to {facts.driver_cuda[0]}.{facts.driver_cuda[1]}, torch was built for "
            f"{facts.cuda_build}: a newer driver, or pip install --force-reinstall torch torchvision{_index(facts)}"
        )
    return "torch sees no GPU: look at nvidia-smi and at the environment variable CUDA_VISIBLE_DEVICES"


def _index(facts: Facts) -> str:
    """Return the option that gets the newest build that the driver runs; empty without a driver."""
    if not facts.driver:
        return ""
    newest = facts.driver_cuda or _CUDA_BUILDS[-1]
    major, minor = next((build for build in _CUDA_BUILDS if build <= newest), _CUDA_BUILDS[-1])
    return f" --index-url {_INDEX}/cu{major}{minor}"


def _extras(facts: Facts) -> dict[str, str | None]:
    return {name: facts.versions.get(name) for name in ("onnx", "onnxscript", "onnxruntime", "safetensors", "timm")}


# -- finding facts -----------------------------------------------------------------------------------------------------


def look(root: Path) -> Facts:
    """Find out what is there; what cannot be found out is left at its default."""
    environment = describe_environment()
    names = (*_SHOWN, "onnx", "onnxscript", "onnxruntime", "safetensors", "timm")
    driver, driver_cuda = _look_at_driver()
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    shared = Path("/dev/shm")
    return Facts(
        python=platform.python_version(),
        cpu=environment["cpu"],
        num_cores=environment["num_usable_cpus"],
        free_bytes=free_host_bytes(),
        disk_bytes=shutil.disk_usage(existing).free,
        shared_bytes=shutil.disk_usage(shared).free if shared.exists() else None,
        versions={name: _version(name) for name in names},
        outdated=tuple(_look_at_requirements()),
        driver=driver,
        driver_cuda=driver_cuda,
        data=tuple(_look_at_data(root)),
        **_look_at_torch(),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _look_at_requirements() -> list[str]:
    unmet = []
    for text in importlib.metadata.requires("cifar-lightning") or []:
        requirement = Requirement(text)
        version = _version(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} {version or 'missing'}, {requirement.specifier} is needed")
    return unmet


def _look_at_torch() -> dict[str, Any]:
    try:
        import torch
        import torchvision  # noqa: F401 - only whether it fits torch

        gpus = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            about = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(about.name, float(about.total_memory), f"{about.major}.{about.minor}"))
        cudnn = torch.backends.cudnn.version() if gpus else None  # type: ignore[no-untyped-call]  # torch has none
        return {
            "cuda_build": torch.version.cuda,
            "gpus": tuple(gpus),
            "cudnn": str(cudnn) if cudnn else None,
            "num_threads": torch.get_num_threads(),
        }
    except Exception as error:  # a broken installation may raise anything, and the rest must still be shown
        return {"torch_error": " ".join(str(error).split())[:200] or type(error).__name__}


def _look_at_driver() -> tuple[str | None, tuple[int, int] | None]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = shutil.which("nvidia-smi") or "nvidia-smi"
        done = subprocess.run([command], capture_output=True, text=True, timeout=10, check=True)
        driver = re.search(r"Driver Version:\s*([\d.]+)", done.stdout)
        cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", done.stdout)
        if driver:
            return driver[1], (int(cuda[1]), int(cuda[2])) if cuda else None
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return (found[1] if found else "unknown"), None
    return None, None


def _look_at_data(root: Path) -> list[str]:
    found = []
    for name, archive in ARCHIVES.items():
        path = root / archive.filename
        part = path.with_name(f"{path.name}.part")
        if (root / archive.folder).is_dir():
            found.append(f"{name} in {root / archive.folder}")
        elif path.is_file():
            found.append(f"{name} as {path}, unpacked by the first fit")
        elif part.is_file():
            share = part.stat().st_size / archive.size_bytes
            found.append(f"{name} half downloaded ({share:.0%}): python train.py download --dataset {name} resumes it")
    if (root / "train").is_dir() and (root / "test").is_dir():
        found.append(f"class folders in {root}: --data.dataset folder --data.root {root}")
    return found
