"""Numbers as text, the same on the terminal, the page and in findings; a dash where there is none."""

import math
from collections.abc import Sequence


def percent(share: float | None, decimals: int = 1) -> str:
    """Return a share as "12.3 %"."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{decimals}f} %"


def span(interval: Sequence[float], decimals: int = 1) -> str:
    """Return an interval of shares as "12.3 to 45.6 %"."""
    return f"{100 * interval[0]:.{decimals}f} to {percent(interval[1], decimals)}"


def points(difference: float, decimals: int = 1) -> str:
    """Return a difference of shares in points, as "+1.2"; never "-0.0"."""
    return "-" if math.isnan(difference) else f"{round(100 * difference, decimals) + 0.0:+.{decimals}f}"


def points_span(interval: Sequence[float], decimals: int = 1) -> str:
    """Return an interval of differences as "-0.7 to +1.9"."""
    return f"{points(interval[0], decimals)} to {points(interval[1], decimals)}"


def decimal(value: float | None, decimals: int) -> str:
    """Return a number."""
    return "-" if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def count(value: float) -> str:
    """Return a whole number as "12,345"."""
    return f"{value:,.0f}"


def pvalue(p: float | None) -> str:
    """Return a p-value as "p = 0.0123"; empty where nothing was tested."""
    if p is None:
        return ""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def duration(seconds: float | None) -> str:
    """Return seconds as "12 s", "3.4 min" or "5.6 h"."""
    if seconds is None or math.isnan(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(number: int, one: str, many: str) -> str:
    """Return "No classes are", "One class is" or "3 classes are"."""
    return f"One {one}" if number == 1 else f"{number or 'No'} {many}"
