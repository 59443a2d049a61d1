"""Precision by device; what the processor can do, and how fast, is simulated."""

import itertools

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import MPSAccelerator

from cifar_lightning.errors import UserError
from cifar_lightning.training import precision as module
from cifar_lightning.training.precision import settle_precision


def settled(precision, monkeypatch, *, gain=None, deterministic=False, devices="auto"):
    """Return the Trainer's arguments on a CPU; `gain` is its rate in bfloat16, None without instructions for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(module, "_WORTHWHILE", 1.5)
    monkeypatch.setattr(module, "_has_bfloat16", lambda: gain is not None)
    monkeypatch.setattr(module, "bfloat16_gain", lambda: gain)
    trainer = arguments(precision=precision, deterministic=deterministic, devices=devices)
    settle_precision(trainer)
    return trainer


def arguments(**given):
    defaults = {"accelerator": "auto", "benchmark": None, "deterministic": False, "devices": "auto", "num_nodes": 1}
    return Namespace(**defaults | {"precision": None} | given)


@pytest.mark.parametrize(
    ("asked", "gain", "got", "said"),
    [
        (None, None, "32-true", []),
        (None, 0.5, "32-true", []),
        (None, 1.4, "32-true", []),  # with fewer multiplications float32 is about as fast
        (None, 1.9, "bf16-mixed", []),
        ("16-mixed", 1.9, "32-true", ["--trainer.precision 16-mixed", "a GPU"]),
        ("bf16-mixed", 1.9, "bf16-mixed", []),
        ("bf16-mixed", 0.5, "bf16-mixed", ["--trainer.precision bf16-mixed", "0.50 times", "32-true"]),
        ("bf16-true", 0.5, "bf16-true", ["--trainer.precision bf16-true", "0.50 times", "32-true"]),
        ("bf16-mixed", None, "32-true", ["--trainer.precision bf16-mixed", "a GPU", "AVX512-BF16"]),
        ("32-true", 1.9, "32-true", []),
        ("64-true", None, "64-true", []),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(asked, gain, got, said, monkeypatch, capsys):
    assert settled(asked, monkeypatch, gain=gain).precision == got
    printed = capsys.readouterr().err
    assert [part for part in said if part not in printed] == []
    assert bool(printed) == bool(said)


def test_processes_of_one_run_choose_the_same_precision_on_a_cpu(monkeypatch):
    assert settled(None, monkeypatch, gain=1.9, devices="1").precision == "bf16-mixed"
    assert settled(None, monkeypatch, gain=1.9, devices="2").precision == "32-true"
    assert settled("bf16-mixed", monkeypatch, gain=1.9, devices="2").precision == "bf16-mixed"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settled(None, monkeypatch, gain=1.9).precision == "32-true"


@pytest.mark.parametrize(
    ("accelerator", "precision", "matmul"),
    [
        ("auto", "16-mixed", ["high"]),
        ("gpu", "16-mixed", ["high"]),
        ("cuda", "16-mixed", ["high"]),
        ("cpu", "32-true", []),
    ],
)
def test_a_gpu_computes_in_half_precision_and_tf32_unless_training_is_on_the_cpu(
    accelerator, precision, matmul, monkeypatch
):
    set_to = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(module, "_has_bfloat16", lambda: False)
    trainer = arguments(accelerator=accelerator)
    settle_precision(trainer)
    assert (trainer.precision, trainer.benchmark, set_to) == (precision, True, matmul)


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "32-true"])
def test_a_gpu_without_bfloat16_gets_16_mixed(asked, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        trainer = arguments(precision=asked)
        settle_precision(trainer)
        expected = asked if has_bfloat16 else {"bf16-mixed": "16-mixed"}.get(asked, "32-true")
        assert trainer.precision == expected
        assert (f"--trainer.precision {asked}" in capsys.readouterr().err) is (asked != expected)


@pytest.mark.parametrize(
    ("asked", "accelerator", "got"),
    [
        (None, "auto", "32-true"),
        ("32-true", "mps", "32-true"),
        ("16-mixed", "auto", "32-true"),
        ("bf16-mixed", "gpu", "32-true"),
        ("16-true", "mps", "32-true"),
        ("64-true", "cpu", "64-true"),
        ("bf16-mixed", "cpu", "bf16-mixed"),
    ],
)
def test_apples_gpu_computes_in_float32(asked, accelerator, got, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(module, "_has_bfloat16", lambda: True)
    monkeypatch.setattr(module, "bfloat16_gain", lambda: 2.0)
    trainer = arguments(precision=asked, accelerator=accelerator)
    settle_precision(trainer)
    assert trainer.precision == got
    printed = capsys.readouterr().err
    assert ("Apple's GPU" in printed) is (asked not in (None, got))


def test_float64_on_apples_gpu_is_sent_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    trainer = arguments(precision="64-true")
    with pytest.raises(UserError, match=r"64-true.*--trainer.accelerator cpu"):
        settle_precision(trainer)


@pytest.mark.parametrize(
    ("machine", "instructions", "expected"),
    [("x86_64", "_is_amx_tile_supported", True), ("AMD64", "_is_avx512_bf16_supported", True), ("x86_64", "", False)],
)
def test_instructions_for_bfloat16_are_torchs_own_answer(machine, instructions, expected, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    assert (module.needed_for("bf16-mixed") == "") is expected


def test_the_gain_is_the_ratio_of_two_times(monkeypatch):
    """A clock that runs twice as far during float32's convolutions as during bfloat16's."""
    clock = itertools.cycle([0, 4, 4, 6])
    begun = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock) + 6 * (next(begun) // 4))
    module.bfloat16_gain.cache_clear()
    assert module.bfloat16_gain() == 2
    module.bfloat16_gain.cache_clear()


def test_autotune_is_off_where_runs_are_to_be_deterministic(monkeypatch):
    assert settled(None, monkeypatch).benchmark is True
    assert settled(None, monkeypatch, deterministic=True).benchmark is False
