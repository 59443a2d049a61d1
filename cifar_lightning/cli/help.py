"""What `--help` shows, and tab completion: the commands, and of each the flags that people use; without torch."""

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cifar_lightning.cli.configs import config_names
from cifar_lightning.cli.flags import ALIASES, FRONT_ONLY, table
from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, program, suggest

# Words for flags whose own help is Lightning's, or which are no key of a config.
_WORDS = {
    "config": ("FILE", "config in YAML, or the name of a shipped one; flags override it"),
    "resume": ("RUN", "resume a run in its folder, with its own config; flags override it"),
    "seeds": ("N,N,...", "one run per seed, in DIR/N: other weights and order, the same split; then mean and spread"),
    "epochs": ("N", "how often training sees every image"),
    "batch_size": ("N", "training images per step and process"),
    "lr": ("X", "peak learning rate"),
    "seed_everything": ("N", "seed of weights and dropout; --data.seed is that of split, order and augmentation"),
    "trainer.precision": ("P", "16-mixed, bf16-mixed or 32-true; by default by device: doctor says which, and why"),
    "trainer.devices": ("N", "number of processes; by default all GPUs, or one process on the CPU"),
    "ckpt_path": ("FILE", "a checkpoint, instead of a run folder; in a run it brings the run's config"),
}
_OF_FIT: tuple[str, ...] = ("config", "epochs", "batch_size", "lr", "data.dataset", "data.root", "data.val_fraction")
_OF_FIT += ("data.limit", "model.name", "model.pretrained", "model.optimizer")
_OF_FIT += ("seed_everything", "trainer.precision", "trainer.devices")
_OF_DATA = tuple(f"data.{name}" for name in ("dataset", "root", "labels", "val_fraction", "test_fraction", "limit"))
_OF_DATA += ("data.image_size", "data.resize", "data.in_channels")


@dataclass(frozen=True)
class Command:
    """A command that goes to LightningCLI; `flags` are those of its short help."""

    usage: str
    summary: str
    flags: tuple[str, ...]
    example: str


TRAINING = {
    "fit": Command(
        "[--config FILE] [flags]",
        "train a model, test it once, write a run folder",
        (*_OF_FIT, "run_dir", "resume", "seeds", "init_weights"),
        "fit --config smallnet_cpu --seeds 0,1,2",
    ),
    "validate": Command(
        "RUN [flags]",
        "metrics of a run on its validation images",
        ("ckpt_path", "config", "data.root", "data.eval_batch_size"),
        "validate runs/smallnet/1",
    ),
    "test": Command(
        "RUN [flags]",
        "metrics of a run on the test images; rewrites its results",
        ("ckpt_path", "config", "data.root", "data.eval_batch_size"),
        "test runs/smallnet/1",
    ),
    "predict": Command(
        "RUN [flags]",
        "logits and probabilities of the test images",
        ("output", "ckpt_path", "config", "data.root", "data.eval_batch_size"),
        "predict runs/smallnet/1",
    ),
    "tune": Command(
        "[--config FILE] [flags of fit]",
        "find OneCycle's peak learning rate (LR finder)",
        (*(flag for flag in _OF_FIT if flag not in ("epochs", "lr")), "run_dir"),
        "tune --config smallnet",
    ),
    "inspect": Command(
        "[--config FILE] [--data flags of fit]",
        "what is in a data set: counts, duplicates, unreadable files",
        (*_OF_DATA, "config", "output"),
        "inspect --data.root photos",
    ),
}


class QuickParser(argparse.ArgumentParser):
    """argparse with errors as `UserError`, without abbreviations, with a guess for a misspelt flag."""

    def __init__(self, command: str, usage: str, summary: str) -> None:
        super().__init__(
            prog=f"{program()} {command}",
            usage=f"{program()} {command} {usage}",
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
            add_help=False,
            formatter_class=_formatter,
        )
        self.command = command
        self._optionals.title = "flags"

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise UserError(f"{self.command}: {clipped(message, 300)}.\n{self.usage}")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; a `UserError` names an unknown flag and the nearest one."""
        known = [option for action in self._actions for option in action.option_strings]
        for argument in arguments:  # before argparse, which complains of what is missing first
            if argument == "--":  # what follows is no flag
                break
            flag, equals, value = argument.partition("=")
            if not argument or (flag.startswith("--") and equals and not value):  # such as "$UNSET", which is no path
                raise UserError(f"{self.command} {argument or repr('')}: an empty value; give one, or leave it out.")
            if not flag.startswith("--") or flag in known:
                continue
            near = suggest(flag.replace("-", "_"), {name.replace("-", "_"): name for name in known})
            hint = near or f" It takes {', '.join(known)}."
            raise UserError(f"{clipped(flag)}: no such flag of {self.command}.{hint}")
        return self.parse_args(list(arguments))


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 100)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=width)


def overview(quick: dict[str, str]) -> str:
    """Return what `--help` shows; `quick` are the other commands and a line for each."""
    rows = {name: command.summary for name, command in TRAINING.items()} | quick
    lines = [f"usage: {program()} COMMAND [flags]", "", "Train image classifiers and see what they learned.", ""]
    lines += [f"  {name:<15} {summary}" for name, summary in rows.items()]
    lines += ["", f"{program()} COMMAND --help shows the flags of a command; --version the version."]
    lines += [f"First try: {program()} fit --config quickstart"]
    return "\n".join(lines)


def training_help(name: str) -> str:
    """Return what `COMMAND --help` shows of a command that goes to LightningCLI: a dozen flags and an example."""
    command = TRAINING[name]
    parser = QuickParser(name, command.usage, command.summary)
    for flag in command.flags:
        row = table().get(ALIASES.get(flag, flag), {})
        metavar, text = _WORDS.get(flag, ("", ""))
        shown = "" if row.get("default") == "auto" else _default(row)
        text = text or first_sentence(str(row["help"]))
        if row.get("prefixes"):  # too many names for a metavar
            text = ", ".join([*row["choices"], *(f"{prefix}NAME" for prefix in row["prefixes"])])
        parser.add_argument(f"--{flag}", metavar=metavar or _metavar(row), help=f"{text}{shown}".replace("%", "%%"))
    names = textwrap.fill(f"Shipped configs: {', '.join(config_names())}", 80) if "--config" in command.usage else ""
    example = f"For example: {program()} {command.example}\nEvery flag: {program()} {name} --help-all"
    parser.epilog = f"{names}\n{example}".lstrip()
    return parser.format_help().rstrip()


def group_help(group: str, rows: Mapping[str, dict[str, Any]]) -> str:
    """Return what `--model.help` shows: the flags of a group, of the table or of a class of one's own."""
    parser = QuickParser(f"fit --{group}.help", "", f"flags of --{group}")
    for flag, row in rows.items():
        if flag.startswith(f"{group}."):
            text = f"{row['help']}{_default(row)}".replace("%", "%%")
            parser.add_argument(f"--{flag}", metavar=_metavar(row), help=text)
    return parser.format_help().partition("\n\n")[2].rstrip()


def first_sentence(text: str) -> str:
    """Return the first sentence of a flag's help, as argparse has it: without capital and full stop."""
    sentence = text.split(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence


def _default(row: Mapping[str, Any]) -> str:
    default = row.get("default")
    shown = str(default).lower() if isinstance(default, bool) else default
    return "" if default is None else f" (default: {shown})"


def _metavar(row: dict[str, list[str]]) -> str:
    if row.get("choices") and "prefixes" not in row:
        return "|".join(row["choices"])
    return {"int": "N", "float": "X", "bool": ""}.get((row["types"] or [""])[0], "VALUE")


def completion(shell: str, quick: dict[str, list[str]]) -> str:
    """Return a script that completes commands and flags of `cifar-lightning`, for bash or zsh."""
    of_training = [f"--{name}" for name in (*ALIASES, *FRONT_ONLY, *table())]
    flags = {name: [*of_training, "--help", "--help-all"] for name in TRAINING} | quick
    cases = "\n".join(f"    {name}) words='{' '.join(words)}' ;;" for name, words in flags.items())
    bash = f"""_cifar_lightning() {{
  local words='{" ".join(flags)} --help --version'
  [ "$COMP_CWORD" -gt 1 ] && case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _cifar_lightning cifar-lightning"""
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash}" if shell == "zsh" else bash
