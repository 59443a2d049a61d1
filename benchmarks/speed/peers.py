"""Public programs that ours is compared with, each run from a checkout, with changes for a CPU."""

import argparse
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from cifar_lightning.errors import UserError


def peer_of(names: Collection[str]) -> Callable[[str], tuple[str, Path]]:
    """Return the type of a `--peer NAME=DIR` argument: name and checkout."""

    def parse(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        if name not in names or not folder:
            raise argparse.ArgumentTypeError(f"{text}: NAME=DIR with a NAME of {', '.join(names)}")
        return name, Path(folder).resolve()

    return parse


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a peer's checkout, with "-dirty" where a file is changed; None where it is no clone."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def read_peer(name: str, checkout: Path, file: str) -> str:
    """Return the text of a peer's file.

    Raises:
        UserError: There is no such checkout.
    """
    try:
        return (checkout / file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--peer {name}={checkout}: {file}: {error.strerror}; give a checkout of its repository."
        ) from error


def changed_for_cpu(name: str, checkout: Path, text: str, changes: Mapping[str, str]) -> str:
    """Return a text with each change made.

    Raises:
        UserError: What is to be changed is not there exactly once: the checkout is of another version.
    """
    for original, changed in changes.items():
        if text.count(original) != 1:
            raise UserError(
                f"--peer {name}={checkout}: another version (commit {commit_of(checkout) or 'unknown'}): "
                f"{original.strip()!r} is not in it once."
            )
        text = text.replace(original, changed)
    return text
