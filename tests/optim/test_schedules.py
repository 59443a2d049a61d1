"""The schedules: peaks, ends, warm-up, and taking them up after a resume."""

import itertools
import math

import pytest
import torch
from fitting import optimizer_settings
from torch import nn

from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.speednet import SpeedNet
from cifar_lightning.optim.optimizers import build_optimizer
from cifar_lightning.optim.resume import has_planned_lrs
from cifar_lightning.optim.schedules import ScheduleSettings, make_schedule


def settings(name, pct_start=None, stem_train_fraction=1.0):
    return ScheduleSettings(name, pct_start, stem_train_fraction)


def rates_of(name, total_steps, **kwargs):
    """Return the rate of each step of a peak of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = make_schedule(optimizer, settings(name, **kwargs), total_steps=total_steps)
    seen = []
    for _ in range(total_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_one_cycle_peaks_at_each_groups_lr_and_ends_near_zero():
    model = SmallNet(widths=(4, 4, 8))
    for name, peaks in (("adamw", [0.01, 0.01]), ("sgd", [0.01, 0.01]), ("muon", [0.01, 0.1, 0.1])):
        optimizer = build_optimizer(model, optimizer_settings(name, lr=0.01, weight_decay=0.05, sgd_lr=0.1))
        schedule = make_schedule(optimizer, settings("one_cycle"), total_steps=100)
        seen = []
        for _ in range(100):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            if len(seen) < 100:
                schedule.step()
        rates = torch.tensor(seen)
        torch.testing.assert_close(rates[0], torch.tensor(peaks) / 25)
        assert set(rates.argmax(0).tolist()) == {29}
        torch.testing.assert_close(rates.max(0).values, torch.tensor(peaks))
        assert (rates[-1] < torch.tensor(peaks) / 1e5).all()


def test_cosine_is_torchs_cosine():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates_of("cosine", 20) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.5), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)))])
def test_a_warm_up_rises_in_a_line_from_above_0_and_the_fall_begins_at_the_peak(name, middle):
    rates = rates_of(name, 24, pct_start=1 / 6)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(middle)
    assert all(after < before for before, after in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.06


def test_only_one_cycle_rises_where_nothing_was_asked_for():
    assert [settings(name).warmup_fraction for name in ("one_cycle", "linear", "cosine")] == [0.3, 0, 0]
    assert settings("one_cycle", 0.0).warmup_fraction == 0


def test_the_linear_schedule_is_a_line_to_zero_and_the_stems_is_shorter():
    model = SpeedNet(widths=(4, 4, 4))
    optimizer = build_optimizer(model, optimizer_settings("muon", lr=0.2, weight_decay=0.0, sgd_lr=5.0, head_lr=0.02))
    schedule = make_schedule(optimizer, settings("linear", stem_train_fraction=0.4), total_steps=10)
    seen = []
    for _ in range(10):
        seen.append({group["role"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    for step, rates in enumerate(seen):
        assert rates["filters"] == pytest.approx(0.2 * (1 - step / 10))
        assert rates["matrices"] == pytest.approx(0.02 * (1 - step / 10))
        assert rates["stem"] == pytest.approx(5.0 * max(0, 1 - step / 4))


def test_a_stem_that_is_never_trained_never_has_a_rate():
    optimizer = build_optimizer(
        SpeedNet(widths=(4, 4, 4)), optimizer_settings("muon", lr=0.2, weight_decay=0.0, sgd_lr=5.0)
    )
    make_schedule(optimizer, settings("linear", stem_train_fraction=0.0), total_steps=10)
    assert {group["role"]: group["lr"] for group in optimizer.param_groups}["stem"] == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_plan_that_a_checkpoint_does_not_follow_is_noticed(name):
    def made(total_steps):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        return optimizer, make_schedule(optimizer, settings(name, 0.2), total_steps=total_steps)

    optimizer, schedule = made(10)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    for total_steps, is_same in ((10, True), (20, False)):
        _, restored = made(total_steps)
        restored.load_state_dict(schedule.state_dict())
        assert has_planned_lrs(restored) is is_same


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_schedule_is_taken_up_where_it_was(name):
    def rates(steps, steps_done=None):
        optimizer = build_optimizer(
            SpeedNet(widths=(4, 4, 4)), optimizer_settings("muon", lr=0.2, weight_decay=0.0, sgd_lr=5.0)
        )
        if steps_done is not None:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        schedule = make_schedule(optimizer, settings(name, 0.2, 0.4), total_steps=10, steps_done=steps_done)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return [group["lr"] for group in optimizer.param_groups]

    assert rates(7) == rates(0, steps_done=7)
