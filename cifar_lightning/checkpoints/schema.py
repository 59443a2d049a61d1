"""The schema version of a checkpoint, and the upgrade of older ones."""

from typing import Any

from cifar_lightning.runs.schema import SCHEMA_VERSION, upgrade_model_settings

SCHEMA_KEY = "cifar_lightning_schema"


def upgrade_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a Lightning checkpoint in the current schema; other files are returned as they are. Changes nothing."""
    if SCHEMA_KEY in checkpoint or "pytorch-lightning_version" not in checkpoint:
        return checkpoint
    upgraded = {**checkpoint, SCHEMA_KEY: SCHEMA_VERSION}
    for key in ("state_dict", "current_model_state"):  # the latter: raw weights of a run with EMA
        if isinstance(checkpoint.get(key), dict):
            upgraded[key] = {_renamed(name): value for name, value in checkpoint[key].items()}
    if isinstance(hparams := checkpoint.get("hyper_parameters"), dict):
        upgraded["hyper_parameters"] = upgrade_model_settings(hparams)
    return upgraded


def _renamed(name: str) -> str:
    return f"model.{name.removeprefix('network.')}" if name.startswith("network.") else name
