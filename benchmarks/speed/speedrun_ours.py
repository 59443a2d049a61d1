"""Several `fit` runs in one process, for `speedrun.py`: later runs reuse what the GPU autotuned in the first.

    python -m benchmarks.speed.speedrun_ours ARGUMENTS.json

ARGUMENTS.json holds a list of command lines, each a list of arguments as `train.py` takes them.
"""

import json
import sys
from pathlib import Path

from cifar_lightning.cli.main import run_command


def main() -> None:
    """Run each command line; an error ends all."""
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        status = run_command(arguments)
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
