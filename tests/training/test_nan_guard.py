"""A loss that is no number stops the run before the update; on the device by a flag that optimisers know."""

from functools import partial

import pytest
import torch
from fitting import fit_run
from program import REPO, TINY, start
from torch import nn

from cifar_lightning import ImageClassifier
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.errors import RunError
from cifar_lightning.optim.muon import Muon
from cifar_lightning.training.nan_guard import NanGuard

CPU = torch.device("cpu")
BAD = [float("nan"), float("inf"), float("-inf")]


def started(is_deferred):
    guard = NanGuard()
    guard.start(CPU, is_deferred=is_deferred)
    return guard


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_stops_at_once_where_it_can_be_read(bad):
    guard = started(is_deferred=False)
    guard.watch(torch.tensor(1e30), 0, 0)
    with pytest.raises(RunError, match="in epoch 1, step 2"):
        guard.watch(torch.tensor(bad), 1, 0)


@pytest.mark.parametrize("bad", BAD)
def test_the_first_bad_step_is_kept_on_the_device_until_it_is_read(bad):
    guard = started(is_deferred=True)
    for step, loss in enumerate([1.0, 2.0, bad, 1.0, bad]):
        guard.watch(torch.tensor(loss), step, 0)
        assert guard.found_inf.item() == (step >= 2)  # it stays: nothing more is updated
    with pytest.raises(RunError, match="in epoch 2, step 3"):
        guard.check(1)


def test_good_losses_pass():
    for is_deferred in (False, True):
        guard = started(is_deferred)
        guard.watch(torch.tensor(0.5), 7, 0)
        guard.check(0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def muon(parameters):
    return Muon(parameters[:1], [{"params": parameters[1:], "weight_decay": 0.1}], lr=0.1)


@pytest.mark.parametrize("make", [adamw, muon])
def test_the_flag_holds_an_update_back_and_changes_no_other(make):
    torch.manual_seed(0)
    start = [torch.randn(4, 3, 3, 3), torch.randn(5)]
    ours, reference = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizer, plain = make(ours), make(reference)
    guard = started(is_deferred=True)
    optimizer.found_inf = guard.found_inf
    for step in range(3):
        guard.watch(torch.tensor(1.0), step, 0)
        for one, other in zip(ours, reference, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        plain.step()
    guard.watch(torch.tensor(float("nan")), 3, 0)
    for one in ours:
        one.grad = torch.full_like(one, float("nan"))
    optimizer.step()
    for one, other in zip(ours, reference, strict=True):
        assert torch.equal(one, other)
    states = (optimizer.state_dict()["state"], plain.state_dict()["state"])
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name])), name


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_loss_of_another_process_stops_this_one_and_the_first_one_speaks(monkeypatch, is_deferred, rank):
    others = torch.zeros(())
    two = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: rank}
    for name, reduce in {**two, "all_reduce": lambda own, op: own.copy_(torch.maximum(own, others))}.items():
        monkeypatch.setattr(torch.distributed, name, reduce)
    guard = started(is_deferred)
    guard.watch(torch.tensor(1.0), 3, 0)
    others.fill_(1)
    if is_deferred:
        guard.watch(torch.tensor(1.0), 4, 0)
        assert guard.found_inf == 1  # before the update
    look = partial(guard.check, 0) if is_deferred else partial(guard.watch, torch.tensor(1.0), 4, 0)
    with pytest.raises(SystemExit if rank else RunError, match="^0$" if rank else "in epoch 1, step 5"):
        look()


SPOILED = """
import os
from pathlib import Path

from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from cifar_lightning.cli.main import main

rank, num_steps, cross_entropy = int(os.environ.get("LOCAL_RANK", 0)), [0], functional.cross_entropy


def spoiled(*args, **kwargs):
    num_steps[0] += 1
    return cross_entropy(*args, **kwargs) * (float("nan") if rank == 1 and num_steps[0] == 3 else 1)


def note(*_):
    with Path(f"updates{rank}").open("a") as file:
        file.write(".")


functional.cross_entropy = spoiled
register_optimizer_step_post_hook(note)
main()
"""


@pytest.mark.slow
def test_two_processes_stop_together_before_the_update_where_the_second_ones_loss_is_no_number(tmp_path):
    (tmp_path / "spoiled.py").write_text(SPOILED)
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--epochs", 1]
    settings = {"check": False, "program": tmp_path / "spoiled.py", "PYTHONPATH": str(REPO)}
    done = start("fit", *TINY, *two, cwd=tmp_path, **settings)
    assert done.returncode == 1, done.stderr
    assert "in epoch 1, step 3; the weights were not updated by it" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert [(tmp_path / f"updates{rank}").read_text() for rank in (0, 1)] == ["..", ".."]


class Masked(nn.Module):
    """Adds a mask, as attention does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 10)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, images):
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_model_with_a_mask_of_infinities_is_saved(tmp_path, ema_decay):
    module = ImageClassifier(model=Masked(), image_size=16, ema_decay=ema_decay)
    run, _ = fit_run(tmp_path / "run", module=module, epochs=1)
    saved = read_checkpoint(run.last_checkpoint)["state_dict"]
    assert torch.equal(saved["model.mask"], Masked().mask)
    assert saved["model.linear.weight"].isfinite().all()
