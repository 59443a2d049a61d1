"""The ablations pair runs by seed, say what chance explains, and every setting is made of flags that exist."""

import pytest

from benchmarks.accuracy.ablations import BASE, SUITES, differences, verdict
from cifar_lightning.cli.lightning_cli import fit_parser
from cifar_lightning.cli.main import training_arguments


def line(setting, seed, accuracy):
    return {"setting": setting, "seed": seed, "accuracy": accuracy}


def test_differences_are_of_the_seeds_that_both_have():
    lines = [line(BASE, 0, 0.70), line(BASE, 1, 0.72), line("ema", 1, 0.73), line("ema", 0, 0.69), line("ema", 2, 0.9)]
    assert differences(lines, "ema") == pytest.approx([-1.0, 1.0])
    assert differences(lines, "mixup") == []


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([1.0, 1.2, 0.9], "+1.03 points (± 0.15, n=3): more than chance"),
        ([1.0, -1.2, 0.9], "+0.23 points (± 1.24, n=3): cannot tell"),
        ([1.0, 1.6], "+1.30 points (± 0.42, n=2): cannot tell"),
        ([0.5], "+0.50 points (n=1, no spread): cannot tell"),
        ([-3.0], "-3.00 points (n=1, no spread): one seed only"),
    ],
)
def test_a_verdict_claims_no_more_than_the_seeds_say(points, expected):
    assert verdict(points, 20_000) == expected


@pytest.mark.parametrize("name", SUITES)
def test_every_part_is_made_of_flags_that_exist(name):
    parser, suite = fit_parser(), SUITES[name]
    for flags in suite.settings.values():
        arguments, _ = training_arguments("fit", [*suite.flags, *flags])
        parser.parse_args(arguments)
    assert set(suite.tta) < suite.settings.keys()
