"""SIGTERM, Ctrl-C and a closed terminal: training stops at the next batch boundary, anything else at once.

This module notes the signal; `last_checkpoint` saves and stops. SLURM's requeue signal stays Lightning's, unless it is
SIGHUP.
"""

import contextlib
import os
import signal
import stat
import sys
import threading
from types import FrameType


def stop_signals() -> list[signal.Signals]:
    """Return SIGINT, SIGTERM and, unless `nohup` has it ignored, SIGHUP, which Windows lacks."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class Stopped(SystemExit):
    """Ends the program because of a signal: exit status 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Only the process that reports for the run does so. The others exit with 0: Lightning's launcher kills the first
    process when a child fails, which would change its status.
    """

    def __init__(self, signum: int, is_reporting: bool = True) -> None:
        super().__init__(128 + signum if is_reporting else 0)
        self.signum = signum


class StopSignals:
    """Handlers of SIGTERM, Ctrl-C and SIGHUP.

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
            for signum in stop_signals():
                signal.signal(signum, self._receive)

    def defer(self) -> None:
        """Store the next signal instead of ending the program."""
        self._is_deferring = True
        self.install()  # the Trainer has installed a handler of its own

    def release(self) -> None:
        """End the program at the next signal."""
        self._is_deferring = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        if self._num_received and signum not in (signal.SIGINT, signal.SIGTERM):
            return  # a closed terminal sends SIGHUP twice: by the shell, and by the kernel when the shell has ended
        self._num_received += 1
        if self._num_received > 2:
            os._exit(128 + signum)
        if self._num_received == 1 and self._is_deferring:
            self.signum = signum
            return
        raise Stopped(signum)


def leave_closed_terminal() -> None:
    """Discard what is printed from now on if the terminal is closed: the error would end training unsaved."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # not open
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)
