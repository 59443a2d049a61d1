"""Public record scripts, run from their checkouts; on a CPU with the listed changes.

    python -m benchmarks.speed.speedrun_peers airbench DIR IMAGES.pt SEED[,SEED...] OUT.json [--steps N]

`benchmarks/speed/speedrun.py` starts this in a process of its own. IMAGES.pt holds the four uint8 and int64
tensors of CIFAR-10: train_images (50000, 32, 32, 3), train_labels, test_images, test_labels.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.peers import changed_for_cpu, read_peer
from cifar_lightning.errors import UserError


@dataclass(frozen=True)
class Peer:
    """A record script.

    Attributes:
        file: Its name in the checkout.
        on_cpu: Changes for a CPU, text -> replacement; None where it needs a GPU.
    """

    file: str
    on_cpu: dict[str, str] | None


PEERS = {
    "airbench": Peer(
        "airbench94_muon.py",
        {
            "@torch.compile\n": "",  # needs a compiler, and the same arithmetic comes out
            "G.bfloat16()": "G.float()",  # emulated, and many times slower
            'torch.device("cuda")': 'torch.device("cpu")',
            "self.images.half()": "self.images.float()",
            "mod.half()": "mod.float()",
        },
    ),
    "hiverge": Peer("cifar10_speedrun.py", None),
}


class _Event:
    """`torch.cuda.Event` for a CPU."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.time_s = 0.0

    def record(self) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.time_s - self.time_s)


class Enough(Exception):
    """Raised by a training batch to end a run early."""


def load(name: str, checkout: Path) -> dict[str, Any]:
    """Execute a peer's script, all but its `__main__` part, and return its names.

    Raises:
        UserError: The checkout is missing or of another version, or the script needs a GPU.
    """
    peer = PEERS[name]
    text = read_peer(name, checkout, peer.file)
    if not torch.cuda.is_available():
        if peer.on_cpu is None:
            raise UserError(f"--peer {name}: it runs on a GPU alone; leave it out here.")
        text = changed_for_cpu(name, checkout, text, peer.on_cpu)
        torch.cuda.Event = _Event  # type: ignore[misc,assignment]  # what the script times with, on a CPU
        torch.cuda.synchronize = lambda: None  # type: ignore[assignment]  # and has to wait for there
    path = checkout / peer.file
    names: dict[str, Any] = {"__name__": "peer"}
    sys.argv[0] = str(path)  # it reads its own text for its log
    exec(compile(text, str(path), "exec"), names)
    return names


def run(name: str, checkout: Path, images: Path, seeds: list[int], steps: int | None) -> list[dict[str, Any]]:
    """Train and evaluate once for each seed; with `steps`, only time that many training steps of the first.

    Returns:
        Of each run
        `seconds` (the peer's own window: whitening, training, final evaluation with views), `accuracy`,
        `accuracy_no_tta`, `train_s` of each epoch; with `steps` only `step_s`, a list.
    """
    names = load(name, checkout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen: list[dict[str, Any]] = []
    names["print_training_details"] = lambda variables, **_: seen.append(dict(variables))
    model = names["CifarNet"]().to(device=device, memory_format=torch.channels_last)
    if device.type == "cuda":
        model.compile(mode="max-autotune")
    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("cifar10").mkdir()
        data = torch.load(images, weights_only=True)
        for part in ("train", "test"):
            content = {"images": data[f"{part}_images"], "labels": data[f"{part}_labels"], "classes": []}
            torch.save(content, f"cifar10/{part}.pt")
        if device.type == "cuda":
            names["main"]("warmup", model)
        if steps is not None:
            _count_steps(names, steps, ticks)  # from here on: the steps of warming up are not counted
        runs = []
        for seed in seeds:
            torch.manual_seed(seed)
            seen.clear()
            try:
                names["main"]("run", model)
            except Enough:
                return [{"step_s": [end - start for start, end in itertools.pairwise(ticks)]}]
            runs.append(_figures(seen))
    return runs


def _figures(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results in a run's printed rows."""
    total = seen[-1]
    times = [float(row["time_seconds"]) for row in seen]
    return {
        "seconds": float(total["time_seconds"]),
        "accuracy": float(total["tta_val_acc"]),
        "accuracy_no_tta": float(total["val_acc"]),
        "train_s": [end - start for start, end in zip([0.0, *times], times[:-1], strict=False)],
    }


def _count_steps(names: dict[str, Any], steps: int, ticks: list[float]) -> None:
    """Let the peer's training loader end the run after some steps, and note when each begins."""
    original = names["CifarLoader"].__iter__

    def counted(self: Any) -> Any:
        for batch in original(self):
            if len(ticks) in (0, steps):  # between them a GPU may run behind, as it does without a clock
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())
            if len(ticks) > steps:
                raise Enough
            yield batch

    names["CifarLoader"].__iter__ = counted


def main() -> None:
    """Run a peer and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(PEERS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, help="only time that many training steps")
    args = parser.parse_args()
    try:
        found = run(args.name, args.checkout.resolve(), args.images.resolve(), args.seeds, args.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.output.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
