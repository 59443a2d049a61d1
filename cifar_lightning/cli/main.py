"""The command line.

Help, quick commands and usage errors are handled without torch; training commands are passed to LightningCLI.
"""

import argparse
import io
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from cifar_lightning.cli.configs import find_config
from cifar_lightning.cli.flags import (
    GROUPS,
    NULL,
    check_config,
    check_value,
    config_tree,
    flag_value,
    is_flag,
    normalize_arguments,
    own_classes,
    table,
)
from cifar_lightning.cli.help import (
    TRAINING,
    QuickParser,
    completion,
    first_sentence,
    group_help,
    overview,
    training_help,
)
from cifar_lightning.errors import RunError, UserError
from cifar_lightning.files import FULL, expand_home
from cifar_lightning.formatting import clipped, command_line, printable, suggest
from cifar_lightning.runs.environment import package_version
from cifar_lightning.runs.folder import RUNS, RunFolder, open_model, open_run, run_of
from cifar_lightning.runs.schema import CLASS_GROUPS
from cifar_lightning.settings.roles import NOT_WITH_OPTIMIZER, OF_OPTIMIZER
from cifar_lightning.settings.safe_yaml import read_yaml

_OF_SHARDS = ("image_size", "resize", "in_channels", "labels", "skip_unreadable")  # settings of the data
# What `--resume` takes from the run, or what would start a new one.
_NOT_WITH_RESUME = ("config", "ckpt_path", "run_dir", "init_weights", "tune_lr")


def main() -> None:
    """Run the command of `sys.argv` and exit: 0, 1 for a run that failed, 2 for a user error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: a name that is not UTF-8 must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "80").strip("0"):  # a width that is not known: Rich would print in no columns
        del os.environ["COLUMNS"]
    _escape_warnings()
    status: int | str | None = 1
    try:
        try:
            status = run_command(sys.argv[1:])
        except SystemExit as ended:  # of a parser's --help
            status = ended.code
        if sys.stdout is not None:  # as where it is closed
            sys.stdout.flush()
    except (UserError, RunError) as error:
        # Three lines at most: what is wrong and what to do, not how the program found out.
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        print("error: " + "\n".join(clipped(line, 500) for line in lines[:3]), file=sys.stderr)
        status = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `| head` has read enough
        status = 1
    except OSError as error:
        if error.filename is None and error.errno not in FULL:  # not about a file of the user's: a mistake of ours
            raise
        where = "" if error.filename is None else f"{clipped(str(error.filename), 300)}: "  # of stdout there is none
        print(f"error: {where or 'cannot write: '}{error.strerror}.", file=sys.stderr)
        status = 2 if where else 1
    finally:
        _drop_unwritten()
    sys.exit(status)


def _drop_unwritten() -> None:
    """Write the rest of stdout, or nowhere what cannot be written: Python would try again at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"warning: {clipped(record.getMessage(), 500)}"


def _escape_warnings() -> None:
    """Print warnings of libraries, which quote names of files and their content, on one line that prints."""

    def show(message: Warning | str, *_: object) -> None:
        print(f"warning: {clipped(str(message), 500)}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]  # it takes any number of arguments
    if logging.lastResort is not None:  # of loggers without a handler, such as Pillow's
        logging.lastResort.setFormatter(_OneLine())


def run_command(argv: Sequence[str]) -> int:
    """Run one command line without its program's name; return the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview({name: command.summary for name, command in QUICK.items()}))
        return 0 if argv else 2
    command, arguments = argv[0], [_with_home(argument) for argument in argv[1:]]
    if command == "--version":
        print(f"cifar-lightning {package_version() or '(not installed)'}")
        return 0
    if command == "--print_completion":
        print(_completion_script(arguments))
        return 0
    _check_working_directory()
    if command in QUICK:
        return _run_quick(command, arguments)
    if command not in TRAINING:
        names = (*TRAINING, *QUICK)
        raise UserError(f"{command}: no such command; one of {', '.join(names)}.{suggest(command, names)}")
    if {"-h", "--help"} & set(arguments):
        print(training_help(command))
        return 0
    if shown := _group_help(arguments):
        print(shown)
        return 0
    return _run_training(command, arguments)


def _with_home(argument: str) -> str:
    """Expand `~` where the shell leaves it: in `--flag=~/path` and in quotes. YAML's is expanded where it is read."""
    name, equals, value = argument.partition("=") if is_flag(argument) else ("", "", argument)
    return f"{name}{equals}{expand_home(value)}"


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:  # which names no file
        raise UserError(
            f"the working directory cannot be found ({error.strerror}); it was removed, or replaced by another one of "
            'its name.\nChange into a folder that exists; into the one of the same name: cd "$PWD"'
        ) from error


def _completion_script(arguments: Sequence[str]) -> str:
    if arguments not in (["bash"], ["zsh"]):
        raise UserError(f"--print_completion {' '.join(arguments)}: bash or zsh.")
    flags = {
        name: [option for action in command.parser(name)._actions for option in action.option_strings]
        for name, command in QUICK.items()
    }
    return completion(arguments[0], flags)


# -- commands that go to LightningCLI --------------------------------------------------------------------------------


def _group_help(arguments: Sequence[str]) -> str:
    """Return the flags that `--model.help`, or `--data.help CLASS`, asks for; empty where none does."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        name, _, path = argument.removeprefix("--").partition("=")
        group = name.removesuffix(".help")
        if group != name and group in GROUPS:
            path = path or ("" if is_flag(following) else following)
            if not path or group not in CLASS_GROUPS:
                return group_help(group, table())
            from cifar_lightning.cli.lightning_cli import class_rows  # imports torch

            return group_help(group, class_rows(group, path))
    return ""


def _run_training(command: str, arguments: Sequence[str]) -> int:
    if "--help-all" in arguments:
        rest, run = ["--help"], None
    elif command == "fit" and _is_of_seeds(flags := normalize_arguments(command, arguments)):
        from cifar_lightning.cli.seeds import fit_seeds  # imports pydantic and NumPy

        return fit_seeds(flags)
    else:
        rest, run = training_arguments(command, arguments)
    # These import torch and Lightning, which takes seconds.
    from cifar_lightning.cli.evaluate import evaluate
    from cifar_lightning.cli.fit import fit
    from cifar_lightning.cli.inspect import inspect
    from cifar_lightning.cli.lightning_cli import training_process
    from cifar_lightning.cli.tune import tune

    with training_process(command) as signals:
        if command == "fit":
            fit(rest, signals, run)
        elif command == "tune":
            tune(rest)
        elif command == "inspect":
            inspect(rest)
        else:
            evaluate(command, rest)
    return 0


def _is_of_seeds(flags: Sequence[str]) -> bool:
    resumed = flag_value(flags, "resume")
    return flag_value(flags, "seeds") is not None or bool(resumed and RunFolder(Path(resumed)).seeds.is_file())


def training_arguments(
    command: str, arguments: Sequence[str], given: Collection[str] = ()
) -> tuple[list[str], RunFolder | None]:
    """Check the arguments and expand aliases and run folders into the flags of LightningCLI.

    Args:
        command: One of `TRAINING`.
        arguments: As typed.
        given: Settings in whose place an object is given, from Python.

    Returns:
        The flags as `--long.name=value`, and the run that `fit --resume` resumes.
    """
    run = None
    if TRAINING[command].usage.startswith("RUN") and arguments and not arguments[0].startswith("-"):
        if not arguments[0]:  # such as "$UNSET", which is no path
            raise UserError(f"{command} '': an empty value; give a run folder.")
        run, arguments = open_run(Path(arguments[0])), arguments[1:]
    flags = normalize_arguments(command, arguments, None if run is None else run.config)
    trust_code = _is_trusting(flag_value(flags, "trust_code"))
    flags = [flag for flag in flags if not flag.startswith("--trust_code=")]
    names = [flag[2:].partition("=")[0] for flag in flags]
    if "seeds" in names:
        raise UserError(
            "--seeds: of the command fit alone; another fit for each seed is --seed_everything and --data.order_seed."
        )
    resumed = flag_value(flags, "resume")
    if run is not None:
        _refuse_together(
            names, ("config", "ckpt_path"), f"{command} {run.path}", "a run has its own config and checkpoint"
        )
        return _of_run(run, run.tested_checkpoint, flags, trust_code, given), None
    if resumed is not None:
        if command != "fit":
            raise UserError(f"--resume: only fit resumes a run; for its metrics: {command_line(command, resumed)}")
        run = open_run(Path(resumed))
        _check_resumed(names, flags, resumed)
        flags = [flag for flag in flags if not flag.startswith("--resume=")]
        return _of_run(run, run.resumed_checkpoint, flags, trust_code, given), run
    if command in ("validate", "test", "predict") and "print_config" not in names:
        checkpoint = flag_value(flags, "ckpt_path") or ""
        if checkpoint.lower() in NULL:
            raise UserError(f"{command} needs a trained model: give a run folder, or --ckpt_path FILE.")
        own = run_of(Path(checkpoint))
        if "config" not in names and own is not None and own.config.is_file():
            flags = [f"--config={own.config}", *flags]  # the data and the model of the checkpoint
    for at, flag in enumerate(flags):
        if flag.startswith("--config="):
            config = find_config(flag.removeprefix("--config="))
            check_config(config, trust_code=trust_code, given=given, own=own_classes(flags))
            flags[at] = f"--config={config}"
    _refuse_other_optimizers(flags, names)
    return flags, None


def _check_resumed(names: Sequence[str], flags: Sequence[str], resumed: str) -> None:
    _refuse_together(names, _NOT_WITH_RESUME, f"--resume {resumed}", "a run resumes in its folder with its config")
    if flag_value(flags, "seed_everything") == "true":  # Lightning would draw another seed
        raise UserError("--seed_everything true: a resumed run has the random states of its checkpoint; leave it out.")


def _refuse_other_optimizers(flags: list[str], names: Sequence[str]) -> None:
    configs = [config_tree(Path(flag.removeprefix("--config="))) for flag in flags if flag.startswith("--config=")]
    given = [tree["tune_lr"] for tree in configs if "tune_lr" in tree]
    given += [read_yaml(flag.partition("=")[2]) for flag in flags if flag.startswith("--tune_lr=")]
    tunes = bool(given) and given[-1] is True
    if "model.lr" in names and tunes:
        raise UserError("--tune_lr finds the learning rate that --lr gives; leave one of them out.")
    optimizer = flag_value(flags, "optimizer") or ""
    of_none = [name for name in names if name.startswith("optimizer.")]
    if of_none and not optimizer and "config" not in names:
        raise UserError(f"--{of_none[0]}: of which optimizer? Give --optimizer CLASS, such as SGD, or --lr.")
    for name in names if optimizer else ():
        if name in OF_OPTIMIZER or (name == "tune_lr" and tunes):
            raise UserError(f"--{name} with --optimizer {clipped(optimizer)}: {NOT_WITH_OPTIMIZER}")


def _is_trusting(value: str | None) -> bool:
    if value not in (None, "true", "false"):
        raise UserError(f"--trust_code {clipped(value)}: true or false.")
    return value == "true"


def _of_run(run: RunFolder, checkpoint: Path, flags: list[str], trust_code: bool, given: Collection[str]) -> list[str]:
    if not checkpoint.exists():
        raise UserError(f"{run.path}: no checkpoint found; nothing to resume or evaluate.\n{run.what_to_do}")
    from cifar_lightning.runs.contents import read_config  # imports pydantic and NumPy

    read_config(run.config)
    check_config(run.config, trust_code=trust_code, given=given, own=own_classes(flags))
    return [f"--config={run.config}", *flags, f"--ckpt_path={checkpoint}"]


def _refuse_together(names: Sequence[str], refused: Sequence[str], what: str, why: str) -> None:
    for name in names:
        if name in refused:
            raise UserError(f"--{name} with {what}: {why}; leave one of them out.")


# -- quick commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuickCommand:
    """A command with a parser of its own that needs no Lightning; `run` returns the exit status."""

    usage: str
    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def parser(self, name: str) -> QuickParser:
        """Return its parser."""
        parser = QuickParser(name, self.usage, self.summary)
        self.add_flags(parser)
        return parser


def _run_quick(name: str, arguments: Sequence[str]) -> int:
    parser = QUICK[name].parser(name)
    if {"-h", "--help", "--help-all"} & set(arguments):
        print(parser.format_help().rstrip())
        return 0
    return QUICK[name].run(parser.parse(arguments))


def _predict_images_flags(parser: argparse.ArgumentParser) -> None:
    text = "folder of a run, nothing else is needed; or smallnet, trained on CIFAR-10, which comes with the package"
    parser.add_argument("run", metavar="RUN", type=Path, help=text)
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="images, or folders of them")
    text = "a .csv, or a .jsonl or .json for JSON lines; - for these on stdout (default: predictions.csv)"
    parser.add_argument("--output", metavar="FILE", default="predictions.csv", help=text)
    parser.add_argument(
        "--top_k", metavar="N", type=int, help="most probable classes per image (default: 3, or all of fewer)"
    )
    parser.add_argument("--batch_size", metavar="N", type=int, help="images at a time (default: 256 on a GPU, else 64)")
    text = "auto: bfloat16 for many images on a CPU that is faster in it; float32 for close classes (default: auto)"
    parser.add_argument("--precision", choices=("auto", "32-true"), default="auto", help=text)
    _calibrated_flag(parser)
    _trust_flag(parser)
    parser.add_argument("--force", action="store_true", help="overwrite the output")


def _calibrated_flag(parser: argparse.ArgumentParser) -> None:
    text = "divide the logits by the temperature that was fitted on the validation images"
    parser.add_argument("--calibrated", action="store_true", help=text)


def _trust_flag(parser: argparse.ArgumentParser) -> None:
    text = "true: import a model of one's own that the run names (default: false)"
    parser.add_argument("--trust_code", choices=("true", "false"), default="false", help=text)


def _predict_images(parsed: argparse.Namespace) -> int:
    run = open_model(parsed.run)
    run.require(run.weights)
    from cifar_lightning.inference.predict_images import predict_images  # imports torch

    output = None if parsed.output == "-" else Path(parsed.output)
    num_unreadable = predict_images(
        run,
        parsed.paths,
        output=output,
        top_k=parsed.top_k,
        batch_size=parsed.batch_size,
        calibrated=parsed.calibrated,
        in_float32=parsed.precision == "32-true",
        force=parsed.force,
        trust_code=parsed.trust_code == "true",
    )
    return 1 if num_unreadable else 0


def _analyze_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run; it may have been copied from elsewhere")
    text = "other runs, tested on the same images, or a folder of seeds: which is better, and is it chance?"
    parser.add_argument("--compare", metavar="RUN", type=Path, nargs="+", action="extend", default=[], help=text)


def _analyze(parsed: argparse.Namespace) -> int:
    named = [parsed.run, *parsed.compare]
    tested, left_out = list[RunFolder](), list[Path]()
    for path in named:
        runs = _runs_of(path)
        of_path = [run for run in runs if run.path in named or run.predictions.is_file()]
        if not of_path:
            raise UserError(f"{path}: none of its runs is tested yet; {RunFolder(path).resume_command}")
        tested += of_path
        left_out += [run.path for run in runs if run not in of_path]
    first, *others = {run.path.resolve(): run for run in tested}.values()
    if parsed.compare and not others:
        raise UserError(f"--compare {parsed.compare[0]}: is the run itself; name another one.")
    if len(others) > 1 or (others and first.path != parsed.run):
        from cifar_lightning.report.several_runs import compare_runs  # imports NumPy and matplotlib

        compare_runs([first, *others], left_out, RunFolder(parsed.run))
    else:
        from cifar_lightning.report.report import make_report  # likewise

        for path in left_out:
            print(printable(f"{path}: not tested yet, left out."))
        make_report(first, others[0] if others else None)
    return 0


def _runs_of(path: Path) -> list[RunFolder]:
    """Return a run, or the runs of a folder of several seeds."""
    if not RunFolder(path).seeds.is_file():
        return [open_run(path, results=True)]
    from cifar_lightning.runs.contents import read_seeds  # imports pydantic and NumPy

    folders = [path / str(seed) for seed in read_seeds(RunFolder(path).seeds)["seeds"]]
    return [open_run(folder, results=True) if folder.exists() else RunFolder(folder) for folder in folders]


def _runs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=RUNS, help="default: runs")
    parser.add_argument("--json", action="store_true", help="as JSON, with more fields")


def _runs(parsed: argparse.Namespace) -> int:
    from cifar_lightning.runs.states import states_below, states_table  # imports pydantic and NumPy

    states = states_below(parsed.folder)
    if parsed.json:
        print(json.dumps(states, indent=2))
    else:
        print(states_table(states) if states else f"{parsed.folder}: no runs; fit makes them.")
    return 0


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or smallnet")
    parser.add_argument("--format", required=True, choices=("onnx", "torch", "safetensors"), help="kind of file")
    text = "default: RUN/model.onnx, .pt2 or .safetensors; for smallnet, here"
    parser.add_argument("--output", metavar="FILE", type=Path, help=text)
    text = "images as uint8, 0-255, or float32, 0-1 (default: uint8)"
    parser.add_argument("--input", choices=("uint8", "float"), default="uint8", help=text)
    parser.add_argument("--probs", action="store_true", help="also give probabilities")
    _calibrated_flag(parser)
    parser.add_argument("--half", action="store_true", help="safetensors: weights in float16, half the size")
    _trust_flag(parser)
    parser.add_argument("--force", action="store_true", help="overwrite the output")


def _export(parsed: argparse.Namespace) -> int:
    run = open_model(parsed.run)
    run.require(run.weights)
    from cifar_lightning.inference.export import export_run  # imports torch

    export_run(
        run,
        parsed.format,
        output=parsed.output,
        input=parsed.input,
        probs=parsed.probs,
        calibrated=parsed.calibrated,
        half=parsed.half,
        force=parsed.force,
        trust_code=parsed.trust_code == "true",
    )
    return 0


def _download_flags(parser: argparse.ArgumentParser) -> None:
    choices = ("cifar10", "cifar100")
    parser.add_argument("--dataset", choices=choices, default="cifar10", help="data set (default: cifar10)")
    _root_flag(parser)


def _root_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("data"), help="its folder (default: data)")


def _download(parsed: argparse.Namespace) -> int:
    from cifar_lightning.data.download import download

    print(f"{parsed.dataset}: in {download(parsed.dataset, parsed.root)}")
    return 0


def _shard_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder for the shards")
    for name in ("root", *_OF_SHARDS):
        text = "folder of the images" if name == "root" else first_sentence(table()[f"data.{name}"]["help"])
        parser.add_argument(f"--data.{name}", metavar="VALUE", required=name == "root", help=text)


def _shard(parsed: argparse.Namespace) -> int:
    values = {name: vars(parsed)[f"data.{name}"] for name in _OF_SHARDS}
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        check_value(f"data.{name}", value, f"--data.{name} {clipped(value)}")
    from cifar_lightning.data.image_folder import ClassFolders
    from cifar_lightning.data.shard_writer import write_shards  # imports torch

    labels = given.pop("labels", None)
    settings = {name: _read_value(value) for name, value in ({"image_size": "null"} | given).items()}
    folders = ClassFolders(vars(parsed)["data.root"], labels=labels, **settings)
    print("\n".join(map(printable, write_shards(folders, parsed.output))))
    print(f"Train with: {command_line('fit', '--data.dataset', 'shards', '--data.root', parsed.output)}")
    return 0


def _read_value(value: str) -> Any:
    try:
        return read_yaml(value)
    except YAMLError:  # `check_value` has passed it
        return int(value)  # 064 is 64, as for fit


def _doctor(parsed: argparse.Namespace) -> int:
    from cifar_lightning.cli.doctor import examine

    return 1 if examine(parsed.root, batch_size=table()["data.batch_size"]["default"]) else 0


QUICK = {
    "predict-images": QuickCommand(
        "RUN PATH... [flags]", "classes of image files and folders", _predict_images_flags, _predict_images
    ),
    "analyze": QuickCommand(
        "RUN [--compare RUN...]", "what a run's test found: terminal, report.html", _analyze_flags, _analyze
    ),
    "runs": QuickCommand("[DIR] [--json]", "list all runs and their state", _runs_flags, _runs),
    "export": QuickCommand(
        "RUN --format onnx|torch|safetensors [flags]", "export a run's model", _export_flags, _export
    ),
    "shard": QuickCommand(
        "--data.root DIR --output DIR [flags]", "write class folders as shards, for large sets", _shard_flags, _shard
    ),
    "download": QuickCommand("[flags]", "get CIFAR-10 or CIFAR-100", _download_flags, _download),
    "doctor": QuickCommand(
        "[--root DIR]", "what is installed, what the device can do, what fit would choose", _root_flag, _doctor
    ),
}
