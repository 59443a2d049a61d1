"""What users get wrong, as hypothesis strategies: command lines, recipes and image files with mistakes in them."""

import io
import string

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from cifar_lightning.cli.flags import ALIASES, table
from cifar_lightning.cli.help import TRAINING
from cifar_lightning.cli.main import QUICK

# Never an absolute path or a "..": a mutated --run_dir or --output must stay in the folder of the test.
_LETTERS = string.ascii_letters + string.digits + "-_=.,:; '\"{}[]&*!%@#<>|~ü\u2028\udcff"
ODD_VALUES = (
    *("", " ", "0", "-1", "1", "3.5", "1e3", "1e400", "-0", "0x10", "1_0", "+7", "08", "0b2", "1.", ".5", "-.5e-3"),
    *("nan", ".nan", "NaN", "inf", ".inf", "-.inf", "Infinity", "1e-400", "99999999999999999999", "9" * 5000, "1" * 19),
    *(
        "null",
        "None",
        "~",
        "true",
        "False",
        "yes",
        "on",
        "y",
        "None,",
        "auto",
        "cpu",
        "cuda:7",
        "fit",
        "--",
        "-",
        "---",
    ),
    *("[]", "{}", "[1, 2", "{a: 1}", "[[[[]]]]", "{a: {b: {c: [1, {d: null}]}}}", '{"a": NaN}', "[1, 'x', null]"),
    *("{widths: []}", "{widths: 3}", "{widths: [0]}", "{widths: [-1]}", "{widths: [4, x]}", "{dropout: 7}"),
    *("{widths: {a: 1}}", "{num_classes: 3}", "{image_size: 4}", "{widths: [4, 8], nonsense: 1}", "{1: 2}"),
    *("&a [*a]", "&a {b: *a}", "*a", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!int x"),
    *("!!timestamp x", "2024-99-99", "!!bool x", "!!float x", "%", "@", "`", "? [1]: 2", "a: b: c", "<<: 1", "- 1"),
    *("ä", "☃", "\udcff", "\udcff\udcfe.yaml", "\u2028", "\u202e", "\x1b[31m", "a\nb", "\t", "x" * 70_000, "[" * 3000),
    *("configs/quickstart.yaml", "configs", "runs", "run", "no such file.yaml", "images", "x" * 300, "class_path: x"),
    *("{class_path: nowhere.Thing}", "{class_path: 3}", "{class_path: Timer, init_args: 3}", "a=b", "=", "%s", "{}{}"),
)
_FLAGS = (*ALIASES, *table(), "config", "resume", "print_config", "help", "output", "root", "top_k", "format", "force")


def command_lines(lines):
    """Draw one of some command lines with one to three mistakes in it."""
    return st.tuples(st.sampled_from(lines), _few(_mistakes())).map(_with_mistakes)


def _few(mistakes):
    # Most often one alone: with several, the first that is found hides all others.
    return st.one_of(mistakes.map(lambda one: [one]), st.lists(mistakes, min_size=2, max_size=3))


def _mistakes():
    at = st.integers(0, 63)
    return st.one_of(
        st.tuples(st.sampled_from(["drop", "double", "split", "join"]), at, st.none()),
        st.tuples(st.just("swap"), at, at),
        st.tuples(st.just("misspell"), at, st.tuples(at, st.sampled_from(["", *_LETTERS]), st.booleans())),
        st.tuples(st.sampled_from(["replace", "insert", "value"]), at, st.sampled_from(ODD_VALUES)),
        st.tuples(st.just("flag"), at, st.tuples(st.sampled_from(_FLAGS), st.sampled_from(ODD_VALUES), st.booleans())),
        st.tuples(
            st.just("flag"), st.just(63), st.tuples(st.sampled_from(_FLAGS), st.sampled_from(ODD_VALUES), st.just(True))
        ),
        st.tuples(st.just("command"), st.just(0), st.sampled_from([*TRAINING, *QUICK, "--version", "--help", "-h"])),
    )


def _with_mistakes(drawn):
    line, mistakes = drawn
    tokens = list(line)
    for kind, where, what in mistakes:
        at = where % max(1, len(tokens))
        if kind == "insert" or not tokens:
            tokens.insert(at, what if isinstance(what, str) else "x")
        elif kind == "flag":
            name, value, joined = what
            # Behind the command, and between flags or values alike; or last, where it does not break up another.
            at = len(tokens) if where == 63 else max(1, at)
            tokens[at:at] = [f"--{name}={value}"] if joined else [f"--{name}", value]
        else:
            _mutate_one(tokens, kind, at, what)
    return tokens


def _mutate_one(tokens, kind, at, what):
    token = tokens[at]
    if kind == "drop":
        del tokens[at]
    elif kind == "double":
        tokens.insert(at, token)
    elif kind == "swap":
        other = what % len(tokens)
        tokens[at], tokens[other] = tokens[other], token
    elif kind == "split":
        tokens[at : at + 1] = [token[: len(token) // 2], token[len(token) // 2 :]]
    elif kind == "join":
        tokens[at : at + 2] = ["=".join(tokens[at : at + 2])]
    elif kind == "misspell":
        where, letter, overwrite = what
        where %= len(token) + 1
        tokens[at] = token[:where] + letter + token[where + (overwrite or not letter) :]
    elif kind == "value":
        tokens[at] = f"{token.partition('=')[0]}={what}"
    else:  # replace, command
        tokens[at] = what


# -- recipes ---------------------------------------------------------------------------------------------------------

_LINES = [
    *"""data: *nowhere
data: &a {root: *a}
data: !!set {a}
data: !!python/object/apply:os.system ['true']
data: {root: "\\0"}
data: {root: "\\uDCFF"}
data: !!timestamp x
data: {batch_size: !!int x}
data: {drop_last: !!bool x}
data: {seed: 0o9}
model:
model: {}
model: 3
model: [1]
model: null
model.lr: 1
model: {lr: {a: 1}}
model: {lr: [1]}
model: {lr: !!binary x}
model: {lr: 2024-01-01}
model: {name: "a\\nb"}
model: {model_kwargs: &a [*a]}
model: {model_kwargs: &a {b: *a}}
model: {model_kwargs: {widths: []}}
model: {model_kwargs: {widths: [0]}}
trainer: x
trainer: {max_epochs: '3'}
trainer: {max_epochs: 1e3}
trainer: {devices: [0, 0]}
trainer: {callbacks: 3}
trainer: {callbacks: [3]}
trainer: {callbacks: {class_path: nowhere.X}}
early_stopping: {patience: -1}
seed_everything: 99999999999999999999
seed_everything: -1
seed_everything: 2024-99-99
run_dir: .
init_weights: nowhere
tune_lr: true
output: x
resume: run
config: a.yaml
print_config: 1
fit: {}
a: &a {}
a: !b 1
<<: 1
? [1]
&a *a
- 1
1: 2
null: 1
'': 1
%YAML 9.9
---
...
!""".splitlines(),
    *("\t", "x" * 9000, "[" * 3000, "a: " * 2000),
]
_VALUES = ["3", "x", "null", "[1]", "{a: 1}", "true", "''", ".nan", "-1", "1e400", "*a"]
_VALUES += ["!!int x", "&a 1", '"\\0"', "9" * 5000]


def recipes(texts):
    """Draw the bytes of one of some recipes with one to three mistakes in it."""
    return st.tuples(st.sampled_from(texts), _few(_recipe_mistakes())).map(_spoilt_recipe)


def _recipe_mistakes():
    at = st.integers(0, 4095)
    return st.one_of(
        st.tuples(st.sampled_from(["drop", "double", "indent", "outdent", "anchor", "merge"]), at, st.none()),
        st.tuples(st.sampled_from(["insert", "append"]), at, st.sampled_from(_LINES)),
        st.tuples(st.just("alone"), at, st.sampled_from(_LINES)),
        st.tuples(st.just("value"), at, st.sampled_from(_VALUES)),
        st.tuples(st.just("setting"), at, st.tuples(st.sampled_from(list(table())), st.sampled_from(_VALUES))),
        st.tuples(st.just("rename"), at, st.tuples(at, st.sampled_from(["", *string.ascii_lowercase]))),
        st.tuples(st.just("flip"), at, st.integers(1, 255)),
        st.tuples(st.just("put"), at, st.sampled_from([b"\0", b"\xff", b"\xff\xfe", b"\t", b"\r", b"\xe2\x80\xa8"])),
        st.tuples(st.just("cut"), at, st.none()),
    )


def _spoilt_recipe(drawn):
    text, mistakes = drawn
    data = text.encode()
    for kind, where, what in mistakes:
        if kind in ("flip", "put", "cut"):
            at = where % (len(data) + 1)
            if kind == "cut":
                data = data[:at]
            elif kind == "put":
                data = data[:at] + what + data[at:]
            elif at < len(data):
                data = data[:at] + bytes([data[at] ^ what]) + data[at + 1 :]
            continue
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        _spoil_line(lines, kind, where % len(lines), what)
        data = "\n".join(lines).encode("utf-8", "surrogateescape")
    return data


def _spoil_line(lines, kind, at, what):
    line = lines[at]
    key, colon, _ = line.partition(":")
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, line)
    elif kind == "insert":
        lines.insert(at, what)
    elif kind == "append":
        lines.append(what)
    elif kind == "alone":
        lines[:] = [what]
    elif kind == "setting":
        group, _, name = what[0].rpartition(".")
        lines[:] = [f"{group}: {{{name}: {what[1]}}}" if group else f"{name}: {what[1]}"]
    elif kind == "indent":
        lines[at] = "  " + line
    elif kind == "outdent":
        lines[at] = line.removeprefix("  ")
    elif kind == "value":
        lines[at] = f"{key}: {what}"
    elif kind == "anchor":
        lines[at] = f"{key}{colon} &a {{b: *a}}"
    elif kind == "merge":
        lines[at] = f"{line}\n  <<: *a"
    else:  # rename
        where, letter = what
        where %= len(key) + 1
        lines[at] = key[:where] + letter + key[where + 1 :] + line[len(key) :]


# -- images --------------------------------------------------------------------------------------------------------

FORMATS = {"PNG": "png", "JPEG": "jpg", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


def encoded(kind, mode="RGB", side=24, **options):
    """Return an image's bytes."""
    shape = (side, side + 3, len(Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels, mode if shape[2] != 1 else "L")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_files():
    """Draw (suffix, bytes) of an image of some format with one to four faults in it."""
    whole = [(suffix, encoded(kind)) for kind, suffix in FORMATS.items()]
    whole += [("png", encoded("PNG", "RGBA")), ("jpg", encoded("JPEG", "CMYK")), ("tif", encoded("TIFF", "L"))]
    whole += [("tif", encoded("TIFF", compression=how)) for how in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    whole += [("jpg", encoded("JPEG", progressive=True)), ("webp", encoded("WEBP", lossless=True))]
    return st.tuples(st.sampled_from(whole), st.lists(_faults(), min_size=1, max_size=4)).map(_damaged)


def _faults():
    anywhere, header = st.integers(0, 1 << 16), st.integers(0, 63)
    at = st.one_of(anywhere, header)  # most of what a reader can trip over stands at the beginning
    return st.one_of(
        st.tuples(st.just("flip"), at, st.integers(1, 255)),
        st.tuples(
            st.just("set"), at, st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80"])
        ),
        st.tuples(st.just("insert"), at, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("delete"), at, st.integers(1, 64)),
        st.tuples(st.just("cut"), anywhere, st.none()),
        st.tuples(st.just("double"), at, st.integers(1, 64)),
    )


def _damaged(drawn):
    (suffix, data), faults = drawn
    for kind, where, what in faults:
        at = where % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ what]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + what :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "double":
            data = data[: at + what] + data[at:]
    return suffix, data
