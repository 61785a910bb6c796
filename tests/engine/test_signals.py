"""Signals before the first optimizer step: an ending with a message, or a checkpoint later."""

import os
import signal
import subprocess
import sys

import pytest

from xtuner.engine.signals import ENDING, SAVING, EndedBySignalError, handled, take_save_request
from xtuner.engine.stop import SAVE, Stop
from xtuner.entry_point import main


@pytest.fixture(autouse=True)
def default_handlers():
    """Those of a process that a shell starts, whatever pytest was started by."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (*ENDING, SAVING)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_train_ends_with_a_message_before_the_first_step(number, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("xtuner.engine.train.train", stopped)
    assert main(["train", "quickstart"]) == 128 + number
    assert capsys.readouterr().err.startswith(f"\n{number.name} was received: ended at once")
    assert signal.getsignal(number) == signal.SIG_DFL


def test_usr1_before_the_training_saves_after_its_first_step(monkeypatch, capfd):
    agreed = []

    def train(*args, **kwargs):
        os.kill(os.getpid(), SAVING)
        stop = Stop()
        stop.install()
        agreed.extend([stop.agreed(), stop.agreed()])
        stop.uninstall()
        os.kill(os.getpid(), SAVING)  # while the model is exported
        return 0

    monkeypatch.setattr("xtuner.engine.train.train", train)
    assert main(["train", "quickstart"]) == 0
    assert agreed == [SAVE, None]
    assert "a checkpoint is written after the next optimizer step" in capfd.readouterr().err
    with handled():
        assert not take_save_request()  # of the command before


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handled():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_signal_does_not_wait_for_python():
    with handled(), pytest.raises(EndedBySignalError):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_process_that_was_forked_for_data_ends_as_ever():
    with handled():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_the_handlers_come_before_anything_heavy():
    code = "import sys, xtuner.tools.train, xtuner.engine.signals; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
