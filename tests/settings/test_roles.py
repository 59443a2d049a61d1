"""What the report shows of a run's settings."""

from dataclasses import fields

from cifar_lightning.settings.roles import AUGMENTATIONS, augmentations
from cifar_lightning.transforms.augmentation import Augmentation


def test_augmentations_are_the_fields_of_augmentation_that_change_images():
    assert {field.name for field in fields(Augmentation)} - {"crop_mode"} == AUGMENTATIONS


def test_an_argument_of_a_data_module_of_ones_own_is_no_augmentation():
    assert augmentations({"flip": "random", "fold": 2, "policy": "none"}) == ["flip random"]
