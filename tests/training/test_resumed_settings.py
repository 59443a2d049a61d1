"""ResumedSettings: this run's optimizer and schedule settings over those of a checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cifar_lightning.optim.schedules import ScheduleSettings, make_schedule
from cifar_lightning.training.resumed_settings import ResumedSettings


@pytest.mark.parametrize("name", ["one_cycle", "linear"])
def test_planned_settings_replace_those_that_a_checkpoint_brings(name):
    def made(total_steps, momentum):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0, momentum=momentum)
        return optimizer, make_schedule(optimizer, ScheduleSettings(name, None, 1.0), total_steps=total_steps)

    stopped = made(10, momentum=0.9)
    for total_steps, momentum, is_same in ((10, 0.9, True), (20, 0.9, False), (10, 0.8, False)):
        resumed = made(total_steps, momentum)
        config = SimpleNamespace(scheduler=resumed[1])
        trainer = SimpleNamespace(optimizers=[resumed[0]], lr_scheduler_configs=[config], global_step=0)
        callback = ResumedSettings(lambda optimizer, steps_done: None)
        callback.on_fit_start(trainer, None)
        for source, target in zip(stopped, resumed, strict=True):
            target.load_state_dict(source.state_dict())
        callback.on_train_start(trainer, None)
        is_kept = config.scheduler is not None
        assert is_kept is is_same or (name == "linear" and momentum == 0.9)
        assert resumed[0].param_groups[0]["momentum"] == momentum
