"""Processes that Slurm or Open MPI started find each other by the variables these set."""

import pytest

from tests.equivalence.runs import ROOT
from tests.helpers.forked import Forked, wait_together
from tests.helpers.tiny import save_tiny
from xtuner.engine.launch import free_port

CONFIG = ROOT / "tests" / "equivalence" / "scale_config.py"
NAMES = {
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", NAMES)
def test_two_tasks_train_together(tmp_path, launcher):
    save_tiny(tmp_path / "base")
    port = str(free_port())
    options = [f"base={str(tmp_path / 'base')!r}", "accumulative_counts=2", "steps=2"]
    words = ["-m", "xtuner", "train", CONFIG, "--launcher", launcher, "--work-dir"]
    words += [tmp_path / "out", "--cfg-options", *options]
    tasks = []
    for rank in range(2):
        told = dict(zip(NAMES[launcher], (str(rank), "2", str(rank)), strict=True))
        told["MASTER_PORT"] = port
        tasks.append(Forked(*words, environment=told))
    wait_together(tasks)
    printed = [task.stdout + task.stderr for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert "2 x CPU, DDP" in printed[0] and "step 2/2" in printed[0]
    assert "step 2/2" not in printed[1]
