import math
from pathlib import Path

import pytest

from cifar_lightning.formatting import (
    clipped,
    clock,
    count,
    counted,
    decimal,
    duration,
    images,
    percent,
    points,
    points_span,
    printable,
    pvalue,
    run_name,
    span,
    unbroken,
)


def test_fractions_and_differences():
    assert percent(0.12345) == "12.3 %"
    assert percent(1, 2) == "100.00 %"
    assert span((0.1, 0.256)) == "10.0 to 25.6 %"
    assert points(0.0123) == "+1.2"
    assert points(-0.0001) == points(0.0) == "0.0"
    assert points_span((-0.007, 0.019)) == "-0.7 to +1.9"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_has_no_value_is_a_dash(nothing):
    assert percent(nothing) == decimal(nothing, 2) == duration(nothing) == "-"
    assert points(math.nan) == "-"


def test_counts_p_values_and_times():
    assert count(12345) == "12,345"
    assert [pvalue(p) for p in (None, 1e-300, 0.01234, 1.0)] == ["", "p < 0.0001", "p = 0.0123", "p = 1.0000"]
    assert [duration(seconds) for seconds in (12.4, 200, 7300)] == ["12 s", "3.3 min", "2.0 h"]
    assert [counted(number, "dog is", "dogs are") for number in (0, 1, 2)] == [
        "No dogs are",
        "One dog is",
        "2 dogs are",
    ]


def test_what_was_typed_stays_on_one_short_line_and_cannot_steer_a_terminal():
    assert clipped("configs/Bär.yaml") == "configs/Bär.yaml"
    assert clipped("\x1b[31m\n\udcff\u202e") == r"\x1b[31m\n\udcff\u202e"
    assert clipped("a" * 500 + "z" * 500, 80) == "a" * 40 + "..." + "z" * 20


def test_printable_leaves_ordinary_names_and_escapes_the_rest():
    assert printable("Käfer 狗") == "Käfer 狗"
    assert printable("Käfer", "ascii") == "K\\xe4fer"
    assert printable("a\x1b[31m\udcff") == "a\\x1b[31m\\udcff"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (187.6, "3:08"), (3723, "1:02:03")]
)
def test_seconds_read_as_a_clock(seconds, text):
    assert clock(seconds) == text


def test_images_are_one_or_several():
    assert [images(number) for number in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]


def test_no_line_breaks_between_a_number_and_its_sign():
    assert unbroken("a 95 % b; p < 0.0001 or p = 1") == "a 95\u00a0% b; p\u00a0<\u00a00.0001 or p\u00a0=\u00a01"
    assert unbroken("up to % here") == "up to % here"


def test_a_run_is_called_by_recipe_and_number_or_its_folder():
    assert run_name(Path("runs/smallnet/1")) == "smallnet/1"
    assert run_name(Path("elsewhere/best run")) == "best run"
