"""What `benchmarks/speed/overhead.py --config` gives to `fit` is taken by a network without a stem."""

import pytest

from benchmarks.speed.overhead import config_training
from cifar_lightning.cli.lightning_cli import fit_parser
from cifar_lightning.cli.main import training_arguments
from cifar_lightning.cli.parser import check_arguments


@pytest.mark.parametrize("recipe", ["speedrun94", "speedrun95", "speedrun96"])
def test_a_configs_flags_fit_another_model(recipe):
    flags, _ = training_arguments("fit", [*config_training(recipe).flags, "--model.name=smallnet"])
    check_arguments("fit", fit_parser().parse_args(flags))
