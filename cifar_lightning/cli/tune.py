"""tune: find the peak learning rate; `fit --tune_lr` does so before it trains."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from cifar_lightning.cli.initial_weights import load_initial_weights
from cifar_lightning.cli.lightning_cli import TrainingCLI, prepare_data
from cifar_lightning.data.datamodule import ImageDataModule
from cifar_lightning.errors import UserError
from cifar_lightning.files import write_text_durably
from cifar_lightning.formatting import command_line
from cifar_lightning.runs.folder import RUNS, RunFolder, config_name, create_run, refuse_what_would_be_lost
from cifar_lightning.training.lr_finder import LrRange, find_lr, write_lr_range
from cifar_lightning.training.module import ImageClassifier


def tune(arguments: Sequence[str]) -> None:
    """Find the peak learning rate, and write a folder with its figure and a config that trains with it."""
    cli = TrainingCLI("fit", arguments)
    if batches := cli.settings.trainer.fast_dev_run:
        raise UserError(f"--trainer.fast_dev_run {batches}: only with fit; leave it out of tune.")
    if checkpoint := cli.settings.ckpt_path:
        raise UserError(f"--ckpt_path {checkpoint}: tune is for a new run; give --init_weights for its weights.")
    model, data, settings = cli.instantiate()
    prepare_data(data, model)
    model.prepare(data)
    load_initial_weights(cli, model)
    found = apply_lr_finder(cli, model, data, settings.trainer)
    print(f"Suggested peak: {found.suggestion:.2g}, where the loss fell fastest in {len(found.lrs)} steps.")
    name = config_name(cli.settings.config, cli.model_name)
    run = create_run(RUNS, f"{name}_tune", cli.settings.run_dir)
    write_text_durably(run.config, cli.config_text)
    write_lr_range(run, found)
    print(f"{run.path}: lr_range.png shows it. To train with it:")
    print(f"  {command_line('fit', '--config', run.config)}")


def apply_lr_finder(cli: TrainingCLI, model: ImageClassifier, data: ImageDataModule, trainer: Namespace) -> LrRange:
    """Find the peak learning rate and set it, as if it had been given by a flag.

    Raises:
        UserError: The model has another optimizer than its own, or no argument lr: no flag gives its learning rate; or
            --run_dir is taken.
    """
    if not model.plans_schedule:
        raise UserError("--tune_lr and tune find --lr: leave --optimizer, or the model's configure_optimizers, out.")
    own = cli.settings.model
    if "lr" not in own:
        raise UserError(
            f"--tune_lr and tune find --lr, which --model {cli.settings.model_class} does not take; add the argument."
        )
    if cli.settings.run_dir is not None:  # not after the steps
        refuse_what_would_be_lost(RunFolder(Path(cli.settings.run_dir)))
    print("LR finder: raising the learning rate for a few steps.")
    found = find_lr(model, data, **trainer)
    cli.settings.tune_lr = False  # config.yaml repeats the run, not the LR finder
    model.use_lr(found.suggestion)
    for name in ("lr", "sgd_lr", "head_lr"):
        if name in own:  # a subclass may lack any
            own[name] = getattr(model.optimizer_settings, name)
    return found
