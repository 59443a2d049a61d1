"""A loss that is no number stops the run before the update; on the device by a flag that optimisers know."""

import pytest
import torch

from cifar_lightning.errors import RunError
from cifar_lightning.guard import LossGuard
from cifar_lightning.optim import Muon

CPU = torch.device("cpu")
BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_stops_at_once_where_it_can_be_read(bad):
    guard = LossGuard(CPU, is_deferred=False)
    guard.watch(torch.tensor(1e30), 0, 0)
    with pytest.raises(RunError, match="in epoch 1, step 2"):
        guard.watch(torch.tensor(bad), 1, 0)


@pytest.mark.parametrize("bad", BAD)
def test_the_first_bad_step_is_kept_on_the_device_until_it_is_read(bad):
    guard = LossGuard(CPU, is_deferred=True)
    for step, loss in enumerate([1.0, 2.0, bad, 1.0, bad]):
        guard.watch(torch.tensor(loss), step, 0)
        assert guard.found_inf.item() == (step >= 2)  # it stays: nothing more is updated
    with pytest.raises(RunError, match="in epoch 2, step 3"):
        guard.check(1)


def test_good_losses_pass():
    for is_deferred in (False, True):
        guard = LossGuard(CPU, is_deferred)
        guard.watch(torch.tensor(0.5), 7, 0)
        guard.check(0)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def muon(parameters):
    return Muon(parameters[:1], [{"params": parameters[1:]}], lr=0.1)


@pytest.mark.parametrize("make", [adamw, muon])
def test_the_flag_holds_an_update_back_and_changes_no_other(make):
    torch.manual_seed(0)
    start = [torch.randn(4, 3, 3, 3), torch.randn(5)]
    ours, reference = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizer, plain = make(ours), make(reference)
    guard = LossGuard(CPU, is_deferred=True)
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
