"""Signals, sent to this very process."""

import os
import signal
import subprocess
import sys

import pytest

from cifar_lightning.signals import Stopped, StopSignals, ignore_in_worker

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def signals():
    before = [signal.getsignal(signum) for signum in BOTH]
    signals = StopSignals()
    signals.install()
    yield signals
    for signum, handler in zip(BOTH, before, strict=True):
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_training_a_signal_ends_the_program_at_once(signals, signum, status):
    with pytest.raises(Stopped) as ended:
        os.kill(os.getpid(), signum)
    assert ended.value.code == status


def test_inside_training_the_first_is_noted_and_the_second_ends_the_program(signals):
    signals.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.signum == signal.SIGTERM
    with pytest.raises(Stopped) as ended:
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.code == 130


def test_after_training_a_signal_ends_the_program_again(signals):
    signals.defer()
    signals.release()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGINT)


def test_deferring_takes_the_signals_back_from_whoever_took_them(signals):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.signum == signal.SIGTERM


def test_a_third_one_ends_the_program_without_clearing_up():
    code = """
import os, signal
from cifar_lightning.signals import Stopped, StopSignals
signals = StopSignals()
signals.defer()
try:
    for _ in range(3):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Stopped:
            pass
finally:
    print("cleared up")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (130, b"")


def test_processes_that_do_not_speak_for_the_run_end_well():
    assert Stopped(signal.SIGTERM, is_reporting=False).code == 0


def test_a_worker_leaves_the_signals_of_its_group_to_its_parent(signals):
    ignore_in_worker(0)
    for signum in BOTH:
        os.kill(os.getpid(), signum)
