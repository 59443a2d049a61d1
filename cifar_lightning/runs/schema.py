"""The schema version of a run's files, and the upgrade of older ones."""

from typing import Any

SCHEMA_VERSION = 2
"""Written to environment.json and to checkpoints; version 1 is not written in either.

1: settings `model.stem_share`, metric `accuracy_one_view`, parameters `network.*`.
2: settings `model.stem_train_fraction`, metric `accuracy_no_tta`, parameters `model.*`.
"""
_RENAMED_SETTINGS = {"stem_share": "stem_train_fraction"}  # of `model`
_RENAMED_METRICS = {"accuracy_one_view": "accuracy_no_tta"}


def upgrade_config(config: Any) -> Any:
    """Return the content of a config.yaml in the current schema; anything else is returned as it is."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return config
    return {**config, "model": upgrade_model_settings(config["model"])}


def upgrade_model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `ImageClassifier` in the current schema."""
    return {_RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}


def upgrade_test_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a test_metrics.json in the current schema."""
    return {_RENAMED_METRICS.get(name, name): value for name, value in metrics.items()}
