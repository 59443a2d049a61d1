"""Numbers, durations and user input as text, for the terminal and the report; "-" for a missing value.

Text from outside (names of classes and files, what a run folder or a library says) is escaped by the rule of where it
goes: `printable` on a terminal, `csv_cell` in a CSV, `markdown` and `markdown_code` in Markdown, `shell_line` in a
command to copy. In HTML jinja2 escapes it.
"""

import difflib
import math
import os
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast


def percent(fraction: float | None, decimals: int = 1, tolerance: float = 1e-9) -> str:
    """Return a fraction as "12.3 %"; zero has no sign, and one below 1 has more decimals where it would be "100.0 %".

    A fraction within `tolerance` of 1, by default the rounding of a sum, is 1; without decimals it is rounded.
    """
    if fraction is None or math.isnan(fraction):
        return "-"
    while decimals and fraction < 1 - tolerance and float(f"{100 * fraction:.{decimals}f}") == 100:
        decimals += 1
    return f"{100 * fraction:z.{decimals}f} %"


def span(interval: Sequence[float], decimals: int = 1) -> str:
    """Return an interval of fractions as "12.3 to 45.6 %"."""
    return f"{100 * interval[0]:z.{decimals}f} to {100 * interval[1]:z.{decimals}f} %"


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
    """Return a number with a fixed count of decimals; zero has no sign."""
    return "-" if value is None or math.isnan(value) else f"{value:z.{decimals}f}"


def count(value: float) -> str:
    """Return a whole number as "12,345"."""
    return f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """Return "1 epoch" or "12,345 epochs"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


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
    """Return seconds as "42 s", "3:07" or "1:02:03"; "?" of what has no end, as an epoch of unknown length."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def counted(number: int, one: str, many: str) -> str:
    """Return "No classes are", "One class is" or "3 classes are"."""
    return f"One {one}" if number == 1 else f"{number or 'No'} {many}"


def first_of(texts: Sequence[str], most: int) -> str:
    """Return the first of some texts and how many more there are: "a, b, c and 4 more"."""
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def shortened_apart(names: Sequence[str], cut: Callable[[str], str]) -> list[str]:
    """Return names that `cut` has shortened; where this makes them equal, with their numbers in front."""
    texts = [cut(name) for name in names]
    times = Counter(texts)
    return [
        cut(f"{at} {name}") if times[text] > 1 else text
        for at, (name, text) in enumerate(zip(names, texts, strict=True))
    ]


def shorten(name: str, most: int = 24) -> str:
    """Return a name of at most `most` characters; 24 are legible next to a figure."""
    return name if len(name) <= most else f"{name[: most - 2]}.."


def index_name(split: str, index: int) -> str:
    """Return the name of an image that has no file, by the data set's own split and index: "test[17]"."""
    return f"{split}[{index}]"


def is_index_name(name: str) -> bool:
    """Whether `index_name` made the name of an image."""
    return re.fullmatch(r"(train|val|test)\[\d+\]", name) is not None


def clipped(text: str, most: int = 80) -> str:
    """Return what a user typed on one short line: without its middle, and with what does not print as \\xNN."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return printable(text)


def reason_of(error: BaseException) -> str:
    """Return an error's message on one short line, or its type where it has none; pydantic's names its first field."""
    if type(error).__module__.startswith("pydantic"):
        return _invalid_field(cast(Any, error).errors(include_url=False)[0])
    return clipped(" ".join(str(error).split()) or type(error).__name__, 200)


def _invalid_field(found: Mapping[str, Any]) -> str:
    """Return what is wrong with a field in the words of pydantic, whose own message has many lines and an address."""
    wrong = "not a mapping" if found["type"].startswith("model") else found["msg"]
    if not (field := ".".join(map(str, found["loc"]))):
        return clipped(wrong, 200)
    got = f", got {clipped(str(found['input']), 40)}" if isinstance(found["input"], str | int | float) else ""
    return f"{clipped(field)}: {clipped(wrong, 200)}{got}"


def raised_by(error: BaseException) -> str:
    """Return what code of the user's raised, and its line: "OSError: broken file, my_data.py:18"."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {reason_of(error)}, {line.filename}:{line.lineno}"


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escape control characters and characters that `encoding` lacks.

    Class names are folder names, which may hold bytes that are not UTF-8 (as lone surrogates), newlines or escapes.
    """
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what spreadsheets run, and what `csv_cell` has made of it


def csv_cell(text: str) -> str:
    """Return text as a cell that no spreadsheet reads as a formula: `'=1+1` for `=1+1`; `csv_text` is the reverse."""
    return f"'{text}" if _FORMULA.match(text) else text


def csv_text(cell: str) -> str:
    """Return the text that `csv_cell` has written."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, also in a table; `_` within a word needs no escape."""
    escaped = re.sub(r"([\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))
    return escaped.replace("://", ":\\//")  # GitHub makes links of bare addresses


def markdown_code(text: str) -> str:
    """Return text as Markdown's code, between more backticks than it holds in a row."""
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def shell_line(*words: str | Path) -> str:
    """Return a command for a shell, on one line; words with characters that do not print as bash's and zsh's $'...'."""
    return " ".join(map(_shell_word, map(str, words)))


def program() -> str:
    """Return how this program was called, as a command to copy.

    Another program that uses the package, such as a notebook, has the installed one for what it prints.
    """
    script = Path(sys.argv[0]) if sys.argv else Path()
    if script.name == "train.py" and script.resolve() == Path(__file__).parents[1] / "train.py":
        return shell_line("python", script)
    is_module = script.name == "__main__.py" and script.parent.name == "cifar_lightning"
    return "python -m cifar_lightning" if is_module else "cifar-lightning"


def is_program() -> bool:
    """Whether this process is this program, and not another one that uses the package."""
    return Path(sys.argv[0]).stem == "cifar-lightning" or program() != "cifar-lightning" if sys.argv else False


def command_line(*words: str | Path) -> str:
    """Return a command of this program, as it was called."""
    return f"{program()} {shell_line(*words)}"


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


def suggest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean X?" for the nearest of some words, or of the keys of a mapping to what is suggested."""
    suggested = words if isinstance(words, Mapping) else {each: each for each in words}
    near = difflib.get_close_matches(word, suggested, n=1, cutoff=cutoff)
    return f" Did you mean {suggested[near[0]]}?" if near else ""


def object_text(setting: Any) -> str:
    """Return a setting as text; of an object that is given by `class_path`, "torch.optim.SGD lr 0.1 momentum 0.9"."""
    if not isinstance(setting, dict) or "class_path" not in setting:
        return str(setting)
    given = setting.get("init_args")
    pairs = given.items() if isinstance(given, dict) else ()
    text = " ".join([str(setting.get("class_path")), *(f"{name} {value}" for name, value in pairs if value)])
    return clipped(text, 200)


def run_name(path: Path) -> str:
    """Return the name of a run: "smallnet/1" for runs/smallnet/1, the folder's name for a folder given by --run_dir.

    That of a seed is "smallnet/1/0".
    """
    parts = path.resolve().parts
    first = next((at for at in range(len(parts) - 1, 0, -1) if not parts[at].isdecimal()), len(parts) - 1)
    return "/".join(parts[first:])
