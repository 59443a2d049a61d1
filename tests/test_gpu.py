"""What only a CUDA device can show; run with `python -m pytest -m gpu`."""

import lightning.pytorch as pl
import pytest
import torch

from cifar_lightning import ImageClassifier, ImageDataModule

pytestmark = pytest.mark.gpu


def small_data(**kwargs):
    return ImageDataModule("synthetic", batch_size=500, image_size=16, cutout_px=4, contrast=0.2, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 2], ids=["resident", "streaming"])
def test_a_batch_made_on_the_gpu_equals_the_one_made_on_the_cpu(num_workers):
    on_cpu, on_gpu = small_data(), small_data(device="cuda", num_workers=num_workers)
    for left, right in zip(on_cpu.train_dataloader(), on_gpu.train_dataloader(), strict=True):
        assert right[0].device.type == "cuda"
        torch.testing.assert_close(left[0], right[0].cpu())
        assert torch.equal(left[1], right[1].cpu())


def test_a_resident_epoch_makes_the_host_wait_for_nothing():
    loader = small_data(device="cuda").train_dataloader()
    batches = iter(loader)
    next(batches)  # the epoch's tables and order are moved here, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == len(loader) - 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mixed_precision_trains(tmp_path, optimizer):
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = ImageClassifier(image_size=16, lr=0.02, optimizer=optimizer, model_kwargs={"widths": [8, 16, 32]})
    trainer.fit(module, small_data())
    assert trainer.callback_metrics["train/acc"] > 0.2
    assert all(parameter.isfinite().all() for parameter in module.parameters())
