"""Several ``xtuner train`` one after the other in the ranks of one group: imports cost once.

``python -m tests.equivalence.train_worker RUNS.json`` with a list of the words of each run.
"""

import json
import sys
from pathlib import Path

import torch


def run_all(runs: list[list[str]]) -> int:
    """Run them; give the first status that is not 0."""
    from xtuner.entry_point import main
    from xtuner.parallel import processes

    torch.set_num_threads(1)
    # The next run joins no group again; DeepSpeed holds on to the groups of the first.
    processes.shutdown_distributed = lambda: None
    for words in runs:
        status = main(["train", *words, "--launcher", "pytorch"])
        if status:
            return status
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
