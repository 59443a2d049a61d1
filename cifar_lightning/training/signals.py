"""SIGTERM and Ctrl-C: training stops at the next batch boundary, anything else at once.

This module notes the signal; `last_checkpoint` saves and stops. SLURM's requeue signal stays Lightning's.
"""

import os
import signal
import threading
from types import FrameType

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ends the program because of a signal: exit status 130 for Ctrl-C, 143 for SIGTERM, as shells count them.

    Only the process that reports for the run does so. The others exit with 0: Lightning's launcher kills the first
    process when a child fails, which would change its status.
    """

    def __init__(self, signum: int, is_reporting: bool = True) -> None:
        super().__init__(128 + signum if is_reporting else 0)
        self.signum = signum


class StopSignals:
    """Handlers of SIGTERM and Ctrl-C.

    Call `install` once. Between `defer` and `release` the first signal is only stored in `signum`, and training stops
    at the next batch boundary. A second signal ends the program at once, a third one without cleanup.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._num_received = 0
        self._is_deferring = False

    def install(self) -> None:
        """Install the handlers; does nothing outside the main thread, where Python delivers signals."""
        if threading.current_thread() is threading.main_thread():
            for signum in _HANDLED:
                signal.signal(signum, self._receive)

    def defer(self) -> None:
        """Store the next signal instead of ending the program."""
        self._is_deferring = True
        self.install()  # the Trainer has installed a handler of its own

    def release(self) -> None:
        """End the program at the next signal."""
        self._is_deferring = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received > 2:
            os._exit(128 + signum)
        if self._num_received == 1 and self._is_deferring:
            self.signum = signum
            return
        raise Stopped(signum)
