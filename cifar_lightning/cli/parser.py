"""LightningCLI's parser with short errors, and the table of its flags that the quick commands read."""

import contextlib
import importlib
import inspect
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from pydantic import Field

from cifar_lightning.cli.flags import GROUPS, SYNONYMS, check_value, table
from cifar_lightning.cli.help import TRAINING
from cifar_lightning.cli.trainer_arguments import ARGUMENTS, LIMITS, check_trainer
from cifar_lightning.data.datasets import DATASETS
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, suggest
from cifar_lightning.models.registry import LIBRARIES, MODELS, check_model_kwargs, check_name
from cifar_lightning.optim.optimizers import OPTIMIZERS, check_optimizer
from cifar_lightning.runs.schema import CLASS_GROUPS, upgrade_config
from cifar_lightning.settings.limits import check_setting, limits_of, members
from cifar_lightning.settings.roles import NOT_WITH_OPTIMIZER, OF_OPTIMIZER, READ_BY
from cifar_lightning.settings.safe_yaml import checked
from cifar_lightning.training.early_stopping import AnnealingEarlyStopping
from cifar_lightning.training.last_checkpoint import CheckpointSchedule

TABLE = Path(__file__).with_name("flags.json")
# Flags that are not of the Trainer, the model or the data: type, default, help, commands that take it.
_OWN: dict[str, tuple[Any, Any, str, tuple[str, ...]]] = {
    "run_dir": (str | None, None, "Folder of the run; default: runs/NAME/N.", ("fit", "tune")),
    "init_weights": (
        str | None,
        None,
        "Start from these weights: a run, a checkpoint, a .safetensors export, a state_dict file or smallnet.",
        ("fit", "tune"),
    ),
    "tune_lr": (bool, False, "Find OneCycle's peak learning rate first (LR finder).", ("fit",)),
    "model_class": (
        str | None,
        None,
        "Subclass of ImageClassifier, package.module.Class, with arguments of its own as flags; short: --model CLASS.",
        (*TRAINING,),
    ),
    "data_class": (str | None, None, "Subclass of ImageDataModule; short: --data CLASS.", (*TRAINING,)),
    "output": (
        str | None,
        None,
        "File for the predictions, .csv or .npz, default RUN/predictions.npz; for the page of inspect, default "
        "inspect.html.",
        ("predict", "inspect"),
    ),
}
# In place of Lightning's.
_HELP = {
    "seed_everything": "Seed of weights and dropout; true draws one. --data.seed is that of split and augmentation.",
    "ckpt_path": "Checkpoint to evaluate, or whose training a new run of fit continues; --resume RUN resumes a run.",
}
# The signatures say str: a new data set or model is one more line in its table.
_NAMES = {"model.name": tuple(MODELS), "data.dataset": tuple(DATASETS), "model.optimizer": OPTIMIZERS}
# Of further names, a library's.
_PREFIXES = {"model.name": tuple(f"{library}/" for library in LIBRARIES), "model.optimizer": ("timm/",)}
# jsonargparse's own reader of YAML ends in a traceback for some values, and never for an alias inside what it names.
_MODE = "checked_yaml"
_read_checked = checked(get_loader("yaml"))
set_loader(_MODE, _read_checked, (yaml.YAMLError,))
set_parsing_settings(config_read_mode_fsspec_enabled=False)  # Lightning's: a value would be fetched from an address
# Limits of the flags whose annotations are Lightning's.
_LIMITS = LIMITS | {
    "seed_everything": Annotated[int, Field(ge=0, lt=2**32, description="0 to 4294967295, what NumPy takes")]
}
# Lines of jsonargparse's messages that are no reason, and those of a type that is not meant.
_OF_EVERY_MESSAGE = re.compile(
    "Parser key|Unable to load config|Does not validate against|Subtypes:|Errors:|Given value|Problem with given|"
    "Subclass types expect|a class path|a dict with"
)
_OF_ANOTHER_TYPE = re.compile(
    "Expected a (<class(?!.*Got value)|path|typing.Literal)|Not a valid subclass of|"
    "Import path .* not correspond to a subclass"
)
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.]+)")
# What may be given by class: libraries, and the prefix of their names where a class's name alone is not found.
_CLASSES = {
    **{
        f"trainer.{name}": {f"lightning.pytorch.{name.rstrip('s')}s": ""}
        for name in ("callbacks", "logger", "profiler")
    },
    "optimizer": {"torch.optim": ""},
    "lr_scheduler": {"torch.optim.lr_scheduler": ""},
    "data.transforms": {"cifar_lightning": "", "torchvision.transforms.v2": "torchvision.transforms.v2."},
}
_KINDS = {int: "int", float: "float", bool: "bool", str: "str", Path: "str", types.NoneType: "null"}


class RunParser(LightningArgumentParser):
    """LightningCLI's parser that raises a short `UserError` instead of printing usage, and takes no abbreviation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **{"parser_mode": _MODE, **kwargs})

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a whole config, upgraded to the current schema."""
        with contextlib.suppress(yaml.YAMLError):  # reported by jsonargparse
            read = _read_checked(content)
            upgraded = upgrade_config(read)
            content = content if upgraded == read else yaml.safe_dump(upgraded)
        parsed: Namespace = super().parse_string(content, *args, **kwargs)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message's first lines, or what the flag allows where a value is outside its limits."""
        if "Parser key" not in message and (unknown := _UNKNOWN.search(message)):  # by the parser that knows the others
            groups = [action.choices for action in self._actions if isinstance(action.choices, dict)]  # subcommands
            parsers = [self, *(parser for group in groups for parser in group.values())]
            names = {action.dest: action.dest for parser in parsers for action in parser._actions}
            names |= {typed: name for typed, name in SYNONYMS.items() if name in names}
            cause = f"--{unknown[1]}: no such flag" if message.startswith("unrecognized") else message.rstrip(".")
            raise UserError(f"{cause}.{suggest(unknown[1], names, cutoff=0.75)}") from ex
        for name in reversed(re.findall(r'Parser key "([^"]+)"', message)):
            if "bounds" in (row := table().get(name, {})):
                value = (re.findall(r"(?:Got|Given) value: (.*)", message) or [""])[-1]
                typed = f"--{name} {clipped(value)}"
                check_value(name, value, typed)
                raise UserError(f"{typed}: {row['allowed']}.") from ex
        raise UserError(_reason(message)) from ex


def _reason(message: str) -> str:
    """Return what is wrong with a flag's value, of a message that lists what every type of the flag says of it."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    lines = list(dict.fromkeys(line.strip(" -").rstrip(".") for line in message.splitlines()))
    lines = [line for line in lines if line and not _OF_EVERY_MESSAGE.match(line)]
    causes = [line for line in lines if not _OF_ANOTHER_TYPE.match(line)] or lines  # what the type that is meant says
    causes = [line for line in causes if not any(other != line and other.startswith(line) for other in causes)]
    text = clipped(re.sub("the following arguments are required", "required", "; ".join(causes)), 350).rstrip(".")
    text = re.sub(r"(?<=required: )(fit|validate|test|predict)\.", "--", text)
    if not keys:
        return f"{text}."
    flag = next((key for key in reversed(keys) if key in table()), keys[0])
    flag += f".{keys[-1]}" if keys[-1] not in flag else ""  # an argument of the class
    # The class that was given: alone, in a dict or parsed.
    names = re.findall(
        r"(?:Given value: |class_path'?[:=] ?'|given class_path ')([A-Za-z_][\w.]*)(?:'|$)", message, re.M
    )
    hint = "; quote it if it is text" if "Expected a <class 'str'>" in text else ""
    if "Expected a <class 'list'>" in text:
        hint = f"; give a list, or --{flag}+=VALUE to add one"
    if names and flag in _CLASSES:
        hint += _nearest_class(flag, names[-1])
    text += "" if hint.startswith(";") or text.endswith("?") else "."
    return f"--{flag}{f' {names[-1]}' if names else ''}: {text}{hint}"


def _nearest_class(flag: str, path: str) -> str:
    """Return " Did you mean CLASS?" where a flag takes a class of a similar name, or of this name in another module."""
    module, _, name = path.rpartition(".")
    known = {each: f"{module}.{each}" for each in dir(sys.modules.get(module))} if module in sys.modules else {}
    for library, prefix in reversed(_CLASSES[flag].items()):
        known |= {each: prefix + each for each in dir(importlib.import_module(library)) if each[:1].isupper()}
    if path.endswith(known.get(name, " ")):
        return ""
    short = f" By name: --model.optimizer {path}." if flag == "optimizer" and path in OPTIMIZERS else ""
    near = suggest(name.lower(), {each.lower(): of for each, of in known.items()}, cutoff=0.75)
    if flag == "optimizer" and not (near or short or module):
        return " Give a name of torch.optim, package.module.Class, or --model.optimizer timm/NAME."
    return near + short


def add_own_flags(parser: LightningArgumentParser) -> None:
    """Add the flags that are of the run and not of the Trainer; take from the data what the data knows."""
    for name, (kind, default, text, _) in _OWN.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_lightning_class_args(AnnealingEarlyStopping, "early_stopping")
    parser.add_class_arguments(CheckpointSchedule, "checkpoint")
    taken = {action.dest for action in parser._actions}  # a subclass may set them itself
    for name in ("num_classes", "image_size", "in_channels"):
        if f"model.{name}" in taken:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")


def describe_as_here(parser: LightningArgumentParser) -> None:
    """Have the help say what the Trainer's arguments do in a run, and which are refused, in place of Lightning's."""
    for action in parser._actions:
        argument = ARGUMENTS.get(action.dest.removeprefix("trainer."))
        if action.dest.startswith("trainer.") and argument is not None:
            text = argument.does or f"Refused: {'; '.join(argument.refused)}."
            action.help = text.replace("`", "")
        action.help = _HELP.get(action.dest, action.help)


def check_arguments(command: str, config: Namespace, defaults: Mapping[str, Any] | Namespace | None = None) -> None:
    """Refuse what would fail after the run folder is made, or silently do something else.

    `defaults` are those of the parser; by default those of the table, which a class of one's own may change.
    """
    _refuse_nothing(config)
    model_kwargs = config.get("model.model_kwargs") or {}
    check_model_kwargs(model_kwargs)
    if "in_channels" in model_kwargs:  # from Python there may be other images
        raise UserError(
            "--model.model_kwargs: in_channels cannot be set here; --data.in_channels 1 trains on gray images."
        )
    if config.get("model.name") is not None:
        check_name(config.model.name)  # before the data is downloaded: the model is built after it
    if config.get("model.optimizer") is not None:
        check_optimizer(config.model.optimizer)
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise UserError(f"--ckpt_path {config.ckpt_path}: no such file; give a checkpoint, RUN/checkpoints/last.ckpt.")
    check_setting("seed_everything", _LIMITS["seed_everything"], config.get("seed_everything"))
    check_trainer(command, config.trainer)
    if config.trainer.get("fast_dev_run"):
        _refuse_with_fast_dev_run(command, config)
    for name in ("every_n_train_steps", "every_n_minutes"):
        if config.trainer.get("enable_checkpointing") is False and config.get(f"checkpoint.{name}") is not None:
            raise UserError(f"--checkpoint.{name} with --trainer.enable_checkpointing false: leave one of them out.")
    if command == "fit":
        _refuse_what_is_not_read(config, defaults or {name: row["default"] for name, row in table().items()})


def _refuse_with_fast_dev_run(command: str, config: Namespace) -> None:
    flag = f"--trainer.fast_dev_run {config.trainer.fast_dev_run}"
    if command != "fit":
        split = "val" if command == "validate" else command
        raise UserError(f"{flag}: only with fit; --trainer.limit_{split}_batches limits {command}.")
    for other in ("ckpt_path", "tune_lr"):
        if config.get(other):
            raise UserError(f"{flag} trains new weights for a few batches; leave out {flag} or --{other}.")


def _refuse_what_is_not_read(config: Namespace, defaults: Mapping[str, Any] | Namespace) -> None:
    """Refuse flags that the chosen optimizer or model ignores, and conflicting flags; a subclass may lack any."""
    model, data = config.model, config.data
    _check_optimizer(config, defaults)
    if model.get("stem_train_fraction", 1) != 1 and model.get("name") != "speednet":
        raise UserError(
            f"--model.stem_train_fraction {model.stem_train_fraction}: {model.get('name')} has no stem for it."
        )
    epochs, unfreeze_epoch = config.trainer.max_epochs, model.get("unfreeze_epoch")
    if unfreeze_epoch and epochs not in (None, -1) and unfreeze_epoch >= epochs:
        raise UserError(f"--model.unfreeze_epoch {unfreeze_epoch}: the run ends with epoch {epochs}; leave it out.")
    for name in ("mixup", "cutmix"):
        if model.get(name) and data.get("batch_size") == 1:
            raise UserError(
                f"--model.{name} {model[name]} with --batch_size 1: the images of a batch are mixed; give 2 or more."
            )
    if config.tune_lr and config.ckpt_path:
        raise UserError("--tune_lr with --ckpt_path: the LR finder is for a new run; give --lr, or --init_weights.")
    if config.init_weights and model.get("pretrained", False) is not False:
        raise UserError("--init_weights with --model.pretrained: give one of them.")
    if data.get("class_weights") == data.get("sampler") == "balanced":
        raise UserError("--data.class_weights balanced with --data.sampler balanced: give one, or both would count.")


def _check_optimizer(config: Namespace, defaults: Mapping[str, Any] | Namespace) -> None:
    if config.get("lr_scheduler") and not config.optimizer:
        raise UserError("--lr_scheduler: needs --optimizer, such as --optimizer torch.optim.SGD --optimizer.lr 0.1.")
    if config.get("lr_scheduler.class_path") == "torch.optim.lr_scheduler.ReduceLROnPlateau":
        raise UserError(
            "--lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau: monitors nothing; give "
            "--lr_scheduler ReduceLROnPlateau --lr_scheduler.monitor val/loss."
        )
    optimizer = config.get("model.optimizer")
    read = READ_BY[optimizer.partition("/")[0]] if optimizer else ()
    unread = {*itertools.chain(*READ_BY.values())} - {*read} if optimizer else ()
    for name in sorted(OF_OPTIMIZER):
        value = config.get(name)
        if value == defaults.get(name):
            continue
        if config.get("optimizer"):
            raise UserError(f"--{name} {value} with --optimizer {config.optimizer.class_path}: {NOT_WITH_OPTIMIZER}")
        if name.removeprefix("model.") in unread:
            raise UserError(f"--{name} {value}: {optimizer} does not use it; leave it out.")


def refuse_early_stopping(config: Namespace) -> None:
    """Refuse settings of early stopping in a run that does not validate."""
    for name, value in config.early_stopping.items():
        if value != table()[f"early_stopping.{name}"]["default"]:
            raise UserError(f"--early_stopping.{name} {value}: this run does not validate; leave it out.")


def _refuse_nothing(config: Namespace) -> None:
    """Refuse None where it would not mean the default: jsonargparse takes it for any type, from configs and groups."""
    for group in GROUPS:
        if group in config and not isinstance(config[group], Namespace):
            raise UserError(f"--{group} {clipped(str(config[group]))}: settings or a file of them, or leave it out.")
    for name, row in table().items():
        if name in config and config[name] is None and not row.get("open") and "null" not in row["types"]:
            raise UserError(f"--{name}: needs a value, or leave it out.")


def as_list(given: Any) -> list[Any]:
    """Return what a flag that takes one or several was given."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def config_text(parser: LightningArgumentParser, config: Namespace) -> str:
    """Return all settings of a run as YAML, without its path, so that the config starts the same run again."""
    own = config.clone()
    # A class without arguments has a group that jsonargparse does not know.
    empty = (group for group in CLASS_GROUPS if group in own and not own[group].as_dict())
    for key in ("run_dir", "config", "ckpt_path", "output", *empty):
        own.pop(key, None)
    return str(parser.dump(own, skip_none=False))


def describe_flags(parser: LightningArgumentParser) -> dict[str, dict[str, Any]]:
    """Return what `flags.table` reads: flag -> {"types", "default", "help"}, and what only some flags have."""
    defaults, rows = parser.get_defaults(), dict[str, dict[str, Any]]()
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):  # groups, links, configs
            continue
        kinds, choices = _kinds(hint)
        limits = [limits_of(kind) for kind in (*members(hint), _LIMITS.get(action.dest))]
        default = defaults[action.dest]
        row: dict[str, Any] = {
            # In an order of our own: Python may give that of another, equal union.
            "types": [kind for kind in dict.fromkeys(_KINDS.values()) if kind in kinds],
            "default": default if isinstance(default, int | float | str | None) else str(default),
            "help": _first_paragraph(action.help or ""),
        }
        choices += _NAMES.get(action.dest, ())
        if choices:
            row["choices"] = choices
        for bounds, allowed in limits:
            if bounds:
                row |= {"bounds": bounds, "allowed": allowed}
        if action.dest in _PREFIXES:
            row["prefixes"] = list(_PREFIXES[action.dest])
        if "open" in kinds:
            row["open"] = True
        if action.dest in _OWN:
            row["commands"] = list(_OWN[action.dest][3])
        rows[action.dest] = row
    return rows


def table_text(parser: LightningArgumentParser) -> str:
    """Return the content of `flags.json`."""
    rows = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in describe_flags(parser).items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _kinds(hint: Any) -> tuple[list[str], list[str]]:
    """Return the kinds of values that a type takes, "open" for what the table cannot check, and its literals."""
    if typing.get_origin(hint) is Annotated:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return [], [str(value) for value in typing.get_args(hint)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds, choices = list[str](), list[str]()
        for part in typing.get_args(hint):
            more_kinds, more_choices = _kinds(part)
            kinds += [kind for kind in more_kinds if kind not in kinds]
            choices += [choice for choice in more_choices if choice not in choices]
        return kinds, choices
    # `str | Any` is a name, or an object from Python, which the command line cannot have.
    return ([] if hint is Any else [_KINDS.get(hint, "open")]), []


def _first_paragraph(text: str) -> str:
    paragraph = inspect.cleandoc(text).split("\n\n")[0]
    paragraph = re.sub(r"\s*Default: .*", "", paragraph, flags=re.DOTALL)
    return " ".join(re.sub(r":\w+:`~?([^`]*)`|``?([^`]*)``?", r"\1\2", paragraph).split())
