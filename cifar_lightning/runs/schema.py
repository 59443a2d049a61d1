"""The schema version of a run's files, and the upgrade of older ones."""

from typing import Any

from cifar_lightning.settings.import_path import is_import_path

SCHEMA_VERSION = 2
"""Written to environment.json and to checkpoints; version 1 is not written in either.

1: settings `model.stem_share`, metric `accuracy_one_view`, parameters `network.*`.
2: settings `model.stem_train_fraction`, metric `accuracy_no_tta`, parameters `model.*`.
"""
CLASS_GROUPS = ("model", "data")
"""Groups of settings that are a class's arguments; model_class and data_class name a class of one's own."""
_RENAMED_SETTINGS = {"stem_share": "stem_train_fraction"}  # of `model`
_RENAMED_METRICS = {"accuracy_one_view": "accuracy_no_tta", "num_pictures": "num_images"}


def upgrade_config(config: Any) -> Any:
    """Return a config in the current schema, a class of one's own apart from its arguments.

    `model: {class_path: X, init_args: {...}}`, as LightningCLI writes it, becomes `model_class: X` and `model: {...}`;
    so does `model: X`.
    Anything but a config is returned as it is.
    """
    if not isinstance(config, dict):
        return config
    upgraded = dict(config)
    for group in CLASS_GROUPS:
        settings = config.get(group)
        if isinstance(settings, dict) and "class_path" in settings:
            given = dict(settings)
            init_args = given.pop("init_args", None) or {}
            if isinstance(init_args, dict):  # others are left to the parser, which refuses them
                upgraded[f"{group}_class"] = given.pop("class_path")
                upgraded[group] = init_args | given
        elif is_import_path(settings) and not str(settings).endswith((".yaml", ".yml", ".json")):
            upgraded[f"{group}_class"] = upgraded.pop(group)
    if isinstance(upgraded.get("model"), dict):
        upgraded["model"] = upgrade_model_settings(upgraded["model"])
    return upgraded


def upgrade_model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `ImageClassifier` in the current schema."""
    return {_RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}


def upgrade_test_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a test_metrics.json in the current schema."""
    return {_RENAMED_METRICS.get(name, name): value for name, value in metrics.items()}
