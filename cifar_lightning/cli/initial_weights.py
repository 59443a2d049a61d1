"""The weights that `fit` and `tune` start from: those of --init_weights, or a warning of frozen layers without any."""

from pathlib import Path
from typing import Any

from cifar_lightning.checkpoints.loading import load_weights, read_checkpoint
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import clipped, printable
from cifar_lightning.models.state_dicts import find_weights
from cifar_lightning.runs.folder import shipped_models, suggest_shipped, weights_file
from cifar_lightning.training.module import ImageClassifier


def load_initial_weights(cli: TrainingCLI, model: ImageClassifier) -> None:
    """Load the weights of --init_weights; warn of frozen layers that have none."""
    if cli.settings.init_weights:
        given = Path(cli.settings.init_weights)
        try:
            file = weights_file(given)
            checkpoint = None if file.suffix == ".safetensors" else read_checkpoint(file)
            load_weights(model.model, file, checkpoint)
            _load_others(model, file, checkpoint or {})
        except UserError as error:
            raise UserError(f"--init_weights {given}: {error}{suggest_shipped(given)}") from error
        remark(printable(f"Initialized with the weights of {file}."))
        return
    settings = cli.settings.model
    is_ours = bool(model.hparams["name"]) and model.imported is None  # a model of one's own may have its weights
    if is_ours and settings.get("freeze") and not (settings.get("pretrained") or cli.settings.ckpt_path):
        source = f" {model.hparams['name']}" if model.hparams["name"] in shipped_models() else ""
        remark(
            f"warning: --model.freeze {settings.freeze}: the weights that are not trained are random; give "
            f"--model.pretrained{source}, or --init_weights."
        )


def _load_others(module: ImageClassifier, file: Path, checkpoint: dict[str, Any]) -> None:
    """Load the weights of a subclass or loss next to the model from a checkpoint that has them; name the others.

    Buffers of the loss that are its arguments, such as class weights, are settings and not loaded.
    """
    settings = {f"loss_function.{name}" for name in module.hparams.get("loss_kwargs") or ()}
    names = [name for name in module.state_dict() if not name.startswith("model.") and name not in settings]
    if not names:
        return
    ours, theirs = module.state_dict(), find_weights(checkpoint)
    if not any(name.startswith("model.") for name in theirs):  # of a model alone, where equal names are others
        theirs = {}
    fitting = {name: theirs[name] for name in names if name in theirs and theirs[name].shape == ours[name].shape}
    module.load_state_dict(fitting, strict=False)
    if others := [name for name in names if name not in fitting]:
        listed = clipped(", ".join(others))
        remark(printable(f"remark: --init_weights {file} has no {listed} of their shapes; these start untrained."))
