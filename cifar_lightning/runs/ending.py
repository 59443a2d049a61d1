"""The entry `ended` of environment.json: what ended a training, after how many epochs and steps."""

from collections.abc import Mapping
from typing import Any

from cifar_lightning.files import write_json
from cifar_lightning.formatting import plural
from cifar_lightning.runs.contents import read_environment
from cifar_lightning.runs.folder import RunFolder

_CAUSES = {
    "epochs": "by --epochs",
    "max_steps": "by --trainer.max_steps",
    "max_time": "by --trainer.max_time",
    "early_stopping": "by early stopping",
    "signal": "by a signal",
    "should_stop": "by a callback (should_stop)",
}


def write_ending(run: RunFolder, ended: Mapping[str, Any]) -> None:
    """Write what ended a training into environment.json."""
    write_json(run.environment, read_environment(run.environment) | {"ended": ended})


def is_short(ended: Any) -> bool:
    """Whether a training ended before its planned steps."""
    step, planned = _counts(ended, "step", "planned_steps")
    return step is not None and planned is not None and step < planned


def ending_text(ended: Any) -> str:
    """Return what ended a training and how far its schedule had come; empty if that is not known."""
    step, planned, epochs = _counts(ended, "step", "planned_steps", "epochs")
    if step is None or epochs is None:
        return ""
    cause = _CAUSES.get(str(ended.get("by")), "early")
    of = f" of {planned:,}" if planned else ""
    schedule = f"{step / planned:.0%} of the schedule, " if planned else ""
    return f"{cause} after {step:,}{of} steps ({schedule}{plural(epochs, 'whole epoch')})"


def _counts(ended: Any, *names: str) -> list[int | None]:
    counts = [ended.get(name) if isinstance(ended, Mapping) else None for name in names]
    return [count if isinstance(count, int) and count >= 0 else None for count in counts]
