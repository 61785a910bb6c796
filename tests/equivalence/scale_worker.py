"""Several ``xtuner train`` one after the other in the processes of one torchrun: imports cost once.

``python -m xtuner.engine.torchrun --nproc_per_node=2 -m tests.equivalence.scale_worker RUNS.json``
with a list of the words of each run.
"""

import json
import sys
from pathlib import Path

import torch


def run_all(runs: list[list[str]]) -> int:
    """Run them; give the first status that is not 0."""
    from xtuner.entry_point import main
    from xtuner.parallel import processes

    processes.shutdown_distributed = lambda: None  # the next run joins no group again
    for words in runs:
        status = main(["train", *words, "--launcher", "pytorch"])
        if status:
            return status
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
