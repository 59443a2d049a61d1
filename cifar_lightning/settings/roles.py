"""Roles of settings: what an optimizer reads, what a resumed run may change, what the report shows."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

READ_BY = {
    "adamw": ("weight_decay", "layer_decay"),
    "sgd": ("sgd_momentum", "weight_decay", "layer_decay"),
    "timm": ("weight_decay", "layer_decay"),
    "muon": ("sgd_lr", "head_lr", "momentum", "sgd_momentum", "sgd_weight_decay"),
}
"""The settings of the model that each optimizer reads, next to lr; "timm" stands for each of timm/NAME."""

OWN_OPTIMIZER = ("optimizer", "lr_scheduler")
"""Settings of an optimizer by its class, as LightningCLI has them, instead of those in `OF_OPTIMIZER`."""

OF_OPTIMIZER = {
    f"model.{name}" for name in ("lr", "optimizer", "schedule", "pct_start", *itertools.chain(*READ_BY.values()))
}
"""The settings that belong to the model's own optimizer and schedule."""
NOT_WITH_OPTIMIZER = "it is of the model's own optimizer; leave one of them out."

ONLY_CROSS_ENTROPY = "only cross_entropy uses it; give --model.loss_kwargs what {} takes."
"""The reason why a loss of one's own is refused with --model.label_smoothing."""


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config by their flags: "model.lr" for lr under model; a class of one's own is whole."""
    flat: dict[str, Any] = {}
    for group, settings in config.items():
        is_group = isinstance(settings, dict) and group not in OWN_OPTIMIZER
        flat |= {f"{group}.{name}": value for name, value in settings.items()} if is_group else {group: settings}
    return flat


def object_name(value: object) -> str:
    """Return what config.yaml has in the place of an object from Python, which no setting makes again."""
    return f"<{type(value).__name__}>"


def is_object_name(value: object) -> bool:
    """Whether a setting stands for an object from Python."""
    return isinstance(value, str) and value[:1] == "<" and value[-1:] == ">"


# -- resume; a setting that is in none of these sets may change -------------------------------------------------------

FIXED = {*OWN_OPTIMIZER, "model_class", "data_class", "seed_everything"}
FIXED |= {f"model.{name}" for name in ("name", "model_kwargs", "optimizer", "schedule", "ema_decay", "pretrained")}
FIXED |= {f"model.{name}" for name in ("loss", "freeze", "unfreeze_epoch", "layer_decay")}
FIXED |= {f"data.{name}" for name in ("dataset", "image_size", "resize", "in_channels", "seed", "order_seed")}
FIXED |= {"data.val_fraction", "data.test_fraction", "data.limit"}
"""Settings that the weights, the states of optimizer, schedule and random numbers, or the split depend on."""

_OF_STEPS = {"data.batch_size", "data.drop_last", "trainer.limit_train_batches", "trainer.overfit_batches"}
_OF_STEPS |= {"trainer.accumulate_grad_batches"}
MAKES_BATCHES = {*_OF_STEPS, "data.train_sizes", "data.sampler", "data.cache"}
"""Settings that an epoch's batches and steps depend on.

trainer.devices is not among them: the start of an epoch may move to other devices, and within an epoch `rng_state`
checks the number of processes.
"""

PLANS_SCHEDULE = _OF_STEPS | {f"trainer.{name}" for name in ("max_epochs", "max_steps", "devices", "num_nodes")}
PLANS_SCHEDULE |= {f"model.{name}" for name in ("lr", "sgd_lr", "head_lr", "pct_start", "stem_train_fraction")}
"""Settings that the learning rates of later steps depend on. Momentum and decay follow no schedule."""

# -- report and TensorBoard -------------------------------------------------------------------------------------------

AUGMENTATIONS = {"crop_padding_px", "flip", "cutout_px", "brightness", "contrast", "policy", "erasing"}
"""The fields of `transforms.augmentation.Augmentation` that change images by themselves."""


def augmentations(data: Mapping[str, Any]) -> list[str]:
    """Return name and value of the random augmentations that are on, and the names of transforms of one's own."""
    listed = data.get("transforms") or ["default"]
    own = [_class_name(each) for each in listed if each != "default"]
    named = switched_on(data, (name for name in data if name in AUGMENTATIONS)) if "default" in listed else []
    return [*named, *([f"transforms {', '.join(own)}"] if own else [])]


def _class_name(transform: Any) -> str:
    path = transform.get("class_path", "") if isinstance(transform, Mapping) else transform
    return str(path).rpartition(".")[2]


def switched_on(settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return name and value of the settings that are not 0, false or "none"."""
    return [f"{name} {settings[name]}" for name in names if settings.get(name) not in (None, 0, "none")]
