"""SIGTERM and Ctrl-C: inside training they wait for the next batch boundary, elsewhere they end the program at once.

SLURM's requeue signal stays Lightning's.
"""

import os
import signal
import threading
from types import FrameType

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ends the program because of a signal: exit status 130 for Ctrl-C, 143 for SIGTERM, as shells count them.

    Args:
        signum: The signal.
        is_reporting: Whether this process speaks for the run. The others exit with 0: Lightning's launcher kills a
            first process whose children have failed, which would then have another status.
    """

    def __init__(self, signum: int, is_reporting: bool = True) -> None:
        super().__init__(128 + signum if is_reporting else 0)
        self.signum = signum


class StopSignals:
    """What was asked of this process by signals.

    `install` once; between `defer` and `release` the first signal is only noted, in `signum`, and whoever trains ends
    at the next batch boundary. A second one ends the program there and then, a third one without any clearing up.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._num_received = 0
        self._is_deferring = False

    def install(self) -> None:
        """Take the signals over; does nothing outside the main thread, where Python delivers them."""
        if threading.current_thread() is threading.main_thread():
            for signum in _HANDLED:
                signal.signal(signum, self._receive)

    def defer(self) -> None:
        """Note the next signal instead of ending the program."""
        self._is_deferring = True
        self.install()  # the Trainer has put a handler of its own before ours

    def release(self) -> None:
        """End the program at a signal again."""
        self._is_deferring = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received > 2:
            os._exit(128 + signum)
        if self._num_received == 1 and self._is_deferring:
            self.signum = signum
            return
        raise Stopped(signum)
