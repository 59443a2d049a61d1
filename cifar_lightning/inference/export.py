"""Export of a run's model to ONNX, a torch.export archive or safetensors.

Each file is read back and compared with PyTorch on test images before it gets its name. ONNX and torch.export models
take images and normalise them, so that users need no statistics. Imports no Lightning.
"""

import contextlib
import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from cifar_lightning.checkpoints.loading import load_weights
from cifar_lightning.checkpoints.schema import TEMPERATURE
from cifar_lightning.data.memory import is_out_of_memory
from cifar_lightning.errors import RunError, UserError, silenced
from cifar_lightning.files import check_output, replacing
from cifar_lightning.formatting import reason_of
from cifar_lightning.inference.trained_model import TrainedModel, load_trained_model
from cifar_lightning.models.registry import build_model
from cifar_lightning.report.model_card import NAME as CARD
from cifar_lightning.report.model_card import write_model_card
from cifar_lightning.report.results import read_predictions
from cifar_lightning.report.temperature import temperature_of
from cifar_lightning.runs.contents import read_gallery
from cifar_lightning.runs.environment import package_version
from cifar_lightning.runs.folder import RunFolder, refuse_file_of_run
from cifar_lightning.training.tta import tta_logits

ExportFormat = Literal["onnx", "torch", "safetensors"]
Images = UInt8[Tensor, "batch channels height width"]
# Of the batches that are compared. Several, as a traced one may have become a constant of the graph; large images fit
# into memory 31 at a time, but not all at once.
_SIZES = [1, 7, *[31] * 8]
NUM_CHECKED = sum(_SIZES)
TOLERANCE = 1e-4  # of a probability, between two runtimes in float32
HALF_TOLERANCE = 1e-2  # the same, of weights that are rounded to 11 binary digits
_OF_ONNX = ("onnx", "onnxscript", "onnxruntime")


class ExportedModel(nn.Module):
    """A trained model with normalization, the TTA of its run and, optionally, softmax.

    Args:
        trained: Model and preprocessing.
        input: "uint8" for 0-255, "float" for 0-1.
        probs: Also return probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trained: TrainedModel, input: Literal["uint8", "float"], probs: bool) -> None:
        super().__init__()
        self.model, self.tta, self.probs, self.temperature = trained.model, trained.tta, probs, trained.temperature
        scale = 255 if input == "uint8" else 1
        self.register_buffer("mean", scale * torch.tensor(trained.mean).view(1, -1, 1, 1))
        self.register_buffer("std", scale * torch.tensor(trained.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits (batch, classes) and, if `probs`, probabilities of the same shape.

        Args:
            images: RGB or gray (batch, channels, image_size, image_size), uint8 0-255 or float32 0-1.
        """
        logits, _ = tta_logits(self.model, (images.float() - self.mean) / self.std, self.tta)
        if self.temperature != 1:
            logits = logits / self.temperature
        return (logits, logits.softmax(1)) if self.probs else (logits,)


def export_run(
    run: RunFolder,
    kind: ExportFormat,
    *,
    output: Path | None = None,
    input: Literal["uint8", "float"] = "uint8",
    probs: bool = False,
    calibrated: bool = False,
    half: bool = False,
    force: bool = False,
    trust_code: bool = False,
) -> Path:
    """Export a run's model to a file and print how far its probabilities are from PyTorch's.

    Args:
        run: A run with a checkpoint or exported weights, or a model that comes with the package.
        kind: onnx, torch (a torch.export archive) or safetensors (weights and what makes the model again).
        output: Default: model.onnx, model.pt2 or model.safetensors in the run; of a model that comes with the package,
            its name in the working directory.
        input: Input `images` (batch, channels, size, size) of the graph: as uint8 0-255 or float32 0-1.
        probs: Add an output `probs` to `logits`.
        calibrated: Divide the logits by the run's temperature.
        half: Of safetensors: weights in float16, a file of half the size.
        force: Overwrite the file.
        trust_code: Import a model of one's own, which the checkpoint names.

    Returns:
        Path of the file.

    Raises:
        UserError: An argument is wrong, a package is missing, the format cannot hold the model, or the file cannot be
            written.
        RunError: The predictions of the file differ from PyTorch's; it is deleted.
    """
    path = {"onnx": run.exported_onnx, "torch": run.exported_program}.get(kind, run.exported_weights)
    path = output or (Path(f"{run.path.name}{path.suffix}") if run.is_shipped else path)
    refuse_file_of_run(path)
    check_output(path, force)
    if kind == "onnx":
        _check_extra()
    if kind == "safetensors" and (probs or calibrated or input != "uint8"):
        raise UserError("--probs, --calibrated and --input are for onnx and torch; safetensors has weights only.")
    if half and kind != "safetensors":
        raise UserError("--half: is for safetensors; the graph of onnx and torch computes in float32.")
    trained = load_trained_model(run, trust_code=trust_code, calibrated=calibrated)
    images, origin = images_to_check(run, trained.image_size, trained.in_channels)
    module = ExportedModel(trained, input, probs).eval()
    exporters = silenced("torch", "onnxscript", "onnx_ir")  # they warn of their own internals
    written = replace(trained, model=copy.deepcopy(trained.model).half()) if half else trained
    if kind == "safetensors" and run.predictions_val.is_file():
        written = replace(written, fitted_temperature=temperature_of(read_predictions(run.predictions_val))[0])
    with replacing(path) as temporary, exporters, warnings.catch_warnings(action="ignore"), _explained(kind):
        run_exported = _WRITERS[kind](module, written, temporary, input)
        difference, num_equal = _compare(trained, images, run_exported, input, HALF_TOLERANCE if half else TOLERANCE)
    shape = f"(batch, {trained.in_channels}, {trained.image_size}, {trained.image_size})"
    graph = "" if kind == "safetensors" else f", images {input} {shape}"
    outputs = "" if kind == "safetensors" else f" -> {', '.join(_outputs(probs))} (batch, {len(trained.class_names)})"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB{graph}{outputs}{_divided(trained)}")
    equal = "all" if num_equal == len(images) else f"{num_equal} of {len(images)}"
    print(f"Parity on {origin}: largest difference of a probability {difference:.1e}, {equal} top-1 predictions equal")
    if trained.checkpoint != run.exported_weights:
        _describe(run, trained, path, kind, input, probs)
    elif (run.path / CARD).is_file():  # it has test results, which a card of exported weights alone would lack
        print(f"{run.path / CARD}: model card")
    return path


@contextlib.contextmanager
def _explained(kind: ExportFormat) -> Iterator[None]:
    """Raise as `UserError` what the exporters raise, which may be anything for a model of one's own."""
    try:
        yield
    except (MemoryError, OSError, RunError, UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or "Failed to allocate memory" in str(error):  # ONNX Runtime's
            raise RunError("out of memory while the file was made and compared with PyTorch; it is deleted.") from error
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"--format {kind}: cannot hold this model ({type(cause).__name__}: {reason_of(cause)}).\n"
            "Its forward must not depend on values or on the number of images, as by if and loops."
        ) from error


def _describe(run: RunFolder, trained: TrainedModel, path: Path, kind: str, input: str, probs: bool) -> None:
    card = {
        "file": path.name,
        "format": kind,
        "checkpoint_sha256": trained.sha256,
        "class_names": list(trained.class_names),
        "image_size": trained.image_size,
        "resize": trained.resize,
        "epoch": trained.epoch,
        "tta": trained.tta,
        "in_channels": trained.in_channels,
        "images": "" if kind == "safetensors" else _input(trained, input),
        "outputs": [f"logits{_divided(trained)}", *_outputs(probs)[1:]],
    }
    written = write_model_card(run, card, path.parent)
    print(f"{written}: model card" if written else f"{path.parent / CARD}: not a model card, not overwritten")


def _input(trained: TrainedModel, input: str) -> str:
    return f"{'RGB' if trained.in_channels == 3 else 'gray'}, {'uint8 0-255' if input == 'uint8' else 'float32 0-1'}"


def _outputs(probs: bool) -> list[str]:
    return ["logits", "probs"] if probs else ["logits"]


def _divided(trained: TrainedModel) -> str:
    return "" if trained.temperature == 1 else f" (divided by the temperature {trained.temperature:.4g})"


def metadata_of(trained: TrainedModel, input: str) -> dict[str, str]:
    """Return the metadata of a file as text; lists and the architecture are JSON."""
    return {
        "class_names": json.dumps(trained.class_names),
        "image_size": str(trained.image_size),
        "resize": trained.resize,
        "input": f"{_input(trained, input)}, NCHW",
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "architecture": json.dumps(trained.architecture),
        "tta": trained.tta,
        "memory_format": trained.memory_format,
        "epoch": str(trained.epoch),
        "checkpoint_sha256": trained.sha256,
        "temperature": str(trained.temperature),
        **({} if trained.fitted_temperature is None else {TEMPERATURE: str(trained.fitted_temperature)}),
        "cifar_lightning": str(package_version()),
    }


# -- formats: write a file, read it back and return its function -----------------------------------------------------

Exported = Callable[[Tensor], Tensor]  # images in the format of `input` -> logits


def _write_onnx(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Exported:
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


def _write_torch(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Exported:
    # A batch of one would be traced as a constant.
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(module, (_example(trained, input),), dynamic_shapes=shapes)
    text = json.dumps(metadata_of(trained, input), indent=2)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"metadata.json": text})
    with path.open("rb") as archive:
        loaded = torch.export.load(archive).module()

    return lambda images: cast(Tensor, loaded(images)[0])


def _write_safetensors(module: ExportedModel, trained: TrainedModel, path: Path, input: str) -> Exported:
    from safetensors.torch import save

    weights = {  # copies, as safetensors refuses weights that two layers share
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in trained.model.state_dict().items()
    }
    path.write_bytes(save(weights, metadata_of(trained, input)))
    model = build_model(**trained.architecture).eval()
    load_weights(model, path)
    read_back = ExportedModel(replace(trained, model=model), "uint8", probs=False)

    return lambda images: cast(Tensor, read_back(images)[0])


_WRITERS: dict[str, Callable[[ExportedModel, TrainedModel, Path, str], Exported]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "safetensors": _write_safetensors,
}


def _example(trained: TrainedModel, input: str) -> Tensor:
    num_images = 2  # a batch of one would be traced as a constant
    size = (num_images, trained.in_channels, trained.image_size, trained.image_size)
    return torch.zeros(size, dtype=torch.uint8 if input == "uint8" else torch.float32)


# -- parity ----------------------------------------------------------------------------------------------------------


def images_to_check(run: RunFolder, image_size: int, in_channels: int) -> tuple[Images, str]:
    """Return `NUM_CHECKED` images (NCHW, 0-255), of the run's gallery and then random ones, and a description."""
    saved = np.empty((0, image_size, image_size, in_channels), np.uint8)
    if run.gallery.is_file():
        saved = read_gallery(run.gallery)[0][:NUM_CHECKED]
        if saved.shape[1:] != (image_size, image_size, in_channels):
            raise UserError(f"{run.gallery}: images of another size than {image_size}; run test {run.path} again.")
    missing = NUM_CHECKED - len(saved)
    shape = (missing, image_size, image_size, in_channels)
    random = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    origins = [f"{len(saved)} test images"] * bool(len(saved)) + [f"{missing} random images"] * bool(missing)
    return torch.from_numpy(np.concatenate([saved, random])).permute(0, 3, 1, 2).contiguous(), " and ".join(origins)


def _compare(
    trained: TrainedModel, images: Images, exported: Exported, input: str, tolerance: float
) -> tuple[float, int]:
    """Return the largest difference of a probability from PyTorch's, and the number of equal top-1 predictions."""
    expected = torch.cat([trained.logits(batch) for batch in images.permute(0, 2, 3, 1).split(_SIZES[-1])]).softmax(1)
    inputs = images if input == "uint8" else images.float() / 255
    with torch.inference_mode():
        probs = torch.cat([exported(batch) for batch in inputs.split(_SIZES)]).softmax(1)
    difference = float((probs - expected).abs().max())
    num_equal = int((probs.argmax(1) == expected.argmax(1)).sum())
    if not difference <= tolerance or (tolerance == TOLERANCE and num_equal < len(images)):
        way_out = "Does the model draw random numbers in eval mode?" if tolerance == TOLERANCE else "Leave --half out."
        raise RunError(
            f"the predictions of the file differ from PyTorch's: a probability by {difference:.1e}; it is deleted.\n"
            f"{way_out}"
        )
    return difference, num_equal


# -- packages --------------------------------------------------------------------------------------------------------


def _check_extra() -> None:
    if missing := [package for package in _OF_ONNX if importlib.util.find_spec(package) is None]:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install 'cifar-lightning[export]'\n"
            "In a copy of the repository: pip install -e '.[export]'"
        )
