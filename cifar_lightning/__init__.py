"""The image-classifier trainer to start from: SmallNet on CIFAR-10 through PyTorch Lightning.

    from cifar_lightning import ImageClassifier, ImageDataModule, SmallNet, build_model

These names are the public API; docs/python-api.md documents them. They are imported when they are asked for, so that
what needs no torch never waits for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_lightning.data.datamodule import ImageDataModule as ImageDataModule
    from cifar_lightning.errors import RunError as RunError
    from cifar_lightning.errors import UserError as UserError
    from cifar_lightning.inference.predict_images import Prediction as Prediction
    from cifar_lightning.models.registry import build_model as build_model
    from cifar_lightning.models.smallnet import SmallNet as SmallNet
    from cifar_lightning.models.speednet import SpeedNet as SpeedNet
    from cifar_lightning.optim.muon import Muon as Muon
    from cifar_lightning.python_api import Run as Run
    from cifar_lightning.python_api import fit as fit
    from cifar_lightning.python_api import load as load
    from cifar_lightning.training.module import ImageClassifier as ImageClassifier
    from cifar_lightning.training.run_report import RunReport as RunReport
    from cifar_lightning.training.tensorboard import Dashboard as Dashboard
    from cifar_lightning.transforms.photographs import GaussianBlur as GaussianBlur
    from cifar_lightning.transforms.photographs import RandomAffine as RandomAffine
    from cifar_lightning.transforms.photographs import RandomGrayscale as RandomGrayscale
    from cifar_lightning.transforms.photographs import RandomResizedCrop as RandomResizedCrop
    from cifar_lightning.transforms.photographs import RandomRotation as RandomRotation
    from cifar_lightning.transforms.transform import Transform as Transform

_HOMES = {
    "Dashboard": "training.tensorboard",
    "GaussianBlur": "transforms.photographs",
    "ImageClassifier": "training.module",
    "ImageDataModule": "data.datamodule",
    "Muon": "optim.muon",
    "Prediction": "inference.predict_images",
    "RandomAffine": "transforms.photographs",
    "RandomGrayscale": "transforms.photographs",
    "RandomResizedCrop": "transforms.photographs",
    "RandomRotation": "transforms.photographs",
    "Run": "python_api",
    "RunError": "errors",
    "RunReport": "training.run_report",
    "SmallNet": "models.smallnet",
    "SpeedNet": "models.speednet",
    "Transform": "transforms.transform",
    "UserError": "errors",
    "build_model": "models.registry",
    "fit": "python_api",
    "load": "python_api",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
