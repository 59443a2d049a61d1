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


@pytest.mark.parametrize(("before", "now", "is_kept"), [(False, None, True), (None, True, False), (True, True, True)])
def test_a_fused_optimizer_has_its_counts_of_steps_on_the_device_of_the_weights(before, now, is_kept):
    weight = nn.Parameter(torch.empty(2, device="meta"))  # in place of a GPU

    def made(fused):
        optimizer = torch.optim.AdamW([weight], lr=1.0, fused=fused)
        return optimizer, make_schedule(optimizer, ScheduleSettings("linear", None, 1.0), total_steps=10)

    (stopped, _), (resumed, schedule) = made(before), made(now)
    stopped.state[weight]["step"] = torch.tensor(3.0)
    config = SimpleNamespace(scheduler=schedule)
    trainer = SimpleNamespace(optimizers=[resumed], lr_scheduler_configs=[config], global_step=0)
    callback = ResumedSettings(lambda optimizer, steps_done: None)
    callback.on_fit_start(trainer, None)
    resumed.load_state_dict(stopped.state_dict())
    callback.on_train_start(trainer, None)
    assert (config.scheduler is not None) is is_kept  # a run of an older version, with False, is not changed
    assert resumed.state[weight]["step"].device.type == ("meta" if now else "cpu")
    assert resumed.param_groups[0]["fused"] is (before if is_kept else now)
