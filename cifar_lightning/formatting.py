"""Numbers, durations and user input as text, for the terminal and the report; "-" for a missing value."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction as "12.3 %"."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{decimals}f} %"


def span(interval: Sequence[float], decimals: int = 1) -> str:
    """Return an interval of fractions as "12.3 to 45.6 %"."""
    return f"{100 * interval[0]:.{decimals}f} to {percent(interval[1], decimals)}"


def points(difference: float, decimals: int = 1) -> str:
    """Return a difference of fractions in percentage points, as "+1.2"; zero has no sign."""
    if math.isnan(difference):
        return "-"
    rounded = round(100 * difference, decimals)
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"


def points_span(interval: Sequence[float], decimals: int = 1) -> str:
    """Return an interval of differences as "-0.7 to +1.9"."""
    return f"{points(interval[0], decimals)} to {points(interval[1], decimals)}"


def decimal(value: float | None, decimals: int) -> str:
    """Return a number with a fixed count of decimals."""
    return "-" if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def count(value: float) -> str:
    """Return a whole number as "12,345"."""
    return f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """Return "1 epoch" or "12,345 epochs"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def images(number: int) -> str:
    """Return "1 image" or "12,345 images"."""
    return plural(number, "image")


def pvalue(p: float | None) -> str:
    """Return a p-value as "p = 0.0123"; empty for None."""
    if p is None:
        return ""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def unbroken(text: str) -> str:
    """Return text with non-breaking spaces between a number and its sign."""
    return re.sub(r"(?<=\d) (?=%)|(?<=\bp) (?=[=<])|(?<=[=<]) (?=\d)", "\u00a0", text)


def duration(seconds: float | None) -> str:
    """Return seconds as "12 s", "3.4 min" or "5.6 h"."""
    if seconds is None or math.isnan(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def clock(seconds: float) -> str:
    """Return seconds as "42 s", "3:07" or "1:02:03"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def counted(number: int, one: str, many: str) -> str:
    """Return "No classes are", "One class is" or "3 classes are"."""
    return f"One {one}" if number == 1 else f"{number or 'No'} {many}"


def clipped(text: str, most: int = 80) -> str:
    """Return what a user typed on one short line: without its middle, and with what does not print as \\xNN."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return printable(text)


def reason_of(error: BaseException) -> str:
    """Return an error's message on one short line, or its type where it has none."""
    return clipped(" ".join(str(error).split()) or type(error).__name__, 200)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escape control characters and characters that `encoding` lacks.

    Class names are folder names, which may hold bytes that are not UTF-8 (as lone surrogates), newlines or escapes.
    """
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def suggest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean X?" for the nearest of some words, or of the keys of a mapping to what is suggested."""
    suggested = words if isinstance(words, Mapping) else {each: each for each in words}
    near = difflib.get_close_matches(word, suggested, n=1, cutoff=cutoff)
    return f" Did you mean {suggested[near[0]]}?" if near else ""


def run_name(path: Path) -> str:
    """Return the name of a run: "smallnet/1" for runs/smallnet/1, the folder's name for a folder given by --run_dir."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name
