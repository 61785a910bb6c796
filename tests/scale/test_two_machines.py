"""Two machines, as two network namespaces that a cable (veth) joins, train together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.equivalence.runs import ROOT
from tests.helpers.forked import LIMIT, wait_for
from tests.helpers.tiny import save_tiny
from xtuner.checkpoint.checkpoint import load_state_dict

CONFIG = ROOT / "tests" / "equivalence" / "scale_config.py"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def possible() -> bool:
    """Whether namespaces can be made here, joined, and run in."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"xtprobe{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "one", "type", "veth", "peer", "two")
        ip("netns", "exec", name, "true")
    except subprocess.CalledProcessError:
        return False
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root and network namespaces (iproute2)"),
]


class Machines:
    """Two namespaces, each with its own addresses and ports, and the processes in them."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"xt{os.getpid()}a", f"xt{os.getpid()}b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.port = "29500"
        self.folder = folder
        self.runs: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", "down")

    def remove(self) -> None:
        for run in self.runs:
            if run.poll() is None:
                os.killpg(run.pid, 9)
                run.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, *options: str, **environment: str) -> None:
        """``xtuner dist_train`` of one process on each machine, as the guides have it."""
        for rank, name in enumerate(self.names):
            settings = {
                "NNODES": "2",
                "NODE_RANK": str(rank),
                "ADDR": self.addresses[0],
                "PORT": self.port,
                "GLOO_SOCKET_IFNAME": "eth0",
                "PYTHONPATH": str(ROOT),
                **environment,
            }
            words = ["-m", "xtuner", "dist_train", str(CONFIG), "1"]
            # A folder that both see, as on a cluster.
            words += ["--work-dir", str(self.folder / "out"), "--cfg-options"]
            words += [f"base={str(self.folder / 'base')!r}", "accumulative_counts=2", *options]
            log = (self.folder / f"{name}.log").open("w")
            self.runs.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, *words],
                    env=os.environ | settings,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def printed(self, machine: int) -> str:
        return (self.folder / f"{self.names[machine]}.log").read_text("utf-8")


@pytest.fixture
def machines(tmp_path):
    made = Machines(tmp_path)
    try:
        made.build()
        save_tiny(tmp_path / "base")
        yield made
    finally:
        made.remove()


def test_they_train_together(machines):
    machines.start()
    for number, run in enumerate(machines.runs):
        assert run.wait(timeout=LIMIT) == 0, machines.printed(number)
    first, second = machines.printed(0), machines.printed(1)
    assert "NODE_RANK=1" in first  # what to type on the other machine
    assert f"ADDR={machines.addresses[0]} PORT={machines.port} xtuner train" in first
    assert "2 x CPU" in first
    assert "step 10/10" in first
    assert "step 10/10" not in second  # one of the two tells
    assert load_state_dict(machines.folder / "out" / "iter_20.pth")


def test_a_cut_link_ends_both_with_a_message(machines):
    machines.start("train_cfg.max_iters=1000000", XTUNER_LINK_TIMEOUT="4")
    wait_for(lambda: "step " in machines.printed(0), machines.runs[0])
    machines.cut()
    for number, run in enumerate(machines.runs):
        assert run.wait(timeout=LIMIT) == 75, machines.printed(number)
        assert "has heard nothing from" in machines.printed(number)
        assert "--resume" in machines.printed(number)
