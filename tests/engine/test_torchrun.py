"""The launcher of one machine: what it starts, and the exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = """
import os, sys
said = [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] + [str(sys.argv[1:])]
sys.stdout.write(" ".join(said) + "\\n")
"""
FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {end}
time.sleep(500)
"""


def run(tmp_path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "worker.py").write_text(code)
    command = [sys.executable, "-m", "xtuner.engine.torchrun", "--nproc_per_node=2"]
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "worker", *words], capture_output=True, text=True, env=environment
    )


def test_processes_get_their_ranks_and_the_words(tmp_path):
    done = run(tmp_path, SHOW, "train", "--seed", "1", "--cfg-options", "a=1")
    assert done.returncode == 0, done.stderr
    words = "['train', '--seed', '1', '--cfg-options', 'a=1']"
    assert sorted(done.stdout.splitlines()) == [f"0 0 2 {words}", f"1 1 2 {words}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(75)", 75), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9)],
)
def test_the_status_is_that_of_the_first_failure(tmp_path, end, status):
    assert run(tmp_path, FAIL.format(end=end)).returncode == status


ASKED = """
import os, pathlib, signal, sys, time
ready = pathlib.Path(sys.argv[1])
def save(*_):
    sys.stdout.write("saved " + os.environ["RANK"] + "\\n")
    sys.exit()
signal.signal(signal.SIGUSR1, save)
if os.environ["RANK"] == "0":
    ready.touch()
else:
    while not ready.exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(500)
"""


def test_usr1_reaches_every_process_and_spares_the_launcher(tmp_path):
    done = run(tmp_path, ASKED, str(tmp_path / "ready"))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "saved", "saved"]
