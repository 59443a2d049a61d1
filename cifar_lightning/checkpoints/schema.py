"""The form of a checkpoint: its schema version, and the one place that reads older forms."""

from typing import Any

SCHEMA_VERSION = 2
"""1, without a version in the file: parameters are called `network.*`. 2: `model.*`, as `self.model` of the module."""
SCHEMA_KEY = "cifar_lightning_schema"
_RENAMED_HPARAMS = {"stem_share": "stem_train_fraction"}


def upgrade_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a run's checkpoint in the form of today; what is not of a run is returned as it is.

    Args:
        checkpoint: As it was saved; stays as it is.
    """
    if checkpoint.get(SCHEMA_KEY, 1) >= SCHEMA_VERSION or "cifar_lightning" not in checkpoint:
        return checkpoint
    upgraded = {**checkpoint, SCHEMA_KEY: SCHEMA_VERSION}
    for states in ("state_dict", "current_model_state"):
        if isinstance(checkpoint.get(states), dict):
            upgraded[states] = {
                f"model.{name.removeprefix('network.')}" if name.startswith("network.") else name: value
                for name, value in checkpoint[states].items()
            }
    hparams = checkpoint.get("hyper_parameters")
    if isinstance(hparams, dict):
        upgraded["hyper_parameters"] = {_RENAMED_HPARAMS.get(name, name): value for name, value in hparams.items()}
    return upgraded
