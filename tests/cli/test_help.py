"""Help is short, true to the table of flags, and completes words in real shells."""

import argparse
import re
import shutil
import subprocess

import pytest

from cifar_lightning.cli.flags import ALIASES, table
from cifar_lightning.cli.help import TRAINING, QuickParser, completion, training_help
from cifar_lightning.cli.main import QUICK, run_command
from cifar_lightning.errors import UserError


@pytest.mark.parametrize("name", TRAINING)
def test_the_short_help_of_a_command_fits_a_screen_or_so_and_shows_only_flags_that_exist(name):
    text = training_help(name)
    flags = re.findall(r"^  --([\w.]+)", text, re.MULTILINE)
    assert 4 <= len(flags) <= 18
    assert len(text.splitlines()) <= 60
    known = {*table(), *ALIASES, "config", "resume", "seeds"}
    assert set(flags) <= known
    assert f"{name} --help-all" in text


def test_defaults_are_those_of_the_table():
    text = " ".join(training_help("fit").split())
    for flag in ("epochs", "batch_size", "lr", "data.dataset", "data.val_fraction", "model.name"):
        default = table()[ALIASES.get(flag, flag)]["default"]
        assert re.search(rf"--{flag} .*?\(default: (.*?)\)", text)[1] == str(default)


def test_the_overview_names_every_command(capsys):
    assert run_command(["--help"]) == 0
    assert re.findall(r"^  (\S+) ", capsys.readouterr().out, re.MULTILINE) == [*TRAINING, *QUICK]


def test_a_quick_parser_guesses_and_takes_no_abbreviation():
    parser = QuickParser("export", "RUN [flags]", "write a file")
    parser.add_argument("run")
    parser.add_argument("--top_k", type=int)
    assert parser.parse(["here", "--top_k", "3"]) == argparse.Namespace(run="here", top_k=3)
    for arguments, message in (
        (["here", "--top-k", "3"], "--top-k: no such flag of export. Did you mean --top_k?"),
        (["here", "--top", "3"], "--top: no such flag"),
        (["here", "--top_k", "x"], "export: argument --top_k: invalid int value: 'x'."),
        ([], "the following arguments are required: run."),
    ):
        with pytest.raises(UserError) as error:
            parser.parse(arguments)
        assert message in str(error.value)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_and_flags_are_completed(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = completion(shell, {"export": ["--format", "--force"]})

    def printed(command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def complete(*words):
        """Return the words that the shell offers for the last one."""
        if shell == "bash":
            call = f"COMP_WORDS=(cifar-lightning {' '.join(words)}); COMP_CWORD={len(words)}; _cifar_lightning"
            return printed(["bash", "-c", f'{script}\n{call}; echo "${{COMPREPLY[@]}}"'])
        call = f"words=(cifar-lightning {' '.join(words)}); CURRENT={len(words) + 1}; $=_comps[cifar-lightning]"
        start = f'autoload -U compinit && compinit -u -D\n{script}\ncompadd() {{ print -rl -- "$@" }}'
        given = printed(["zsh", "-f", "-c", f"{start}\n{call}"])
        return [word for word in given if word.startswith(words[-1])]  # as `compadd` in zsh's line editor chooses

    assert complete("ex") == ["export"]
    assert complete("export", "--fo") == ["--format", "--force"]
    assert complete("fit", "--ep") == ["--epochs"]
    assert complete("fit", "--data.val") == ["--data.val_fraction"]
