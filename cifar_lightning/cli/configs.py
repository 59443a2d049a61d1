"""The configs that come with the package, which every command finds by name."""

import os
from pathlib import Path

from cifar_lightning.formatting import suggest

_PACKAGE = Path(__file__).parents[1]
# In a wheel they are in the package; in a checkout, also one that is installed with -e, next to it.
SHIPPED = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), Path("configs"))


def config_names() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_config(given: str) -> Path:
    """Return the file of --config: the user's own, one of a folder configs/ here, or the shipped one of that name."""
    if os.path.lexists(given) and not os.path.isdir(given):
        return Path(given)
    path = Path(given)
    if path.parent not in (Path(), Path("configs")):
        return path
    file = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    candidates = (Path("configs", file), SHIPPED / file)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), path)


def suggest_config(path: Path) -> str:
    """Return " Did you mean X?" for the config nearest to one that is missing, or the names of all."""
    own = {config.stem: config.as_posix() for config in sorted(Path("configs").glob("*.yaml"))}
    configs = {name: name for name in config_names()} | own
    every = f" There are {', '.join(configs.values())}." if configs else ""
    return suggest(path.stem, configs) or every
