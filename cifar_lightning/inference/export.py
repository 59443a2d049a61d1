"""A run's network as a file for elsewhere: ONNX, a torch.export archive, or safetensors; each read back and compared.

The file gets its name only after its answers equal PyTorch's on test images. ONNX and the archive take images, not
normalised tensors: whoever uses them cannot get the statistics wrong. Imports no Lightning.
"""

import contextlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from cifar_lightning.checkpoints.loading import load_weights
from cifar_lightning.errors import UserError
from cifar_lightning.files import check_output, replacing
from cifar_lightning.inference.trained_model import TrainedModel, load_trained_model
from cifar_lightning.models.registry import build_model
from cifar_lightning.report.model_card import NAME as CARD
from cifar_lightning.report.model_card import write_model_card
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.tta import tta_logits

ExportFormat = Literal["onnx", "torch", "safetensors"]
Images = UInt8[Tensor, "batch 3 height width"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
NUM_CHECKED = 256
TOLERANCE = 1e-4  # of a probability, between two runtimes in float32
_EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "safetensors": ("safetensors",)}


class ExportedModel(nn.Module):
    """A network with the treatment of images before it, the views of its run and, if asked for, softmax after it.

    Args:
        trained: The network and its statistics.
        input: "uint8" takes RGB 0-255, "float" takes RGB 0-1.
        probs: Also give probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trained: TrainedModel, input: Literal["uint8", "float"], probs: bool) -> None:
        super().__init__()
        self.model, self.views, self.probs = trained.model, trained.views, probs
        scale = 255 if input == "uint8" else 1
        self.register_buffer("mean", scale * torch.tensor(trained.mean).view(1, 3, 1, 1))
        self.register_buffer("std", scale * torch.tensor(trained.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (batch, classes), and probabilities of the same shape where they were asked for.

        Args:
            images: RGB (batch, 3, image_size, image_size), uint8 0-255 or float32 0-1.
        """
        logits, _ = tta_logits(self.model, (images.float() - self.mean) / self.std, self.views)
        return (logits, logits.softmax(1)) if self.probs else (logits,)


def export_run(
    run: RunFolder,
    kind: ExportFormat,
    *,
    output: Path | None = None,
    input: Literal["uint8", "float"] = "uint8",
    probs: bool = False,
    force: bool = False,
) -> Path:
    """Write a run's network to a file and say how far its answers are from PyTorch's.

    Args:
        run: A run with a checkpoint.
        kind: onnx, torch (a torch.export archive) or safetensors (weights alone, for `fit --init_weights`).
        output: Default: model.onnx, model.pt2 or model.safetensors in the run.
        input: What the graph takes: RGB as uint8 0-255 or float32 0-1, both (batch, 3, size, size), named `images`.
        probs: Whether the graph gives `probs` beside `logits`.
        force: Overwrite the output.

    Returns:
        The file.

    Raises:
        UserError: An argument is wrong, a package is missing, or the file cannot be written.
        RuntimeError: The file does not answer as PyTorch does; it is not kept.
    """
    path = output or run.path / FILES[kind]
    check_output(path, force)
    _check_extra(kind)
    if kind == "safetensors" and (probs or input != "uint8"):
        raise UserError("--probs and --input are for onnx and torch: safetensors holds weights alone, and no graph.")
    trained = load_trained_model(run)
    images, origin = images_to_check(run, trained.image_size)
    module = ExportedModel(trained, input, probs).eval()
    with replacing(path) as temporary, _without_noise():
        ask = _WRITERS[kind](module, trained, temporary, input)
        difference = _compare(trained, images, ask, input)
    graph = "" if kind == "safetensors" else f", images {input} (batch, 3, {trained.image_size}, {trained.image_size})"
    gives = "" if kind == "safetensors" else f" -> {', '.join(_outputs(probs))} (batch, {len(trained.class_names)})"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{graph}{gives}")
    print(f"Parity on {origin}: largest difference of a probability {difference:.1e}, every top-1 equal")
    _describe(run, trained, path, kind, input, probs)
    return path


def _describe(run: RunFolder, trained: TrainedModel, path: Path, kind: str, input: str, probs: bool) -> None:
    card = {
        "file": path.name,
        "format": kind,
        "checkpoint_sha256": trained.sha256,
        "class_names": list(trained.class_names),
        "image_size": trained.image_size,
        "epoch": trained.epoch,
        "views": trained.views,
        "images": "" if kind == "safetensors" else f"RGB, {'uint8 0-255' if input == 'uint8' else 'float32 0-1'}",
        "outputs": _outputs(probs),
    }
    written = write_model_card(run, card, path.parent)
    print(f"{written}: what it is" if written else f"{path.parent / CARD}: not of an export, left as it is")


def _outputs(probs: bool) -> list[str]:
    return ["logits", "probs"] if probs else ["logits"]


def metadata_of(trained: TrainedModel, input: str) -> dict[str, str]:
    """Return what a file says of itself, as text; lists and the architecture are JSON."""
    return {
        "class_names": json.dumps(trained.class_names),
        "image_size": str(trained.image_size),
        "input": f"RGB, {'uint8 0-255' if input == 'uint8' else 'float32 0-1'}, NCHW",
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "architecture": json.dumps(trained.architecture),
        "epoch": str(trained.epoch),
        "checkpoint_sha256": trained.sha256,
        "cifar_lightning": importlib.metadata.version("cifar-lightning"),
    }


# -- the three kinds: write a file, return a function that asks it -------------------------------------------------

Ask = Callable[[Tensor], Tensor]  # images as the graph takes them -> logits


def _write_onnx(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Ask:
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        module,
        (_example(trained, input),),
        dynamo=True,
        input_names=["images"],
        output_names=_outputs(module.probs),
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for key, value in metadata_of(trained, input).items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Ask:
    # A batch of one would be taken for a constant.
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(module, (_example(trained, input),), dynamic_shapes=shapes)
    text = json.dumps(metadata_of(trained, input), indent=2)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"metadata.json": text})
    with path.open("rb") as archive:
        loaded = torch.export.load(archive).module()

    def ask(images: Tensor) -> Tensor:
        logits: Tensor = loaded(images)[0]
        return logits

    return ask


def _write_safetensors(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Ask:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    path.write_bytes(save(weights, metadata_of(trained, input)))
    model = build_model(**trained.architecture).eval()
    load_weights(model, path)
    read_back = ExportedModel(replace(trained, model=model), "uint8", probs=False)

    def ask(images: Tensor) -> Tensor:
        logits: Tensor = read_back(images)[0]
        return logits

    return ask


_WRITERS: dict[str, Callable[[ExportedModel, TrainedModel, Path, str], Ask]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "safetensors": _write_safetensors,
}


def _example(trained: TrainedModel, input: str) -> Tensor:
    size = (2, 3, trained.image_size, trained.image_size)  # two: a batch of one would be taken for a constant
    return torch.zeros(size, dtype=torch.uint8 if input == "uint8" else torch.float32)


# -- parity ----------------------------------------------------------------------------------------------------------


def images_to_check(run: RunFolder, image_size: int) -> tuple[Images, str]:
    """Return `NUM_CHECKED` images (NCHW, 0-255) and where they are from: the run's gallery, then random ones."""
    kept = np.empty((0, image_size, image_size, 3), np.uint8)
    if run.gallery.is_file():
        try:
            with np.load(run.gallery) as gallery:
                kept = gallery["images"][:NUM_CHECKED]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{run.gallery}: damaged ({error}); python train.py test {run.path} makes it.") from error
    missing = NUM_CHECKED - len(kept)
    shape = (missing, image_size, image_size, 3)
    made = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    parts = [f"{len(kept)} test images"] * bool(len(kept)) + [f"{missing} random images"] * bool(missing)
    return torch.from_numpy(np.concatenate([kept, made])).permute(0, 3, 1, 2).contiguous(), " and ".join(parts)


def _compare(trained: TrainedModel, images: Images, ask: Ask, input: str) -> float:
    """Return the largest difference of a probability between a file's answers and PyTorch's.

    Raises:
        RuntimeError: It is too large, or changes a class.
    """
    expected = trained.logits(images.permute(0, 2, 3, 1)).softmax(1)
    given = images if input == "uint8" else images.float() / 255
    with torch.inference_mode():
        # Several sizes of a batch: one of them may have become a constant of the graph.
        answers = torch.cat([ask(part) for part in torch.split(given, [1, 7, len(given) - 8])]).softmax(1)
    difference = float((answers - expected).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the file does not answer as PyTorch does: a probability differs by {difference:.1e}.")
    if not torch.equal(answers.argmax(1), expected.argmax(1)):
        raise RuntimeError("the file does not answer as PyTorch does: the class of an image differs.")
    return difference


# -- packages --------------------------------------------------------------------------------------------------------


def _check_extra(kind: str) -> None:
    missing = []
    for package in _EXTRA[kind]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UserError(
            f"--format {kind} needs {', '.join(missing)}: pip install 'cifar-lightning[export]'\n"
            "In a copy of the repository: pip install -e '.[export]'"
        )


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Silence the exporters' remarks on torch's and onnxscript's own insides, which nobody here can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
