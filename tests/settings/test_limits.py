"""Numbers that a flag does not take are refused by name, wherever they come from."""

import math

import pytest

from cifar_lightning import ImageClassifier, ImageDataModule, UserError
from cifar_lightning.settings.limits import LIMITS, check_limits


@pytest.mark.parametrize(
    ("flag", "taken", "refused"),
    [
        ("model.lr", [1e-9, 3e-3, 100], [0, -1, math.nan, math.inf]),
        ("model.weight_decay", [0, 0.5], [-0.1, math.nan, math.inf]),
        ("model.label_smoothing", [0, 0.99], [-0.1, 1, math.nan]),
        ("data.batch_size", [1, 128], [0, -5]),
        ("data.num_workers", [0, 2, None], [-1, 99_999]),
        ("data.image_size", [1, 4096, None], [0, 10**9]),
        ("data.val_fraction", [0, 0.5], [1, -0.1, math.nan]),
        ("data.brightness", [0, 1], [1.5, -0.1, math.nan]),
    ],
)
def test_a_flag_takes_its_range_and_refuses_the_rest_by_name(flag, taken, refused):
    group, name = flag.split(".")
    for value in taken:
        check_limits(group, **{name: value})
    for value in refused:
        with pytest.raises(UserError, match=rf"--{flag} {value}: "):
            check_limits(group, **{name: value})


@pytest.mark.parametrize("flag", [flag for flag in LIMITS if flag.startswith(("model.", "data."))])
def test_the_classes_refuse_what_the_table_refuses(flag):
    group, name = flag.split(".")
    made = ImageClassifier if group == "model" else lambda **kwargs: ImageDataModule("synthetic", **kwargs)
    with pytest.raises(UserError, match=rf"--{flag} -1"):
        made(**{name: -1.0 if group == "model" else -1})
