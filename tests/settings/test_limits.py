"""Values outside the limits in an annotation are refused by flag, from Python as from the command line."""

import math
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.cli.flags import table
from cifar_lightning.settings.limits import check_settings
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping
from cifar_lightning.training.last_checkpoint import CheckpointSchedule

OWNERS = {
    "model": ImageClassifier,
    "data": ImageDataModule,
    "early_stopping": AnnealingEarlyStopping,
    "checkpoint": CheckpointSchedule,
}


@pytest.mark.parametrize(
    ("flag", "taken", "refused"),
    [
        ("model.lr", [1e-9, 3e-3, 100], [0, -1, 1e300, math.nan, math.inf, "3e-3"]),
        ("model.weight_decay", [0, 0.5], [-0.1, 1e300, math.nan, math.inf]),
        ("model.mixup", [0, 0.2], [-0.1, 1e300]),
        ("data.cutout_px", [0, 8], [-1, 10**9]),
        ("model.label_smoothing", [0, 0.99], [-0.1, 1, math.nan]),
        ("model.tta", ["none", "six"], ["five"]),
        ("model.schedule", ["linear"], ["step"]),
        ("data.batch_size", [1, 128], [0, -5, 2.5, "3", 10**30, 10**400]),
        ("data.num_workers", [0, 2, None], [-1, 99_999]),
        ("data.image_size", [1, 4096, None], [0, 10**9]),
        ("data.val_fraction", [0, 0.5], [1, -0.1, math.nan]),
        ("data.brightness", [0, 1], [1.5, -0.1, math.nan]),
        ("data.erasing", [0, 1], [1.5, -0.1]),
        ("data.flip", ["random"], ["sideways"]),
        ("data.policy", ["none", "rand"], ["auto"]),
        ("checkpoint.every_n_minutes", [0.1, None], [0]),
    ],
)
def test_a_flag_takes_its_range_and_refuses_the_rest_by_name(flag, taken, refused):
    group, name = flag.split(".")
    for value in taken:
        check_settings(group, OWNERS[group].__init__, {name: value})
    for value in refused:
        with pytest.raises(UserError, match=re.escape(f"--{flag} {value}: ")):
            check_settings(group, OWNERS[group].__init__, {name: value})


def test_each_item_of_a_list_is_checked():
    with pytest.raises(UserError, match=r"--data\.train_sizes 0: 1 to 4096"):
        ImageDataModule("synthetic", train_sizes=[0, 16])


@pytest.mark.parametrize("flag", [flag for flag, row in table().items() if "bounds" in row])
def test_the_constructors_refuse_what_the_table_refuses(flag):
    group, name = flag.rpartition(".")[::2]
    if group in OWNERS:
        with pytest.raises(UserError, match=rf"--{flag} -1"):
            OWNERS[group](**{name: -1.0 if "float" in table()[flag]["types"] else -1})


@pytest.mark.parametrize(
    ("annotation", "value", "allowed"),
    [
        (Annotated[int, Field(ge=1)], 0, "1 or more"),
        (Annotated[float, Field(gt=0)], 0.0, "above 0"),
        (Annotated[float, Field(ge=0, lt=1)] | None, 1.0, "0 to below 1"),
        (Annotated[float, Field(ge=0, le=1)], 2.0, "0 to 1"),
        (Annotated[float, Field(ge=0, description="0 (off) or more")], -1.0, "0 (off) or more"),
        (Literal["a", "b"], "c", "one of a, b"),
    ],
)
def test_a_message_says_what_an_annotation_allows(annotation, value, allowed):
    def function(setting): ...

    function.__annotations__["setting"] = annotation
    with pytest.raises(UserError, match=re.escape(f"--data.setting {value}: {allowed}.")):
        check_settings("data", function, {"setting": value})
    check_settings("data", function, {"setting": None})
