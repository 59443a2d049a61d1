"""inspect: what is in a data set, before training on it."""

from collections.abc import Sequence
from pathlib import Path

from cifar_lightning.cli.flags import GROUPS
from cifar_lightning.cli.lightning_cli import TrainingCLI
from cifar_lightning.data.download import ARCHIVES
from cifar_lightning.data.image_folder import holds_class_folders
from cifar_lightning.data.inspection import inspect_source
from cifar_lightning.errors import UserError
from cifar_lightning.files import check_output, write_text_durably
from cifar_lightning.formatting import printable
from cifar_lightning.report.inspection import inspection_lines, render_inspection
from cifar_lightning.runs.folder import refuse_file_of_run
from cifar_lightning.settings.roles import OWN_OPTIMIZER

_NOT_DATA = {*GROUPS, *OWN_OPTIMIZER, "seed_everything", "ckpt_path"} - {"data"}


def inspect(arguments: Sequence[str]) -> None:
    """Print what is in a data set, and write a page with samples of each class; folders need no --data.dataset."""
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    for name in flags:
        if name.partition(".")[0].removesuffix("_class") in _NOT_DATA:
            raise UserError(f"--{name}: inspect reads the data alone; leave it out.")
    root = Path(flags.get("data.root", "data"))
    is_named = {"config", "data", "data_class", "data.dataset"} & flags.keys()
    is_cifar10 = any((root / name).exists() for name in (ARCHIVES["cifar10"].folder, ARCHIVES["cifar10"].filename))
    if not is_named and not is_cifar10 and ({"data.labels", "data.root"} & flags.keys() or holds_class_folders(root)):
        arguments = [*arguments, "--data.dataset=folder"]
    cli = TrainingCLI("fit", arguments)
    output = Path(cli.settings.output or "inspect.html")
    if output.suffix.lower() != ".html":
        raise UserError(f"--output {output}: give an .html file.")
    check_output(output, force=True)
    refuse_file_of_run(output)
    if "pretrained" in cli.settings.model:  # a subclass may lack it
        cli.settings.model.pretrained = False  # the model is made, but not used
    _, data, _ = cli.instantiate()
    found = inspect_source(data.source, data.split_settings, in_channels=data.in_channels)
    write_text_durably(output, render_inspection(found))
    print("\n".join(inspection_lines(found)))
    print(f"{'page':<17}{printable(str(output))}: samples of each class, and all names; open in a browser")
