"""A terminal that is closed while its program trains."""

import os
import signal
import subprocess
import sys

import pytest
from program import REPO, TINY

pty = pytest.importorskip("pty")


def test_a_closed_terminal_stops_training_with_a_checkpoint(tmp_path):
    """Closing it hangs up: SIGHUP arrives, and what the program prints from then on cannot be written."""

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        os.close(os.open(os.ttyname(0), os.O_RDWR))  # which makes it the controlling terminal

    controlling, terminal = pty.openpty()
    of_long_epoch = [*TINY, "--data.limit", "20000", "--batch_size", "10", "--epochs", "1", "--run_dir", "run"]
    process = subprocess.Popen(
        [sys.executable, REPO / "train.py", "fit", *of_long_epoch],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=prepare,
    )
    os.close(terminal)
    try:
        shown = b""
        while b"images/s" not in shown:
            shown += os.read(controlling, 4096)
        os.close(controlling)
        assert process.wait(120) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
