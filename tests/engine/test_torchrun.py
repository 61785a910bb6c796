"""The launcher of one machine: what it starts, and the exit status."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.helpers import forked
from xtuner.engine.launch import free_port
from xtuner.engine.torchrun import first_exit_code

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


def launch(tmp_path, code: str, *words: str, status: int = 0) -> forked.Forked:
    (tmp_path / "worker.py").write_text(code)
    command = ["-m", "xtuner.engine.torchrun", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", "-m", "worker", *words]
    return forked.run(*command, status=status, environment={"PYTHONPATH": str(tmp_path)})


@pytest.mark.slow
def test_processes_get_their_ranks_and_the_words(tmp_path):
    done = launch(tmp_path, SHOW, "train", "--seed", "1", "--cfg-options", "a=1")
    words = "['train', '--seed', '1', '--cfg-options', 'a=1']"
    assert sorted(done.stdout.splitlines()) == [f"0 0 2 {words}", f"1 1 2 {words}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(75)", 75), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9)],
)
def test_the_status_is_that_of_the_first_failure(tmp_path, end, status):
    launch(tmp_path, FAIL.format(end=end), status=status)


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
    done = launch(tmp_path, ASKED, str(tmp_path / "ready"))
    assert sorted(done.stdout.split()) == ["0", "1", "saved", "saved"]


FOLLOW = """
import os, pathlib, signal, sys
here = pathlib.Path(__file__).parent
if os.environ["RANK"] == "1":
    (here / "aside").write_text(str(os.getpid()))
    (here / "aside").rename(here / "pid")
    os.kill(os.getpid(), signal.SIGKILL)
while not (here / "pid").exists():
    pass
status = pathlib.Path("/proc", (here / "pid").read_text(), "status")
while status.exists() and "(zombie)" not in status.read_text():
    pass
sys.exit(70)
"""


def test_a_killed_process_is_first_before_those_that_miss_it(tmp_path):
    launch(tmp_path, FOLLOW, status=128 + 9)


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(100, 70), (100, -9)], -9),
        ([(100, -9), (101, 70)], -9),
        ([(100, 3), (131, -9)], 3),  # it did not end when asked to, and the launcher killed it
        ([(100, 2), (102, -15)], 2),
    ],
)
def test_which_failure_was_the_first(failures, code):
    assert first_exit_code(failures) == first_exit_code(failures[::-1]) == code


def test_a_port_that_is_taken_meanwhile_is_one_message(tmp_path):
    (tmp_path / "worker.py").write_text("")
    with socket.create_server(("", 0)) as server:
        command = ["-m", "xtuner.engine.torchrun", "--nproc_per_node=2"]
        command += [f"--master_port={server.getsockname()[1]}", "-m", "worker"]
        refused = forked.run(*command, status=1, environment={"PYTHONPATH": str(tmp_path)})
    assert "error: the processes cannot meet at 127.0.0.1:" in refused.stderr
    assert "EADDRINUSE" in refused.stderr and "Traceback" not in refused.stderr


def test_caches_that_processes_share_are_written_before_they_start(tmp_path):
    code = "from xtuner.engine.torchrun import fill_caches; fill_caches()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=forked.LIMIT)
    assert len(list(tmp_path.rglob("*.pickle"))) == 2
