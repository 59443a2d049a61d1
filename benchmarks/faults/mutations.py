"""Run whole commands on run folders with a mutated file, in this process, and count the clean endings.

    python -m benchmarks.faults.mutations --commands 300 [--seed 0]

Clean: exit status 0, 1 or 2, at most 3 lines on stderr, no traceback, an end within a minute, and nothing written
outside the run and the place for the command's own output. A mutation exchanges a value for one of another kind, size
or type, changes, cuts or doubles bytes, or puts a link, a FIFO, a device or a folder in the place of a file;
checkpoints get a correct checksum again. Another seed makes other mutations.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cifar_lightning.runs.folder import RunFolder

FIT = ["--data.dataset", "synthetic", "--data.image_size", "16", "--data.limit", "200", "--batch_size", "90"]
FIT += ["--model.model_kwargs", "{widths: [2, 2, 2]}", "--trainer.accelerator", "cpu", "--model.tta", "mirror"]
COMMANDS = [
    ["analyze", "RUN"],
    ["analyze", "OTHER", "--compare", "RUN"],
    ["validate", "RUN"],
    ["test", "RUN"],
    ["predict", "RUN", "--output", "OUT/p.npz"],
    ["predict-images", "RUN", "IMAGE.png", "--output", "OUT/p.csv", "--force"],
    ["export", "RUN", "--format", "safetensors", "--output", "OUT/m.safetensors", "--force"],
    ["fit", "--resume", "RUN", "--epochs", "2"],
    ["fit", "--resume", "RUN"],
    ["fit", *FIT, "--epochs", "1", "--run_dir", "OUT/new", "--init_weights", "RUN/checkpoints/best.ckpt"],
]
FILES = ["config", "split", "environment", "metrics_csv", "timing_csv", "test_metrics", "confusion_matrix_csv"]
FILES += ["predictions", "predictions_val", "gallery", "explanations", "findings", "last_checkpoint", "best_checkpoint"]
FILES += ["best_checkpoint", "last_checkpoint", "best_checkpoint"]  # the largest schema: more often
_WORD = re.compile(rb'"[^"]*"|[-\w.]+')
_TEXTS = ["null", "[]", "{}", '"x"', "-1", "1e308", "nan", "1e999", "9" * 5000, "true", '""', "2024-01-01", "!!set {a}"]
_TEXTS += ["0x" + "f" * 6000, "\0", "\udcff", "[" * 3000, "&a [*a]", "1000000000000", "'\\e[31m'"]
_VALUES: list[Any] = [None, [], {}, "x", "", -1, 0, 5, 5000, 1e308, float("nan"), True, [1, 2], {"a": 1}, 10**13]
_VALUES += [(), "a\nb"]
_SECONDS = 60


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with up to three changes: a value exchanged for another kind, bytes changed, cut or doubled."""
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        end = min(len(data), at + rng.choice([1, 4, 30, 1000]))
        if kind == 0 and (words := [match.span() for match in _WORD.finditer(data)]):
            at, end = rng.choice(words)
        text = rng.choice(_TEXTS).encode("utf-8", "surrogateescape")
        piece = {3: rng.randbytes(end - at), 4: b"", 5: 2 * data[at:end]}.get(kind, text)
        data = data[:at] + piece + data[end:]
    return data


def mutate_tree(tree: Any, rng: random.Random) -> None:
    """Exchange or remove one value somewhere in nested dicts and lists."""
    places = list(_places(tree))
    # Every depth is as likely as any other: most values are deep inside.
    depth = rng.choice(sorted({depth for depth, *_ in places}))
    _, holder, key = rng.choice([place for place in places if place[0] == depth])
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield depth, tree, key
        if isinstance(tree[key], dict | list) and len(tree[key]) < 1000:
            yield from _places(tree[key], depth + 1)


def mutate_file(path: Path, rng: random.Random, victim: Path) -> str:
    """Mutate a file of a run in place; return how."""
    if rng.random() < 0.1:
        kind = rng.choice(["link", "device", "fifo", "folder", "huge"])
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        else:
            path.symlink_to(victim if kind == "link" else "/dev/zero")
        return kind
    if path.suffix == ".ckpt" and rng.random() < 0.9:
        _mutate_checkpoint(path, rng)
        return "value"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return "bytes"


def _mutate_checkpoint(path: Path, rng: random.Random) -> None:
    import torch

    from cifar_lightning.checkpoints.checksum import add_checksum

    checkpoint = torch.load(path, weights_only=True)
    mutate_tree(checkpoint, rng)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path.write_bytes(add_checksum(buffer.getvalue()))


@dataclass(frozen=True)
class Ending:
    """How one command ended on a mutated run; `fault` is empty if that was clean."""

    file: str
    how: str
    command: list[str]
    status: Any
    stderr: str
    fault: str


class _Slow(BaseException):
    """Raised by the alarm clock."""


def run_commands(place: Path, num_commands: int, seed: int) -> Iterator[Ending]:
    """Make a run in an empty folder and yield the endings of commands on mutated copies of it."""
    rng, run, other, out = random.Random(seed), place / "run", place / "other", place / "out"
    out.mkdir()
    victim, image = place / "victim", place / "image.png"
    victim.write_bytes(b"the user's own")
    _save_image(image)
    status, stderr = call(["fit", *FIT, "--epochs", "1", "--run_dir", str(run)])
    if status != 0:
        raise RuntimeError(stderr)
    shutil.copytree(run, other)
    whole = place / "whole"
    shutil.copytree(run, whole)
    for _ in range(num_commands):
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        file = rng.choice(FILES)
        path = getattr(RunFolder(run), file)
        how = mutate_file(path, rng, victim)
        command = [_named(word, place) for word in rng.choice(COMMANDS)]
        before = _outside(place)
        status, stderr = call(command)
        fault = _fault(status, stderr) or ("wrote outside the run" if _outside(place) != before else "")
        yield Ending(file, how, command, status, stderr, fault)
        shutil.rmtree(out)
        out.mkdir()


def _named(word: str, place: Path) -> str:
    return re.sub(r"^(RUN|OTHER|OUT|IMAGE)\b", lambda match: str(place / match[0].lower()), word)


def _save_image(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), (200, 100, 50)).save(path)


def call(arguments: list[str]) -> tuple[Any, str]:
    """Run a command line in this process; return its exit status, or the traceback instead, and its stderr."""
    from cifar_lightning.cli import lightning_cli
    from cifar_lightning.cli import main as cli

    os.environ.pop("CIFAR_LIGHTNING_RUN_DIR", None)
    out, err = io.StringIO(), io.StringIO()

    def too_slow(*_: object) -> None:
        raise _Slow

    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(_SECONDS)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(lightning_cli.StopSignals, "install"))
            stack.enter_context(mock.patch.object(sys, "argv", ["train.py", *arguments]))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            cli.main()
    except SystemExit as ended:
        return ended.code, err.getvalue()
    except _Slow:
        return f"no end after {_SECONDS} s", err.getvalue()
    except BaseException:
        return traceback.format_exc(), err.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return None, err.getvalue()


def _fault(status: Any, stderr: str) -> str:
    if status not in (0, 1, 2):
        return str(status).strip().splitlines()[-1]
    if "Traceback" in stderr:
        return "a traceback on stderr"
    if len(stderr.splitlines()) > 3:
        return f"{len(stderr.splitlines())} lines on stderr"
    return "" if stderr or status == 0 else "nothing on stderr"


def _outside(place: Path) -> dict[str, str]:
    """Return the hashes of all files but those of the two runs, which the commands write, and of the outputs."""
    written = {"run", "other", "out"}
    files = [path for path in sorted(place.rglob("*")) if path.relative_to(place).parts[0] not in written]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def main() -> None:
    """Print each ending that is not clean, and last `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default 0)")
    args = parser.parse_args()
    statuses, num_clean = [], 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for ending in run_commands(Path(folder), args.commands, args.seed):
            num_clean += not ending.fault
            statuses.append(ending.status)
            if ending.fault:
                print(f"{ending.file} ({ending.how}), {' '.join(ending.command[:3])}: {ending.fault}", flush=True)
                print(f"    {str(ending.status)[-1500:]}\n    {ending.stderr[-500:]}")
    ended = ", ".join(f"{statuses.count(status)} with {status}" for status in (0, 1, 2))
    print(f"Clean endings over {args.commands} commands on mutated runs, seed {args.seed}; {ended}.")
    print(f"ratio={num_clean / args.commands:.3f}")


if __name__ == "__main__":
    main()
