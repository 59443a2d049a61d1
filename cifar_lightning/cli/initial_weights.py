"""The weights that `fit` and `tune` start from: those of --init_weights, or a warning of frozen layers without any."""

from pathlib import Path

from cifar_lightning.checkpoints.loading import load_weights
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.errors import UserError, remark
from cifar_lightning.formatting import printable
from cifar_lightning.runs.folder import shipped_models, suggest_shipped, weights_file
from cifar_lightning.training.module import ImageClassifier


def load_initial_weights(cli: TrainingCLI, model: ImageClassifier) -> None:
    """Load the weights of --init_weights; warn of frozen layers that have none."""
    if cli.settings.init_weights:
        given = Path(cli.settings.init_weights)
        try:
            file = weights_file(given)
            load_weights(model.model, file)
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
