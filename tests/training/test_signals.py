"""Signals, sent to this very process."""

import os
import signal
import subprocess
import sys

import pytest

from cifar_lightning.training.signals import Stopped, StopSignals

if sys.platform == "win32":
    pytest.skip("signals of POSIX", allow_module_level=True)
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def signals():
    before = [signal.getsignal(signum) for signum in ALL]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    signals = StopSignals()
    signals.install()
    yield signals
    for signum, handler in zip(ALL, before, strict=True):
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
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


def test_a_closed_terminal_is_ignored_under_nohup(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.defer()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_terminal_may_hang_up_twice(signals):
    signals.defer()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signals.signum == signal.SIGHUP
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_third_one_ends_the_program_without_clearing_up():
    code = """
import os, signal
from cifar_lightning.training.signals import Stopped, StopSignals
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


def test_a_worker_leaves_the_signals_of_its_group_to_its_parent_and_ends_when_that_says_so():
    code = """
import os, signal, sys
from cifar_lightning.data.loaders import leave_signals_to_parent
from cifar_lightning.training.signals import StopSignals
os.setpgrp()
StopSignals().defer()
request, reply = os.pipe(), os.pipe()
worker = os.fork()
if worker == 0:
    leave_signals_to_parent(0)
    print("ready", flush=True)
    while True:
        os.write(reply[1], os.read(request[0], 1))
os.close(reply[1])
sys.stdin.readline()
os.killpg(0, signal.SIGTERM)
for _ in range(2):  # the worker is in its loop, after any signal
    os.write(request[1], b"x")
    assert os.read(reply[0], 1) == b"x"
assert os.waitpid(worker, os.WNOHANG) == (0, 0)
os.kill(worker, signal.SIGTERM)
assert os.waitpid(worker, 0)[1] == signal.SIGTERM
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.communicate("go\n", timeout=60)
    assert process.returncode == 0
