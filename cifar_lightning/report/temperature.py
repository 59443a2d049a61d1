"""The temperature of a run: fitted on its validation predictions, and never on test images."""

import numpy as np

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import command_line
from cifar_lightning.metrics.calibration import fit_temperature
from cifar_lightning.report.results import Predictions, read_predictions
from cifar_lightning.runs.folder import RunFolder


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


def require_temperature(run: RunFolder) -> float:
    """Return a run's temperature.

    Raises:
        UserError: It has none, or its validation predictions are damaged.
    """
    is_there = run.predictions_val.is_file()
    temperature, why_none = temperature_of(read_predictions(run.predictions_val) if is_there else None)
    if temperature is None:
        again = "" if is_there else f"; a run with a validation split gets them by {command_line('validate', run.path)}"
        raise UserError(f"--calibrated: {run.path} has no temperature. {why_none}\nLeave --calibrated out{again}.")
    return temperature
