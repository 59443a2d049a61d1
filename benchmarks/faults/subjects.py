"""The two programs under test, and their command-line arguments."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT


@dataclass(frozen=True)
class Subject:
    """A training program and its command-line arguments.

    Attributes:
        name: "ours" or "plain".
        program: Its Python file.
    """

    name: str
    program: Path

    @property
    def is_plain(self) -> bool:
        """Whether it is the peer."""
        return self.name == "plain"

    def fit(self, data: Any, out: Any, *, size: int = 16, epochs: int = 3, **settings: Any) -> list[Any]:
        """Return the arguments of a training; settings: batch_size, lr, workers, every (steps), devices, extra.

        Without `out`, ours chooses the folder itself.
        """
        asked = {"batch_size": 18, "lr": 0.01, "workers": 2, "every": 5, "devices": 1, "extra": (), **settings}
        common = ["--epochs", epochs, "--batch_size", asked["batch_size"], f"--lr={asked['lr']}"]
        if self.is_plain:
            own = ["--data", data, "--out", out, "--image_size", size, "--num_workers", asked["workers"]]
            own += ["--every_n_train_steps", asked["every"], "--devices", asked["devices"]]
        else:
            own = ["fit", "--data.dataset", "folder", "--data.root", data, "--data.image_size", size]
            own += ["--model.model_kwargs", "{widths: [8, 8, 16], dropout: 0.2}", "--trainer.accelerator", "cpu"]
            own += ["--trainer.logger", "false", "--data.num_workers", asked["workers"]]
            own += ["--data.eval_batch_size", 10]  # several batches a validation, to be stopped between them
            own += ["--run_dir", out] if out is not None else []
            own += ["--checkpoint.every_n_train_steps", asked["every"]]
            if asked["devices"] > 1:
                own += ["--trainer.strategy", "ddp", "--trainer.devices", asked["devices"]]
        return [*own, *common, *asked["extra"]]

    def trainer_flags(self, **settings: Any) -> list[Any]:
        """Return the arguments that give the Trainer these settings."""
        if self.is_plain:
            return ["--trainer", json.dumps(settings)]
        return [item for key, value in settings.items() for item in (f"--trainer.{key}", json.dumps(value).strip('"'))]

    def resume(self, data: Any, out: Any, **settings: Any) -> list[Any]:
        """Return the arguments that resume a training; ours needs no settings but those that change."""
        if self.is_plain:
            return [*self.fit(data, out, **settings), "--ckpt_path", self.last(out)]
        return ["fit", "--resume", out, *settings.get("changed", ())]

    def checkpoints(self, out: Path) -> Path:
        """Return the folder of a training's checkpoints."""
        return out if self.is_plain else out / "checkpoints"

    def last(self, out: Path) -> Path:
        """Return the checkpoint that a training resumes from."""
        return self.checkpoints(out) / "last.ckpt"


SUBJECTS = {
    "ours": Subject("ours", ROOT / "train.py"),
    "plain": Subject("plain", Path(__file__).with_name("plain.py")),
}
