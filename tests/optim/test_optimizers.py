"""Muon against a plain reference, the groups of AdamW, the shape of OneCycle."""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from fitting import optimizer_settings
from program import REPO, start
from torch import nn

from cifar_lightning.errors import UserError
from cifar_lightning.models.smallnet import SmallNet
from cifar_lightning.models.speednet import SpeedNet
from cifar_lightning.optim.muon import Muon, orthogonalize
from cifar_lightning.optim.optimizers import build_optimizer
from cifar_lightning.optim.schedules import ScheduleSettings, make_schedule


def reference_orthogonalize(matrix, num_iterations):
    """One matrix, by its singular values: the iteration is an odd polynomial of them and leaves the vectors alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(num_iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (16, 16), (1, 9)])
def test_orthogonalize_equals_the_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(5, *shape, dtype=torch.float64)
    got = orthogonalize(matrices, num_iterations=3)
    for matrix, update in zip(matrices, got, strict=True):
        torch.testing.assert_close(update, reference_orthogonalize(matrix, 3), rtol=1e-9, atol=1e-9)


def test_orthogonalize_brings_singular_values_near_one_and_leaves_zero():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 32, 288), num_iterations=5))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert orthogonalize(torch.zeros(1, 3, 5)).count_nonzero() == 0


def test_muon_steps_equal_a_plain_reference_filter_by_filter():
    torch.manual_seed(1)
    filters = [torch.randn(8, 3, 3, 3), torch.randn(4, 8, 3, 3), torch.randn(8, 3, 3, 3)]
    filters = [weight.double().requires_grad_() for weight in filters]
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer = Muon(filters, [{"params": [bias]}], lr=0.1, sgd_lr=0.03, momentum=0.8, sgd_momentum=0.8)
    expected = [weight.detach().clone() for weight in filters]
    buffers = [torch.zeros_like(weight) for weight in filters]
    plain = bias.detach().clone().requires_grad_()
    sgd = torch.optim.SGD([plain], lr=0.03, momentum=0.8, nesterov=True)
    for _ in range(4):
        for k, weight in enumerate(filters):
            weight.grad = torch.randn_like(weight)
            buffers[k] = 0.8 * buffers[k] + weight.grad
            direction = (weight.grad + 0.8 * buffers[k]).reshape(len(weight), -1)
            expected[k] *= math.sqrt(len(weight)) / expected[k].norm()
            expected[k] -= 0.1 * reference_orthogonalize(direction, 3).view_as(weight)
        bias.grad = torch.randn_like(bias)
        plain.grad = bias.grad.clone()
        optimizer.step()
        sgd.step()
    for weight, reference in zip(filters, expected, strict=True):
        torch.testing.assert_close(weight.detach(), reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bias, plain)


def train(model, optimizer, schedule, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 8, 8, generator=generator)
        targets = torch.randint(0, 10, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd", "timm/lamb", "timm/nadamw", "timm/adafactor"])
def test_an_optimizer_continues_bit_for_bit_from_its_state(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")

    def fresh():
        torch.manual_seed(0)
        model = SmallNet(widths=(4, 4, 8), dropout=0.0)
        optimizer = build_optimizer(model, optimizer_settings(name, lr=0.02, weight_decay=0.1, sgd_lr=0.1))
        return model, optimizer, make_schedule(optimizer, ScheduleSettings("one_cycle", 0.25, 1.0), total_steps=8)

    unbroken, stopped, resumed = fresh(), fresh(), fresh()
    train(*unbroken, range(6))
    train(*stopped, range(3))
    for source, target in zip(stopped, resumed, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(*resumed, range(3, 6))
    for left, right in zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(stopped[0].head.weight, resumed[0].head.weight)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_fused_torch_chooses_the_kernels_which_on_a_cpu_are_those_of_one_tensor(name):
    trained = []
    for fused in (None, False):
        torch.manual_seed(0)
        model = SmallNet(widths=(4, 4, 8), dropout=0.0)
        optimizer = build_optimizer(model, optimizer_settings(name, lr=0.02, weight_decay=0.1), fused=fused)
        assert [optimizer.defaults[kernels] for kernels in ("fused", "foreach")] == [fused, None]
        schedule = make_schedule(optimizer, ScheduleSettings("one_cycle", 0.25, 1.0), total_steps=8)
        train(model, optimizer, schedule, range(3))
        trained.append([*model.parameters()])
    assert all(map(torch.equal, *trained))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/lambb", ["timm/lambb", "Did you mean timm/lamb?"]),
        ("lamb", ["--model.optimizer lamb", "adamw, sgd, muon, or timm/NAME"]),
        ("timm/kron", ["timm/kron", "resumed"]),
        ("timm/adahessian", ["timm/adahessian", "second derivatives"]),
    ],
)
def test_an_optimizer_that_is_not_known_or_not_resumable_is_refused(name, words):
    pytest.importorskip("timm")
    with pytest.raises(UserError) as refused:
        optimizer_settings(name)
    assert [word for word in words if word not in str(refused.value)] == []


def test_without_timm_an_optimizer_of_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"--model\.optimizer timm/lamb: timm is not installed; pip .*'\.\[timm\]'"):
        optimizer_settings("timm/lamb")
    with pytest.raises(UserError, match=r"--model\.optimizer adamv: one of .*Did you mean adamw"):
        optimizer_settings("adamv")


def test_timms_optimizers_get_lr_and_the_decay_of_matrices_alone():
    pytest.importorskip("timm")
    optimizer = build_optimizer(nn.Linear(4, 3), optimizer_settings("timm/lamb", lr=0.1, weight_decay=0.07))
    assert type(optimizer).__name__ == "Lamb"
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.07), (0.1, 0.0)]


def test_muon_moves_filters_that_begin_at_zero():
    weight = torch.zeros(4, 3, 3, 3, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    Muon([weight], [], lr=0.1).step()
    assert weight.isfinite().all()
    assert weight.norm() > 0


def test_muon_calls_the_closure_once_with_gradients_enabled():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    optimizer, calls = Muon([weight], []), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [True]


def test_sgd_is_torchs_with_nesterov_momentum_and_decay_of_matrices_alone():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = copy.deepcopy(model)
    ours = build_optimizer(
        model, optimizer_settings("sgd", lr=0.1, weight_decay=0.05, sgd_lr=9.0, sgd_momentum=0.8, momentum=0.1)
    )
    matrix, vector = {"params": [reference.weight], "weight_decay": 0.05}, {"params": [reference.bias]}
    theirs = torch.optim.SGD([matrix, vector], lr=0.1, momentum=0.8, nesterov=True)
    for _ in range(3):
        for left, right in zip(model.parameters(), reference.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        ours.step()
        theirs.step()
    for left, right in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_do_not_decay(name):
    model = SmallNet(widths=(4, 4, 8))
    optimizer = build_optimizer(model, optimizer_settings(name, lr=1e-3, weight_decay=0.05, sgd_lr=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0)


def test_what_muon_does_not_move_decays_as_in_torchs_sgd():
    torch.manual_seed(0)
    model = SpeedNet(widths=(4, 4, 4))
    rates = {"sgd_lr": 5.0, "head_lr": 0.02, "sgd_momentum": 0.85, "sgd_weight_decay": 0.01}
    optimizer = build_optimizer(model, optimizer_settings("muon", lr=0.1, weight_decay=0.0, **rates))
    by_role = {group["role"]: group for group in optimizer.param_groups}
    assert {role: group["lr"] for role, group in by_role.items()} == {
        "filters": 0.1,
        "stem": 5.0,
        "vectors": 5.0,
        "matrices": 0.02,
    }
    assert by_role["stem"]["params"] == [model.stem.bias]
    weight = model.head.weight
    reference = weight.detach().clone().requires_grad_()
    sgd = torch.optim.SGD([reference], lr=0.02, momentum=0.85, nesterov=True, weight_decay=0.01 / 0.02)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        reference.grad = weight.grad.clone()
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(weight, reference)


UNKNOWN = """
import torch
from cifar_lightning.errors import UserError
from cifar_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from cifar_lightning.training.tta import tta_logits

for call in (
    lambda: build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings("adam", 0.1, 0.1, None, 0.9, 0.9, 0.0, 0.0)),
    lambda: tta_logits(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4), "flip"),
):
    try:
        call()
    except UserError as error:
        print(error)
"""


def test_unknown_names_are_refused_with_those_that_there_are(tmp_path):
    # A process of its own: the tests' check of types would refuse them before.
    (tmp_path / "unknown.py").write_text(UNKNOWN, encoding="utf-8")
    done = start(program=tmp_path / "unknown.py", cwd=tmp_path, PYTHONPATH=str(REPO))
    optimizer, tta = done.stdout.splitlines()
    for line, words in (
        (optimizer, ["--model.optimizer adam:", "adamw, sgd, muon", "timm/NAME", "Did you mean adamw?"]),
        (tta, ["--model.tta flip:", "none, mirror, six"]),
    ):
        assert [word for word in words if word not in line] == [], done.stderr


def test_half_a_model_can_be_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].requires_grad_(False)
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, optimizer_settings(name, lr=0.01, weight_decay=0.05, sgd_lr=0.1))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
