"""The temperature of a run: fitted on its validation predictions, and never on test images."""

import numpy as np

from cifar_lightning.metrics.calibration import fit_temperature
from cifar_lightning.report.results import Predictions


def temperature_of(val: Predictions | None) -> tuple[float | None, str]:
    """Return the temperature that `fit_temperature` finds, and why there is none; empty where there is one."""
    if val is None:
        return None, "There are no predictions of validation images."
    if not np.isfinite(val.logits).all():
        return None, "Logits of validation images are NaN or infinite."
    temperature = fit_temperature(val.logits, val.targets)
    if temperature is None:
        return None, "The validation loss has no minimum: all predictions are correct, or no better than chance."
    return temperature, ""
