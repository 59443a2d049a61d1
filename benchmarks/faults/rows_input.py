"""Rows 47 and 48: run folders with links, special files and values of other types in place of their own."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

from benchmarks.faults.bench import Trial, row

_COMMANDS = (["analyze"], ["validate"], ["fit", "--resume"])


def _copy(trial: Trial, name: str) -> Path:
    """Return a copy of a finished run, below a folder of its own."""
    return Path(shutil.copytree(trial.bench.finished, trial.place / name))


@row(47, "links and special files in a run folder", plain=False)
def special_files(trial: Trial) -> str:
    """Each kind in place of some file of the run, and a device as --config."""
    victim = trial.place / "victim"
    victim.write_bytes(b"the user's own")
    for number, (name, target) in enumerate(
        [
            ("split.json", "/dev/zero"),
            ("metrics.csv", None),
            ("checkpoints/last.ckpt", victim),
            (".lock", victim),
            ("report.html", victim),
            ("environment.json", "nowhere"),
        ]
    ):
        run = _copy(trial, f"run{number}")
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name) if target is None else (run / name).symlink_to(target)
        for command in _COMMANDS:
            trial.reported(f"{command[0]}, {name}", trial.run([*command, run]), Path(name).name, status=2)
    trial.reported("--config", trial.run(["fit", "--config", "/dev/zero"]), "/dev/zero", status=2)
    trial.kept(victim.read_bytes() == b"the user's own", "the target of a link was changed")
    trial.expect(not (trial.place / "nowhere").exists(), "a file was made through a link")
    return "refused with the file's name; the targets of links are untouched"


@row(48, "values of other types and sizes in a run folder", plain=False)
def other_values(trial: Trial) -> str:
    """All files of a report at once, which it names; then a checkpoint."""
    run = _copy(trial, "run")
    (run / "split.json").write_text(json.dumps({"sizes": {"val": "x"}}))
    (run / "environment.json").write_text('{"command": ' + "[" * 5000)
    (run / "config.yaml").write_text("model: {lr: 2024-01-01}\n")
    (run / "metrics.csv").write_text("epoch,val/acc\n1e308,0.5\n")
    (run / "confusion_matrix.csv").write_text("t,a,b\na,1,1000000000000\nb,1,1\n")
    (run / "gallery.npz").write_bytes(_npz_of(10**13))
    done = trial.run(["analyze", run])
    if trial.worked("analyze", done):
        for name in ("split.json", "environment.json", "config.yaml", "metrics.csv", "gallery.npz"):
            trial.expect(f"{name} is damaged" in done.stdout, f"{name} is not named")
        trial.expect("Test accuracy" in done.stdout, "the rest is not shown")
    run = _copy(trial, "checkpoint")
    for number, (place, value) in enumerate(
        [
            (("ImageDataModule", "mean"), [0.5, 0.5]),
            (("ImageDataModule", "image_size"), 5000),
            (("hyper_parameters", "name"), 5),
            (("epoch",), None),
            (("state_dict",), None),
        ]
    ):
        _change_checkpoint(trial, run, place, value)
        command = (["validate", run], ["export", run, "--format", "safetensors", "--output", f"{number}.safetensors"])
        for arguments in command:
            trial.reported(f"{place[-1]} {value}, {arguments[0]}", trial.run(arguments), "best.ckpt", status=2)
    return "named with file and field; the report shows the rest"


def _npz_of(num_values: int) -> bytes:
    """Return an archive whose array claims more values than it has."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({num_values}, 1, 1, 3)}}".ljust(117).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("images", "indices"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return buffer.getvalue()


def _change_checkpoint(trial: Trial, run: Path, place: tuple[str, ...], value: object) -> None:
    """Write best.ckpt again with another value and a correct checksum."""
    import torch

    from cifar_lightning.checkpoints.checksum import add_checksum

    checkpoint = torch.load(trial.bench.finished / "checkpoints" / "best.ckpt", weights_only=True)
    holder = checkpoint
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    (run / "checkpoints" / "best.ckpt").write_bytes(add_checksum(buffer.getvalue()))
