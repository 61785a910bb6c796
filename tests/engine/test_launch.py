"""From the environment to torchrun."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.toy import write_config
from xtuner.engine import launch
from xtuner.engine.launch import become_torchrun, read_layout
from xtuner.entry_point import main
from xtuner.utils import cpu
from xtuner.utils.errors import UserError


def test_one_process_is_no_layout():
    assert read_layout({}) is None
    assert read_layout({"NPROC_PER_NODE": "1", "NNODES": "1"}) is None
    assert read_layout({"NPROC_PER_NODE": "2", "LOCAL_RANK": "0"}) is None  # torchrun's child


def test_the_forms_of_the_guides():
    layout = read_layout(
        {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "PORT": "29600", "ADDR": "h"}
    )
    assert layout.command(["train", "c.py"]) == [
        *("-m", "xtuner.engine.torchrun", "--nnodes=2", "--node_rank=1", "--nproc_per_node=8"),
        *("--master_addr=h", "--master_port=29600", "-m", "xtuner", "train", "c.py"),
    ]


def test_without_a_port_one_is_taken_on_which_nothing_listens():
    for _ in range(20):
        with socket.create_server(("127.0.0.1", read_layout({"NPROC_PER_NODE": "2"}).port)):
            pass


def test_mistakes_are_named():
    with pytest.raises(UserError, match="NPROC_PER_NODE=two"):
        read_layout({"NPROC_PER_NODE": "two"})
    with pytest.raises(UserError, match="PORT"):
        read_layout({"NNODES": "2"})
    with pytest.raises(UserError, match="NODE_RANK=2 with NNODES=2"):
        read_layout({"NNODES": "2", "NODE_RANK": "2", "PORT": "29500"})
    with pytest.raises(UserError, match="PORT=80000"):
        read_layout({"NPROC_PER_NODE": "2", "PORT": "80000"})


def test_a_port_in_use_is_named_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("torchrun is started"))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for processes in ({"NPROC_PER_NODE": "2"}, {"NNODES": "2"}):
            layout = read_layout({**processes, "PORT": str(port)})
            with pytest.raises(UserError, match=f"port {port} cannot be used: Address already"):
                become_torchrun(layout, ["train", "c.py"])


@pytest.fixture
def unresolved(monkeypatch) -> None:
    """Names are not found, without a question to a name server."""

    def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("torchrun is started"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_address_that_is_none_is_named_before_anything_is_started(unresolved, rank):
    layout = {"NNODES": "2", "NODE_RANK": rank, "PORT": str(launch.free_port()), "ADDR": "nohost"}
    with pytest.raises(UserError, match="ADDR=nohost is not the address of a machine: Name or"):
        become_torchrun(read_layout(layout), ["train", "c.py"])


@pytest.mark.parametrize("address", ["a" * 70, "a..b"])
def test_an_address_that_cannot_be_a_name_is_refused(address):
    with pytest.raises(UserError, match="is not the address of a machine"):
        launch.require_address("ADDR", address)
    launch.require_address("ADDR", "127.0.0.1")
    launch.require_address("ADDR", "::1")


@pytest.mark.parametrize("name", ["MASTER_ADDR", "ADDR"])
@pytest.mark.parametrize("launcher", ["slurm", "mpi", "pytorch"])
@pytest.mark.parametrize("command", ["train", "test"])
def test_so_it_is_under_other_launchers(unresolved, monkeypatch, command, launcher, name, capsys):
    monkeypatch.setenv(name, "nohost")
    assert main([command, "quickstart", "--launcher", launcher]) == 1
    said = capsys.readouterr().err
    assert f"{name}=nohost is not the address" in said and "NODE_RANK=0" in said


def test_a_name_that_is_published_late_is_waited_for_on_the_other_machines(monkeypatch):
    answers = [socket.gaierror(-2, "not known"), socket.gaierror(-3, "again"), []]

    def resolve(*_: object) -> list[object]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(launch.time, "sleep", lambda _: None)
    launch.require_address("ADDR", "first", launch.PATIENCE)
    assert not answers


@pytest.mark.parametrize(("given", "threads"), [(None, "4"), ("3", "3")])
def test_processes_share_the_cores_of_their_machine(monkeypatch, given, threads):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(cpu, "usable_cores", lambda: 8)
    started = []
    monkeypatch.setattr(os, "execv", lambda *_: started.append(os.environ["OMP_NUM_THREADS"]))
    become_torchrun(read_layout({"NPROC_PER_NODE": "2"}), ["train", "c.py"])
    assert started == [threads]


def test_dist_train_starts_the_processes_and_hands_on_their_status(tmp_path):
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "xtuner", "dist_train", str(config), "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    good = subprocess.run(
        [*command, "--work-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert good.returncode == 0, good.stdout + good.stderr
    assert "2 x CPU" in good.stdout
    assert "2 optimizer steps, 4 micro-batches" in good.stdout  # 8 rows, 2 processes, 2 each
    assert (tmp_path / "out" / "iter_4.pth").exists()


@pytest.mark.slow
def test_the_status_and_the_message_of_the_process_that_failed_are_the_last_word(tmp_path):
    config = write_config(tmp_path)
    words = ["dist_train", str(config), "2", "--work-dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    failed = subprocess.run(
        [sys.executable, "-m", "xtuner", *words, "--resume", str(tmp_path / "none.pth")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert failed.returncode == 1
    assert "there is no such checkpoint" in failed.stderr
    assert not re.search(r"^[WE]\d{4} ", failed.stderr, re.MULTILINE)  # of torch's logger
    assert "Traceback" not in failed.stderr
    assert "ChildFailedError" not in failed.stderr
