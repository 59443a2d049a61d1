"""What only a CUDA device can show; run with `python -m pytest -m gpu`."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from fitting import Signal, fit_run
from torch.optim.swa_utils import AveragedModel

from cifar_lightning import ImageClassifier, ImageDataModule
from cifar_lightning.checkpoints.loading import read_checkpoint
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.cli.main import training_arguments
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.training.ema import EmaWeights
from cifar_lightning.training.signals import Stopped
from cifar_lightning.transforms.augmentation import Augmentation
from cifar_lightning.transforms.pipeline import Pipeline, augment

pytestmark = [
    pytest.mark.gpu,
    # A resumed run writes where the stopped one did.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # torch says so of `set_sync_debug_mode`, which is what these tests look with.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]


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


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_on_the_gpu_gives_the_images_of_the_cpu_and_makes_the_host_wait_for_nothing(policy):
    torch.use_deterministic_algorithms(True)
    pipeline = Pipeline(Augmentation(policy=policy, erasing=0.5))
    images = torch.randint(0, 256, (512, 24, 24, 3), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    finished = {}
    for device in ("cpu", "cuda"):
        _, draws = pipeline.draw(num_images=512, image_size=24, seed=0, epoch=0, device=torch.device(device))
        batch, statistics = images.to(device), {"mean": mean.to(device), "std": std.to(device)}
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            finished[device] = augment(batch, draws, **statistics)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    differing = (finished["cpu"] - finished["cuda"].cpu()).abs().amax(1) > 1e-5
    assert differing.float().mean() < 1e-4  # pixels whose source lies between two may take either


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


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_loss_on_the_gpu_holds_the_update_back_and_stops_at_the_epochs_end(tmp_path, optimizer, precision):
    class Spoiled(ImageClassifier):
        """Gets an image of infinities at step 4; notes its weights before and after it."""

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 4:
                self.before = weights(self)
                batch[0].fill_(float("inf"))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                self.after = weights(self)

    def weights(module):
        return [parameter.detach().clone().cpu() for parameter in module.parameters()]

    module = Spoiled(image_size=16, optimizer=optimizer, model_kwargs={"widths": [4, 8, 8]})
    with pytest.raises(RunError, match="epoch 1, step 5"):
        fit_run(tmp_path / "run", module=module, trainer={"accelerator": "gpu", "devices": 1, "precision": precision})
    assert all(map(torch.equal, module.before, module.after))
    if precision == "32-true":  # and all later ones
        assert all(map(torch.equal, module.before, weights(module)))


def test_a_run_stopped_inside_an_epoch_ends_with_the_same_bits_on_the_gpu(tmp_path):
    def start(path, *more, **kwargs):
        torch.manual_seed(0)
        settings = {"accelerator": "gpu", "devices": 1, "deterministic": True, "benchmark": False}
        return fit_run(path, *more, trainer=settings, **kwargs)[0]

    unbroken = start(tmp_path / "unbroken")
    with pytest.raises(Stopped):
        start(tmp_path / "broken", Signal("on_train_batch_start", 4))
    torch.cuda.manual_seed(1)
    broken = start(tmp_path / "broken", ckpt_path=RunFolder(tmp_path / "broken").last_checkpoint)
    results = [read_checkpoint(run.last_checkpoint) for run in (unbroken, broken)]
    for name, tensor in results[0]["state_dict"].items():
        assert torch.equal(tensor, results[1]["state_dict"][name]), name
    assert unbroken.metrics_csv.read_bytes() == broken.metrics_csv.read_bytes()


def test_an_optimizer_that_steps_only_on_a_gpu_is_taken_for_a_run_on_it():
    flags = ["--data.dataset", "synthetic", "--optimizer", "AdamW", "--optimizer.capturable", "true"]
    assert not TrainingCLI("fit", training_arguments("fit", flags)[0]).instantiate()[0].plans_schedule
    with pytest.raises(UserError, match="capturable"):
        TrainingCLI("fit", training_arguments("fit", [*flags, "--trainer.accelerator", "cpu"])[0]).instantiate()


def test_a_run_that_was_clipped_resumes_without_clipping_on_the_gpu(tmp_path):
    settings = {"accelerator": "gpu", "devices": 1}
    with pytest.raises(Stopped):  # its optimizer is not fused, and counts steps on the CPU
        fit_run(tmp_path / "run", Signal("on_train_batch_start", 4), trainer={**settings, "gradient_clip_val": 1.0})
    stopped = RunFolder(tmp_path / "run").last_checkpoint
    _, trainer = fit_run(tmp_path / "run", trainer=settings, ckpt_path=stopped)
    assert trainer.optimizers[0].param_groups[0]["fused"] is True


def test_the_average_of_the_weights_makes_the_host_wait_for_nothing():
    module = ImageClassifier(image_size=16, model_kwargs={"widths": [4, 8, 8]}).cuda()
    ema = EmaWeights(0.9)
    ema._average_model = AveragedModel(module, use_buffers=True)
    for step in (1, 2, 3):  # the first is copied; in the second, infinite weights are looked for
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        try:
            ema.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
