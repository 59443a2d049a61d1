"""Speed recipes against public record scripts: accuracy and time of whole runs, and epochs timed in turn.

    python -m benchmarks.speed.speedrun                                             speedrun94, seed 0, from data/
    python -m benchmarks.speed.speedrun --seeds 0,1,2 --json benchmarks/results/speedrun94.json
    python -m benchmarks.speed.speedrun --peer airbench=DIR                         whole runs of both in turn
    python -m benchmarks.speed.speedrun --peer airbench=DIR --epochs --rounds 3     only an epoch of each, in turn
    python -m benchmarks.speed.speedrun --seeds 0,1,2,3 --block 4 --peer airbench=DIR     four of ours, then four of it

Ours is the ordinary `fit`, including checkpoints, logging and report. Two times are given: that of the records
(whitening, training and the final evaluation with six views) and that of `Trainer.fit`. A peer runs from a checkout of
its public repository; its changes for a CPU are printed. Each block of seeds runs in its own process. On a GPU it
begins with a run that does not count, for compilation and cuDNN's autotuning, as the records' scripts do. --json adds
finished runs to the file.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import CONFIGS, execute
from benchmarks.accuracy.label_issues import open_cifar10
from benchmarks.accuracy.record import comparable, present_settings
from benchmarks.hardware import hardware_name
from benchmarks.speed.peers import commit_of, peer_of
from benchmarks.speed.results import spread
from benchmarks.speed.speedrun_peers import PEERS
from cifar_lightning.runs.environment import describe_environment

COMPILED = "--model.compile=true"
PEER_EPOCHS, PEER_STEPS = 8, 25  # of airbench94_muon: 8 epochs of 25 batches of 2,000


def our_runs(recipe: str, seeds: list[int], flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run `fit` once for each seed, in one process; return the results of each."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        commands = [_our_command(recipe, seed, flags, work / str(seed)) for seed in seeds]
        if torch.cuda.is_available():
            first_steps = ["--trainer.limit_train_batches=4", "--trainer.limit_test_batches=2"]
            commands.insert(0, _our_command(recipe, 0, [*flags, *first_steps], work / "warmup"))
        (work / "arguments.json").write_text(json.dumps(commands), encoding="utf-8")
        execute([sys.executable, "-m", "benchmarks.speed.speedrun_ours", str(work / "arguments.json")])
        return [_our_figures(recipe, flags, work / str(seed)) for seed in seeds]


def _our_command(recipe: str, seed: int, flags: list[str], folder: Path) -> list[str]:
    folder.mkdir()
    command = ["fit", "--config", f"{CONFIGS / recipe}.yaml", "--seed_everything", str(seed), "--data.seed", str(seed)]
    clock = [
        "--trainer.callbacks+=benchmarks.speed.speedrun_clock.Clock",
        f"--trainer.callbacks.path={folder / 'clock.json'}",
    ]
    return [*command, "--run_dir", str(folder / "run"), *clock, *flags]


def _our_figures(recipe: str, flags: list[str], folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "clock.json").read_text(encoding="utf-8"))
    metrics = json.loads((folder / "run" / "test_metrics.json").read_text(encoding="utf-8"))
    figures |= {"accuracy": metrics["accuracy"], "accuracy_no_tta": metrics.get("accuracy_no_tta")}
    environment = json.loads((folder / "run" / "environment.json").read_text(encoding="utf-8"))
    figures |= {key: environment[key] for key in ("commit", "dirty", "precision")}
    # A config changes, and only runs of the same one may be compared.
    settings = present_settings(recipe)
    settings["model"] |= {"compile": True} if COMPILED in flags else {}
    return figures | {"settings": settings}


def peer_runs(
    name: str, checkout: Path, images: Path, seeds: list[int], steps: int | None, folder: Path
) -> list[dict[str, Any]]:
    """Run a peer once for each seed, in one process; return the results of each."""
    output = folder / "peer.json"
    command = [sys.executable, "-m", "benchmarks.speed.speedrun_peers", name, str(checkout), str(images)]
    command += [",".join(map(str, seeds)), str(output), *([] if steps is None else ["--steps", str(steps)])]
    execute(command)
    runs: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
    precision = "as it is" if torch.cuda.is_available() else "32-true"
    return [{**figures, "commit": commit_of(checkout), "precision": precision} for figures in runs]


def write_images(args: argparse.Namespace, path: Path) -> None:
    """Write CIFAR-10 as the four tensors that a peer's process reads."""
    _, *sets = open_cifar10(Path(args.data or "data"))
    tensors = {}
    for part, images in zip(("train", "test"), sets, strict=True):
        tensors[f"{part}_images"] = torch.from_numpy(np.array(images.images))
        tensors[f"{part}_labels"] = torch.from_numpy(np.array(images.targets))
    torch.save(tensors, path)


def compare_epochs(args: argparse.Namespace, peers: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Time an epoch of the peer and one of ours at each image size, in turn; print what whole runs would take."""
    config = present_settings(args.config)
    (name, checkout), *_ = peers.items()
    sizes, epochs = config["data"].get("train_sizes", [32]), config["trainer"]["max_epochs"]
    plan = [sizes[min(epoch, len(sizes) - 1)] for epoch in range(epochs)]
    rounds = []
    for number in range(args.rounds):
        (found,) = peer_runs(name, checkout, folder / "images.pt", [number], PEER_STEPS - 1, folder)
        theirs = PEER_STEPS * statistics.mean(found["step_s"])
        ours = {}
        for size in sorted(set(plan)):
            flags = [
                "--trainer.max_epochs=1",
                f"--data.train_sizes=[{size},{sizes[-1]}]",
                "--model.stem_train_fraction=0.0",
            ]
            flags += ["--model.tta=none", *our_flags(args)]
            ours[size] = our_runs(args.config, [number], flags, folder)[0]["train_s"][0]
        total = sum(ours[size] for size in plan)
        ratio = total / (PEER_EPOCHS * theirs)
        rounds.append({"peer_epoch_s": theirs, "our_epoch_s": ours, "ratio": ratio})
        parts = ", ".join(f"{size} px {seconds:.0f} s" for size, seconds in ours.items())
        print(f"round {number + 1}: an epoch of {name} {theirs:.0f} s, ours {parts}; training {ratio:.3f}x", flush=True)
    about = {key: describe_environment()[key] for key in ("commit", "dirty")}
    return {"recipe": args.config, "peer": name, "plan": plan, "rounds": rounds, "precision": args.precision, **about}


def our_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of `fit` for the images and for what replaces the config's settings."""
    asked = [f"--trainer.precision={args.precision}"] if args.precision else []
    asked += [COMPILED] if args.compile else []
    return [*asked, f"--data.dataset={'folder' if args.data else 'cifar10'}", f"--data.root={args.data or 'data'}"]


def whole_runs(args: argparse.Namespace, peers: dict[str, Path], folder: Path, lines: list[dict[str, Any]]) -> None:
    """Run ours and the peers in turn for each block of seeds; add a line for each to `lines` and write it at once."""
    hardware = hardware_name()

    def add(who: str, seed: int, figures: dict[str, Any]) -> None:
        about = {"who": who, "recipe": args.config, "seed": seed}
        lines.append({**about, **figures, "hardware": hardware, "note": args.note})
        print(describe(lines[-1]), flush=True)
        save(args.json, lines)

    for start in range(0, len(args.seeds), args.block):
        seeds = args.seeds[start : start + args.block]
        for seed, figures in zip(seeds, our_runs(args.config, seeds, our_flags(args), folder), strict=True):
            add("ours", seed, figures)
        for who, checkout in peers.items():
            found = peer_runs(who, checkout, folder / "images.pt", seeds, None, folder)
            for seed, figures in zip(seeds, found, strict=True):
                add(who, seed, figures)


def describe(line: dict[str, Any]) -> str:
    """Describe a run."""
    fit = f", the whole fit {line['fit_s']:.4g} s" if "fit_s" in line else ""
    no_tta = f"{100 * line['accuracy_no_tta']:.2f} % with one view" if line["accuracy_no_tta"] else "one view only"
    accuracy = f"{100 * line['accuracy']:.2f} % ({no_tta})"
    return f"{line['who']}, seed {line['seed']}: {accuracy} in {line['seconds']:.4g} s{fit}"


def save(path: Path | None, lines: list[dict[str, Any]]) -> None:
    """Write the lines, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


def other_versions(lines: list[dict[str, Any]], peers: dict[str, Path]) -> str:
    """Return a sentence on runs of this machine by a peer's other commit, with which none may be averaged; or ""."""
    for name, checkout in peers.items():
        commit = commit_of(checkout)
        if str(commit).endswith("-dirty"):
            return f"--peer {name}={checkout}: has changed files; check its commit out again"
        own = [line for line in lines if line["who"] == name and line["hardware"] == hardware_name()]
        if others := sorted({str(line["commit"]) for line in own} - {str(commit)}):
            return (
                f"--peer {name}={checkout}: of commit {commit}, and the file has runs of {others[0]} on this machine; "
                "check that out, or name another --json"
            )
    return ""


def summarize(lines: list[dict[str, Any]], peers: dict[str, Path]) -> None:
    """Print means and spread of this machine's runs by precision, and the ratios of times; the newest run's last."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in reversed(lines):  # the newest first
        if line["who"] in ("ours", *peers) and line["hardware"] == hardware_name():
            groups.setdefault((line["who"], line["precision"]), []).append(line)
    seconds = {group: statistics.median(line["seconds"] for line in own) for group, own in groups.items()}
    for (who, precision), own in groups.items():
        accuracies = [100 * line["accuracy"] for line in own]
        deviation = f"± {statistics.stdev(accuracies):.2f}, n={len(own)}" if len(own) > 1 else "n=1, no spread"
        took_s = seconds[who, precision]
        print(f"{who}, {precision}: {statistics.mean(accuracies):.2f} % ({deviation}), {took_s:.4g} s (median)")
    for who, precision in reversed([group for group in groups if group[0] == "ours"]):
        for peer in (group for group in groups if group[0] != "ours"):
            runs = f"{len(groups[who, precision])} and {len(groups[peer])} whole runs, {hardware_name()}"
            ratios = [line["seconds"] / seconds[peer] for line in groups[who, precision]]
            what = f"time of ours in {precision} over the median of {peer[0]}'s in {peer[1]}, {runs}"
            print(f"{what}: {spread(ratios, 3)}")
            print(f"ratio={seconds[who, precision] / seconds[peer]:.3f}")


def main() -> None:
    """Measure and print; with a peer the last line is `ratio=X`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="speedrun94", help="a speed config (default speedrun94)")
    parser.add_argument("--data", help="class folders; without it CIFAR-10 below data/")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--peer", type=peer_of(PEERS), action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--block", type=int, default=1, help="seeds of ours, then of a peer, in turn (default 1)")
    parser.add_argument("--compile", action="store_true", help="ours compiled, as the records' scripts are on a GPU")
    parser.add_argument("--epochs", action="store_true", help="time an epoch of each in turn instead of whole runs")
    parser.add_argument("--rounds", type=int, default=1, help="of --epochs (default 1)")
    parser.add_argument("--precision", help="of ours, instead of the config's: 32-true is what a peer has on a CPU")
    parser.add_argument("--note", default="", help="remark on the results")
    parser.add_argument("--json", type=Path, help="add the runs to this file")
    args = parser.parse_args()
    peers = dict(args.peer)
    if args.epochs and "airbench" not in peers:
        parser.error("--epochs needs --peer airbench=DIR")
    lines = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    if message := other_versions(lines, peers):
        parser.error(message)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if peers:
            write_images(args, folder / "images.pt")
            for peer in peers:
                changes = PEERS[peer].on_cpu if not torch.cuda.is_available() else None
                for old, new in (changes or {}).items():
                    print(f"{peer} on a CPU: {old.strip()} -> {new or 'left out'}")
        if args.epochs:
            found = compare_epochs(args, {"airbench": peers["airbench"]}, folder)
            lines.append({"who": "epochs in turn", **found, "hardware": hardware_name(), "note": args.note})
            save(args.json, lines)
            ratios = [one["ratio"] for one in found["rounds"]]
            what = f"training time of {args.config} over airbench's, epochs in turn, n={len(ratios)}, {hardware_name()}"
            print(f"{what}: {spread(ratios, 3)}")
            print(f"ratio={statistics.median(ratios):.3f}")
            return
        whole_runs(args, peers, folder, lines)
    summarize(comparable(lines, args.config, compiled=args.compile), peers)


if __name__ == "__main__":
    main()
