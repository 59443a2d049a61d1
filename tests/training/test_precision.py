"""Precision by device; what the processor can do is simulated."""

import pytest
import torch
from jsonargparse import Namespace

from cifar_lightning.training.precision import settle_precision


def settled(precision, monkeypatch, *, has_bf16, deterministic=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    trainer = Namespace(precision=precision, accelerator="auto", benchmark=None, deterministic=deterministic)
    settle_precision(trainer)
    return trainer


@pytest.mark.parametrize(
    ("asked", "has_bf16", "got"),
    [
        (None, True, "32-true"),
        ("16-mixed", True, "32-true"),
        ("bf16-mixed", True, "bf16-mixed"),
        ("bf16-mixed", False, "32-true"),
        ("64-true", False, "64-true"),
    ],
)
def test_a_cpu_gets_what_it_has_instructions_for(asked, has_bf16, got, monkeypatch, capsys):
    assert settled(asked, monkeypatch, has_bf16=has_bf16).precision == got
    said = capsys.readouterr().err
    assert said == "" if got == asked or asked is None else f"--trainer.precision {asked} needs a GPU" in said


def test_autotune_is_off_where_runs_are_to_be_deterministic(monkeypatch):
    assert settled(None, monkeypatch, has_bf16=False).benchmark is True
    assert settled(None, monkeypatch, has_bf16=False, deterministic=True).benchmark is False
