"""A process of several ends with its status, whatever C++ does at its end."""

import os
import subprocess
import sys

from tests.helpers.forked import LIMIT

SCRIPT = """
import atexit, ctypes, sys
import xtuner, xtuner.entry_point

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # what torch's threads do to a process now and then
atexit.register(print, "said good-bye")
xtuner.entry_point.main = lambda: 3
xtuner.cli()
"""


def ended(**environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_a_rank_ends_with_its_status():
    run = ended(RANK="1")
    assert run.returncode == 3
    assert run.stdout == "said good-bye\n"


def test_the_script_does_abort_otherwise():
    assert ended().returncode < 0
