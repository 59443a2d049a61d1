"""Import paths, "package.module:name": code of one's own by name, and which of those in a run folder are trusted."""

import contextlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_lightning.errors import UserError
from cifar_lightning.formatting import clipped, command_line, is_program, reason_of, suggest

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"{_NAME}(\.{_NAME})*[:.]{_NAME}(\.{_NAME})*")
TRUSTED = ("cifar_lightning", "torch", "torchvision", "timm", "torchmetrics", "lightning")
"""Top packages whose classes a run folder may name. Their functions may not: `torch.hub.load` runs any code."""
_MAY_BE_PATHS = {"class_path", "init_args", "name", "dataset", "loss", "model_class", "data_class"}
_MAY_BE_PATHS |= {"transforms", "callbacks", "logger", "profiler", "plugins", "strategy", "optimizer", "lr_scheduler"}
_MAY_BE_PATHS |= {"metrics", "accelerator"}
_ARE_CLASSES = {"model", "data", "model.model"}
_TRUSTED_FUNCTIONS = (
    *("cifar_lightning.models.", "torchvision.models.", "timm.models."),
    *("torch.nn.functional.", "torchvision.ops.", "torchvision.transforms.", "torch.float", "torch.int", "torch.uint"),
)


def is_import_path(text: object) -> bool:
    """Whether a value reads as package.module:name or package.module.Name."""
    return isinstance(text, str) and _PATH.fullmatch(text) is not None


def import_object(path: str, flag: str) -> Any:
    """Import what stands at "package.module:name" or "package.module.Name"; the working directory is importable.

    Args:
        path: Behind a colon there may be attributes of attributes, "package.module:Class.method".
        flag: Named by errors, such as "--data.dataset".

    Raises:
        UserError: The path is none, the module cannot be imported, or has no such attribute.
    """
    if not is_import_path(path):
        raise UserError(f"{flag} {clipped(path)}: not an import path; give package.module:name.")
    module_name, colon, attributes = path.partition(":")
    if not colon:
        module_name, _, attributes = path.rpartition(".")
    add_working_directory()
    value = _import_module(module_name, f"{flag} {clipped(path)}")
    for name in attributes.split("."):
        if not hasattr(value, name):
            where = getattr(value, "__qualname__", module_name)
            names = [each for each in dir(value) if not each.startswith("_")]
            raise UserError(f"{flag} {clipped(path)}: {where} has no {name}.{suggest(name, names)}")
        value = getattr(value, name)
    return value


def is_timm_installed() -> bool:
    """Return whether timm is installed, without importing it."""
    return importlib.util.find_spec("timm") is not None


def import_timm() -> Any:
    """Import timm, whose models and optimizers go by name; refuse names of it where it cannot be imported."""
    if not is_timm_installed():
        raise UserError(
            "timm is not installed; pip install 'cifar-lightning[timm]', or -e '.[timm]' in a copy of the repository"
        )
    try:
        importlib.import_module("timm.optim")
        return importlib.import_module("timm")
    except Exception as error:  # its own imports may fail in any way, such as another torchvision version
        raise UserError(f"timm is installed but cannot be imported ({reason_of(error)}).") from error


def import_modules(settings: Any) -> None:
    """Import the modules of one's own that settings name, in the working directory.

    jsonargparse would do it in the folder of the config, where files that a module reads by relative paths are missing.
    It reports what cannot be imported.
    """
    for _, path in import_paths(settings):
        if not _is_trusted(path):
            with contextlib.suppress(UserError):
                import_object(path, "")


def add_working_directory() -> None:
    """Let modules of the working directory be imported, as `python -m` does."""
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
        importlib.invalidate_caches()


def _import_module(name: str, typed: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{name}.".startswith(f"{missing}."):  # imported by the module itself
            raise UserError(f"{typed}: {name} imports {missing}, which is not installed.") from error
        parent = missing.rpartition(".")[0]
        paths = getattr(sys.modules[parent], "__path__", []) if parent else [str(Path.cwd()), *sys.path]
        known = [f"{parent}.{found.name}".lstrip(".") for found in pkgutil.iter_modules(paths)]
        hint = " Leave .py out." if missing.endswith(".py") else suggest(missing, known, cutoff=0.75)
        place = "" if parent else f" in {Path.cwd()} or installed"
        raise UserError(f"{typed}: no module {missing}{place}.{hint}") from error
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise UserError(f"{typed}: {name} cannot be imported ({type(error).__name__}: {reason_of(error)}).") from error


# -- trust -------------------------------------------------------------------------------------------------------------


def import_trusted(path: str, flag: str, file: Path, *, trust_code: bool) -> Any:
    """Import a path that stands in a file of a run folder.

    Raises:
        UserError: As `import_object`; or it is code of neither this package nor PyTorch's, and not `trust_code`.
    """
    check_trust(path, flag, file, trust_code=trust_code)
    value = import_object(path, flag)
    owner = getattr(value, "__module__", None) or ""
    is_theirs = _is_trusted(owner) and (isinstance(value, type) or f"{owner}.".startswith(_TRUSTED_FUNCTIONS))
    if not trust_code and not is_theirs:
        raise _untrusted(path, flag, file)
    return value


def check_trust(path: str, flag: str, file: Path, *, trust_code: bool) -> None:
    """Refuse, without importing it, a path in a file of a run folder: not in `TRUSTED`, or by its name a function.

    A data set is refused in any package: it may be a function, and is called. So is an attribute of what stands behind
    a colon, which may be a module that the trusted one has imported.
    """
    name = re.split("[.:]", path)[-1]
    is_function = name.lstrip("_")[:1].islower() and not path.replace(":", ".").startswith(_TRUSTED_FUNCTIONS)
    is_nested = "." in path.partition(":")[2]
    if not trust_code and (flag == "--data.dataset" or is_function or is_nested or not _is_trusted(path)):
        raise _untrusted(path, flag, file)


def import_paths(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, path) of settings: "module:name" anywhere, "module.Name" where a setting may be an import path."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from import_paths(value, f"{prefix}.{key}".lstrip("."))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from import_paths(value, prefix)
    elif is_import_path(settings) and (
        ":" in settings or prefix in _ARE_CLASSES or _MAY_BE_PATHS & set(prefix.split("."))
    ):
        yield prefix, settings


def _is_trusted(path: str) -> bool:
    return path.partition(":")[0].partition(".")[0] in TRUSTED


def _untrusted(path: str, flag: str, file: Path) -> UserError:
    again = (
        command_line(*sys.argv[1:], "--trust_code", "true")
        if is_program()
        else "give --trust_code true, from Python trust_code=True"
    )
    return UserError(
        f"{flag} {clipped(path)}: named in {file}, and code that a command runs only where you trust it.\n"
        f"If you do: {again}"
    )
