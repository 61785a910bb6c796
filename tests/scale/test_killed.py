"""One of two processes dies: all end, and the run continues from its last whole checkpoint."""

import contextlib
import signal

import psutil
import pytest

from tests.equivalence.runs import ROOT, start
from tests.helpers.forked import LIMIT, wait_for
from tests.helpers.tiny import save_tiny
from xtuner.checkpoint.checkpoint import find_latest, load_checkpoint

CONFIG = ROOT / "tests" / "equivalence" / "scale_config.py"


def rank_of(process: psutil.Process) -> str | None:
    """The rank of a process; None for one that has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--fsdp"], ["--deepspeed", "deepspeed_zero2"]], ids=" ".join)
def test_a_killed_process_ends_all(tmp_path, way):
    save_tiny(tmp_path / "base")
    folder = tmp_path / "run"
    options = [f"base={str(tmp_path / 'base')!r}", "accumulative_counts=2"]
    options.append("default_hooks.checkpoint.interval=10")
    words = [*way, "--cfg-options", *options]
    run = start(CONFIG, folder, *words, "train_cfg.max_iters=100000", processes=2)
    processes = []
    try:
        wait_for((folder / "iter_20.pth.json").exists, run)
        processes = psutil.Process(run.pid).children(recursive=True)
        (second,) = [each for each in processes if rank_of(each) == "1"]
        second.send_signal(signal.SIGKILL)
        printed, _ = run.communicate(timeout=LIMIT)
        assert run.returncode == 128 + signal.SIGKILL, printed
        assert not psutil.wait_procs(processes, timeout=LIMIT)[1]
    finally:
        run.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    newest = find_latest(folder)
    done = load_checkpoint(newest)["meta"]["iter"]
    again = start(
        CONFIG, folder, *words, f"train_cfg.max_iters={done + 4}", "--resume", processes=2
    )
    printed, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, printed
    assert f"{done} of {done + 4} iterations are done" in printed
    assert find_latest(folder).name == f"iter_{done + 4}.pth"
