"""Time of a training step with a one-layer model, where nearly all of a step is overhead.

    python -P benchmarks/speed/one_layer.py CHECKOUT

Run as a program it serves `overhead.py --against`: for each line on stdin it trains one epoch by the `fit` command of
the checkout on PYTHONPATH and prints the microseconds of a step. It works with any checkout of this project.
"""

import contextlib
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

SMALL_BATCH = 4  # 1,125 steps in an epoch of the synthetic set


class Clocked(nn.Module):
    """A model that notes the time of each training forward pass, in the class: `fit` makes an instance of its own."""

    ticks_s: list[float] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        if self.training:
            Clocked.ticks_s.append(time.perf_counter())
        return self.model(images)


def one_layer(num_classes: int, image_size: int) -> nn.Module:
    """Return the smallest model there is, with a clock."""
    return Clocked(nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes)))


def step_us(train: Callable[[], object]) -> float:
    """Return the mean microseconds between two forward passes of an epoch, without its first fifth (warm-up)."""
    Clocked.ticks_s.clear()
    with silence():
        train()
    ticks = Clocked.ticks_s
    first = len(ticks) // 5
    return 1e6 * (ticks[-1] - ticks[first]) / (len(ticks) - 1 - first)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what is printed, and work in a temporary folder."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        os.environ.pop("CIFAR_LIGHTNING_RUN_DIR", None)
        os.environ["FORCE_COLOR"] = "1"  # progress bars are drawn, as on a terminal
        yield


def main() -> None:
    """Measure until stdin ends."""
    import cifar_lightning

    checkout = Path(sys.argv[1])
    assert checkout in Path(cifar_lightning.__file__).parents, cifar_lightning.__file__
    # The table of models has moved between versions; build_model reads it in all of them.
    cifar_lightning.build_model.__globals__["MODELS"]["smallnet"] = one_layer
    flags = ["--data.dataset=synthetic", f"--batch_size={SMALL_BATCH}", "--epochs=1", "--trainer.accelerator=cpu"]

    def fit() -> None:
        sys.argv = ["train.py", "fit", "--model.name=smallnet", *flags]
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(checkout / "train.py"), run_name="__main__")

    for _ in sys.stdin:
        print(step_us(fit), flush=True)


if __name__ == "__main__":
    main()
