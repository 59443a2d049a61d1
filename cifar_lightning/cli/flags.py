"""The flags of fit, validate, test, predict and tune, without torch: names, types and defaults from a generated table.

`python -m cifar_lightning.cli.lightning_cli` generates `flags.json` from the signatures, and a test holds them equal.
With it, usage errors are reported without torch; LightningCLI checks the rest.
"""

import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cifar_lightning.cli.configs import find_config, suggest_config
from cifar_lightning.errors import UserError
from cifar_lightning.files import read_bytes
from cifar_lightning.formatting import clipped, reason_of, shell_line, suggest
from cifar_lightning.runs.folder import RunFolder
from cifar_lightning.runs.schema import CLASS_GROUPS, upgrade_config
from cifar_lightning.settings.comparison import within
from cifar_lightning.settings.import_path import check_trust, import_paths, is_import_path
from cifar_lightning.settings.roles import is_object_name
from cifar_lightning.settings.safe_yaml import MAX_BYTES, read_setting, read_yaml

ALIASES = {"epochs": "trainer.max_epochs", "batch_size": "data.batch_size", "lr": "model.lr"}
GROUPS = ("trainer", "model", "data", "early_stopping", "checkpoint")  # each also takes a YAML file of its keys
OF_FIT = ("early_stopping", "checkpoint")  # groups that the other commands have no use for
MAY_BE_OBJECTS = ("model.name", "model.loss", "data.dataset")  # settings in whose place Python gives an object
FRONT_ONLY = ("config", "resume", "seeds", "print_config", "trust_code")  # not keys of a config
# What people type who come from elsewhere.
SYNONYMS = {"learning_rate": "lr", "num_epochs": "epochs", "max_lr": "lr", "bs": "batch_size", "seed": "data.seed"}
SYNONYMS |= {"output_dir": "run_dir", "gpus": "trainer.devices", "arch": "model.name", "resume_from": "resume"}
_AFTER_CLASS = ("--optimizer.", "--lr_scheduler.")  # jsonargparse knows them once it knows the class
_MAX_FILES = 100  # of settings, which may name each other without end
_FILE_SCHEME = re.compile("^file:///?")  # as jsonargparse has it
_INTEGER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)")
NULL = ("null", "none", "~", "")  # what YAML reads as None, in lower case
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Return flag -> {"types", "default", "help", "choices", "bounds", "allowed"}.

    "bounds" of a number, and "allowed", what a message says of them; "open" where a class, list or dict may be given;
    "prefixes" where there are more choices than the table holds: names of a library behind its prefix.
    """
    rows: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
    return rows


def normalize_arguments(command: str, arguments: Sequence[str], config: Path | None = None) -> list[str]:
    """Return the flags of a command as `--long.name=value`, checked; aliases are spelled out.

    One token a flag, so that negative numbers and values that begin with a dash are read as values, and a flag that is
    true or false may stand without a value. `--model CLASS` becomes `--model_class`, and the arguments of a class of
    one's own, which `config`, a run's, may name, are left to jsonargparse.
    """
    normalized, given = [], dict[str, tuple[str, str]]()
    flags = [flag for typed, value in _pairs(command, arguments) for flag in _without_class_path(typed, value)]
    # jsonargparse takes the last: a flag overrides a config wherever it stands, and a config of a group that of all.
    flags.sort(key=lambda flag: (flag[1] != "config", "." in flag[1]))
    named = [f"--{name}={value}" for _, name, value in flags if value is not None]
    own = own_classes([*([f"--config={config}"] if config else []), *named])
    for typed, name, value in flags:
        plain = name.removesuffix("+")
        is_own = plain.partition(".")[0] in own
        if not (is_own or plain in FRONT_ONLY or _is_setting(plain)):
            raise UserError(f"--{clipped(typed)}: no such flag.{suggest_flag(plain)}")
        of_fit = plain.partition(".")[0] in OF_FIT
        takers = table().get(plain, {}).get("commands", ["fit"] if of_fit else [command])
        if command not in takers:
            raise UserError(f"--{typed}: a flag of {' and '.join(takers)}, not of {command}.")
        if value is None:
            value = _value_left_out(plain, typed)
        elif not is_own:
            _check_text(plain, value, f"--{typed} {clipped(value)}")
            check_value(plain, value, f"--{typed} {clipped(value)}")
            if is_import_path(value) and table().get(plain, {}).get("open") and plain not in MAY_BE_OBJECTS:
                value = value.replace(":", ".")  # jsonargparse knows classes by points alone
        other, other_value = given.get(name, (typed, value or ""))
        if (other in ALIASES) != (typed in ALIASES) and other_value != (value or ""):
            raise UserError(
                f"--{other} {clipped(other_value)} and --{typed} {clipped(value or '')} are one setting with two "
                "values; give one of them."
            )
        given[name] = (typed, value or "")
        normalized.append(f"--{name}" if value is None else f"--{name}={value}")
    return sorted(normalized, key=lambda flag: flag.startswith(_AFTER_CLASS))


def _without_class_path(typed: str, value: str | None) -> list[tuple[str, str, str | None]]:
    """Return a flag as (typed, name, value); of LightningCLI's ways to give a class and its arguments, as two."""
    name = ALIASES.get(typed, typed)
    group, _, argument = name.partition(".")
    if group not in CLASS_GROUPS or value is None:
        return [(typed, name, value)]
    if argument == "class_path":
        return [(typed, f"{group}_class", value)]
    if not argument:
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # reported by those who read it
            text = read_bytes(Path(value), MAX_BYTES, follow_links=True).decode() if os.path.isfile(value) else value
            settings = upgrade_config({group: read_yaml(text)})
            if path := settings.get(f"{group}_class"):
                rest = [(typed, group, json.dumps(settings[group]))] if settings.get(group) else []
                return [(typed, f"{group}_class", str(path)), *rest]
    return [(typed, f"{group}.{argument.removeprefix('init_args.')}" if argument else group, value)]


def own_classes(flags: Iterable[str]) -> dict[str, str]:
    """Return the import paths of classes of one's own, by their groups, that normalized flags and configs name."""
    paths = dict[str, Any]()
    for name, _, value in (flag[2:].partition("=") for flag in flags):
        if name in ("config", "resume"):
            paths |= config_tree(find_config(value) if name == "config" else Path(value, "config.yaml"))
        elif name.endswith("_class"):
            paths[name] = value
    given = {group: str(paths.get(f"{group}_class") or "") for group in CLASS_GROUPS}
    return {group: path for group, path in given.items() if path.lower() not in NULL}


def config_tree(file: Path) -> dict[str, Any]:
    """Return the settings in a config; empty where it cannot be read, which `check_config` reports."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = upgrade_config(read_yaml(read_bytes(file, MAX_BYTES, follow_links=True).decode()))
        return tree if isinstance(tree, dict) else {}
    return {}


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of a flag among normalised arguments; the last one counts."""
    values = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0] == f"--{name}"]
    return values[-1] if values else None


def _pairs(command: str, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (name without dashes, value or None) of each flag."""
    at = 0
    while at < len(arguments):
        argument = arguments[at]
        at += 1
        argument = "--config" + argument[2:] if _is_short(argument) else argument
        if not argument.startswith("--") or len(argument) == 2:
            hint = _hint_for_argument(command, argument)
            raise UserError(f"{command} takes no argument '{clipped(argument)}'.{hint}")
        name, equals, value = argument[2:].partition("=")
        if equals:
            yield name, value
        elif name != "print_config" and at < len(arguments) and not is_flag(arguments[at]):
            yield name, arguments[at]
            at += 1
        else:
            yield name, None


def _is_short(argument: str) -> bool:
    return argument.partition("=")[0] == "-c"  # of --config


def is_flag(argument: str) -> bool:
    """Whether an argument is a flag, and not the value of the one before it."""
    return argument.startswith("--") or _is_short(argument)


def _hint_for_argument(command: str, argument: str) -> str:
    if argument.endswith((".yaml", ".yml")):
        return f" For a config: {command} --config {clipped(argument)}"
    if argument.startswith("-") and len(argument) > 2:
        return f" Flags have two dashes: -{clipped(argument)}"
    names = ("config.yaml", "seeds.json")
    is_run = any(os.path.isfile(os.path.join(argument, name)) for name in names)  # pathlib's may raise
    if command in ("validate", "test", "predict") and is_run:
        return f" It takes one run, before the flags: {command} {shell_line(argument)}"
    if command == "fit" and is_run:
        return f" To resume a run: fit --resume {shell_line(argument)}"
    if command == "fit" and os.path.isdir(argument):
        return f" For class folders: fit --data.dataset folder --data.root {shell_line(argument)}"
    return ""


def _is_setting(name: str) -> bool:
    parents = (name[:at] for at in range(len(name)) if name[at] == ".")
    return name in table() or name in GROUPS or any(table().get(parent, {}).get("open") for parent in parents)


def suggest_flag(name: str) -> str:
    """Return " Did you mean --X?" for the flag nearest to a name, or where to find them all."""
    if name in ("num_classes", "model.num_classes"):
        return " The data gives the number of classes; --data.class_names names those of a data set of your own."
    names = [*ALIASES, *table(), *FRONT_ONLY]
    by_last = {full.rpartition(".")[2]: full for full in reversed(names)}
    full_of = by_last | {name: name for name in names} | SYNONYMS
    spelled = name.replace("-", "_").lower()
    near = suggest(spelled, {known: f"--{full}" for known, full in full_of.items()}, cutoff=0.75)
    return near or " fit --help shows the common ones, fit --help-all every one."


def _value_left_out(name: str, typed: str) -> str | None:
    row = table().get(name, {})
    if name == "print_config":
        return None
    if "bool" in row.get("types", ()) or name == "trust_code":
        return "true"
    raise UserError(f"--{typed}: needs a value, {_words(row)}.")


def check_value(name: str, value: str, typed: str, folder: Path = Path()) -> None:
    """Refuse a value that a flag surely does not take; the message begins with `typed`.

    A path among the values, of a file with further settings, is relative to `folder`.
    """
    row = table().get(name)
    # As of a shell's variable that is not set; the parser takes it for the working directory. Arguments of a class may
    # be empty, such as a logger's name.
    if not value.strip() and (row is not None or "." not in name):
        raise UserError(f"{typed.rstrip()}: is empty; give a value, or leave it out.")
    if name in MAY_BE_OBJECTS and is_object_name(value):
        return
    if value == "None" and row is not None and "null" in row["types"] and "none" not in row.get("choices", ()):
        raise UserError(f"{typed}: Python's word, which is text here; give null, or leave it out.")
    if name in GROUPS or (row is not None and row.get("open")):
        path = _file_of(value, folder)
        if os.path.exists(path) and not os.path.isdir(path):
            try:  # jsonargparse would wait for a FIFO, and read a device without end
                read_bytes(Path(path), MAX_BYTES, follow_links=True)
            except OSError as error:
                raise UserError(f"{typed}: cannot be read ({error.strerror}).") from error
    if name in ("model.model_kwargs", "model.loss_kwargs"):
        example = "{gamma: 2}" if name == "model.loss_kwargs" else "{widths: [32, 64, 128]}"
        _check_mapping(value, typed, f"names and values, such as '{example}'.")
    if name in GROUPS and re.fullmatch(r"\w+", value) and value.lower() not in NULL and not os.path.isfile(path):
        by_name = {"model": f"--model.name {clipped(value)}", "data": f"--data.dataset {clipped(value)}"}.get(name)
        own = f", or the import path of a class; by name: {by_name}" if by_name else ""
        _check_mapping(value, typed, f"settings, a file of them{own}.")
    if row is None or row.get("prefixes"):
        return  # a library's names are known to those who import it
    if not row.get("open") and not _fits(row, value):
        raise UserError(f"{typed}: {_words(row)}.{suggest(value, row.get('choices', []))}")
    number = _number(value)
    if "bounds" in row and number is not None and not within(number, row["bounds"]):
        raise UserError(f"{typed}: {row['allowed']}.")


def _check_text(name: str, value: str, typed: str) -> None:
    """Refuse a list that is no YAML, and text that is nothing in it: the parser would take the default in its place."""
    row = table().get(name, {})
    try:
        is_nothing = read_setting(value) is None and value.lower() not in NULL
    except yaml.YAMLError as error:
        if row.get("open") and value[:1] in ("[", "{"):
            raise UserError(f"{typed}: not YAML ({reason_of(error)}).") from error
        return
    if is_nothing and {"str", "null"} <= {*row.get("types", ())}:
        raise UserError(f"{typed}: is nothing in YAML; for a path: --{name} ./{clipped(value)}")


def _check_mapping(value: str, typed: str, allowed: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        if isinstance(read_yaml(value), dict | None):
            return
    raise UserError(f"{typed}: {allowed}")


def _fits(row: dict[str, Any], value: str) -> bool:
    types = row["types"]
    if value in row.get("choices", []) or ("str" in types and ("choices" not in row or is_import_path(value))):
        return True
    lowered = value.strip().lower()
    return (
        ("null" in types and lowered in NULL)
        or ("bool" in types and lowered in ("true", "false", "yes", "no", "on", "off"))
        or ("int" in types and bool(_INTEGER.fullmatch(lowered)))
        or ("float" in types and _number(value) is not None)
    )


def _number(value: str) -> float | None:
    lowered = value.strip().lower().replace("_", "")
    if lowered.lstrip("+-") in (".nan", ".inf"):  # as YAML writes them
        lowered = lowered.replace(".", "")
    for read in (float, functools.partial(int, base=0)):  # YAML also knows 0x10
        with contextlib.suppress(ValueError):
            return float(read(lowered))
    return None


def _words(row: dict[str, Any]) -> str:
    choices = [f"one of {', '.join(map(str, row['choices']))}"] if row.get("choices") else []
    kinds = [_WORDS[kind] for kind in row.get("types", ()) if kind in _WORDS]  # null is the default: nobody asks for it
    paths = ["package.module:name"] if choices and "str" in row["types"] else []
    return ", or ".join([*choices, *paths, *kinds]) or "such as --flag VALUE"


def check_config(path: Path, *, trust_code: bool = False, given: Collection[str] = (), own: Iterable[str] = ()) -> None:
    """Check the keys and values of a config as those of flags; what it leaves to files of its own is not checked.

    Code of one's own that the config of a run names is refused, unless `trust_code`; and so are an object from Python
    in its place, and `output`. Those of the settings `given` are not needed. Arguments of a class of one's own, which a
    group of `own` has, are not checked.
    """
    file = f"--config {clipped(str(path), 200)}"
    try:
        tree = upgrade_config(read_yaml(read_bytes(path, MAX_BYTES, follow_links=True).decode()))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).{suggest_config(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML ({reason_of(error)}).") from error
    if tree is None:
        return
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds a {type(tree).__name__}; a config is keys and values, as in configs/.")
    _check_code_of_run(path, tree, trust_code, given)
    is_own = {*own, *(group for group in CLASS_GROUPS if tree.get(f"{group}_class"))}
    _refuse_classes_in_files({group: tree[group] for group in tree.keys() - is_own if group in CLASS_GROUPS}, path)
    leaves = list(_leaves({name: value for name, value in tree.items() if name not in is_own}))
    num_given = Counter(name for name, _ in leaves)
    for name, value in leaves:
        if num_given[name] > 1:  # as model: {lr: 1} and as model.lr: 1
            raise UserError(f"{file}: {clipped(name)} is given twice; leave one of them out.")
        if name in ALIASES:
            raise UserError(f"{file}: {name} is short for {ALIASES[name]} on the command line; write that here.")
        if not _is_setting(name):
            raise UserError(f"{file}: {clipped(name)} is no setting.{suggest_flag(name).replace('--', '', 1)}")
        types = table().get(name, {}).get("types", ())
        if isinstance(value, int | float) and "str" in types and not {"int", "float", "bool"} & set(types):
            raise UserError(f"{file}: {name} {str(value).lower()}: a number or truth value; quote it if it is text.")
        if isinstance(value, str | int | float | list):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            check_value(name, text, f"{file}: {name} {clipped(text)}", path.parent)
        elif value is None:
            _check_nothing(name, file)


def _refuse_classes_in_files(groups: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of a group that names a class: the parser, which knows its arguments, is made without that file."""
    for group, value in groups.items():
        named = os.path.join(path.parent, value) if isinstance(value, str) else ""  # pathlib's raises for long names
        if os.path.isfile(named) and "class_path" in config_tree(Path(named)):
            raise UserError(
                f"--config {clipped(str(path), 200)}: {group} {clipped(value)}: names a class; write its content under "
                f"{group}, or give --{group} {clipped(value)}."
            )


def _check_code_of_run(path: Path, tree: dict[str, Any], trust_code: bool, given: Collection[str]) -> None:
    run = RunFolder(Path(os.path.realpath(path.parent)))
    is_seeds_run = run.path.name.isdecimal() and os.path.lexists(RunFolder(run.path.parent).seeds)  # begun or not
    if not (is_seeds_run or run.checkpoints.is_dir()):
        return
    if tree.get("output") is not None:  # fit writes none, and whoever made the run would choose a file of the user's
        raise UserError(f"{path}: output is of one command, not of a run; remove that line and give --output FILE.")
    for name in MAY_BE_OBJECTS:
        group, _, key = name.partition(".")
        settings = tree.get(group)
        value = settings.get(key) if isinstance(settings, dict) else None
        if name not in given and is_object_name(value):
            raise UserError(
                f"{path.parent}: its {group} {clipped(str(value))} is an object of Python, which no command makes.\n"
                f"In Python: cifar_lightning.load(RUN, {group}=...).test(), or fit(resume=RUN, {group}=...)."
            )
    if trust_code:
        return
    for name, import_path in import_paths(_as_read(tree, path.parent)):  # of a run, which may be somebody else's
        if name not in given:
            check_trust(import_path, f"--{name}", path, trust_code=False)


def _as_read(value: Any, folder: str | Path, name: str = "", files: list[str] | None = None) -> Any:
    """Return settings as jsonargparse reads them: what is in text that is YAML, or in a file that text names.

    Text of settings that take no class stays as it is. `files` are those that were read before.
    """
    files = [] if files is None else files
    if isinstance(value, dict):
        return {key: _as_read(item, folder, f"{name}.{key}".lstrip("."), files) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_read(item, folder, name, files) for item in value]
    if not isinstance(value, str) or not table().get(name, {}).get("open", True):
        return value
    file = _file_of(value, folder)
    is_file = os.path.isfile(file)
    try:
        if is_file and _is_binary(file):  # weights, an image: jsonargparse reads no settings there
            return value
        files += [file] if is_file else []
        if len(files) > _MAX_FILES:
            raise UserError(f"{clipped(file, 200)}: cannot be read (more than {_MAX_FILES} files of settings).")
        content = read_setting(read_bytes(Path(file), MAX_BYTES, follow_links=True).decode() if is_file else value)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{clipped(file, 200)}: cannot be read ({reason_of(error)}).") from error
    except yaml.YAMLError:  # nor does jsonargparse read it
        return value
    if is_file or isinstance(content, dict | list):
        return _as_read(content, os.path.dirname(file) if is_file else folder, name, files)
    return value


def _is_binary(file: str) -> bool:
    with open(file, "rb") as opened:
        return b"\0" in opened.read(64)  # which YAML cannot hold


def _file_of(value: str, folder: str | Path) -> str:
    """Return the file of settings that jsonargparse reads in the place of a value, if there is one."""
    path = _FILE_SCHEME.sub("" if os.name == "nt" else "/", os.path.expanduser(value))
    return os.path.join(folder, path)  # pathlib's raises for long names


def _check_nothing(name: str, file: str) -> None:
    """Refuse a key with nothing behind it where that would not mean the default."""
    if name in GROUPS:
        raise UserError(f"{file}: nothing stands under {name}; put settings there, or leave the line out.")
    row = table().get(name, {})
    if row and not row.get("open") and "null" not in row["types"]:
        raise UserError(f"{file}: {name} has no value; {_words(row)}, or leave the line out.")


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in table():
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
