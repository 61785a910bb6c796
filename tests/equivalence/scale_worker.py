"""Several ``xtuner train`` one after the other in the processes of one torchrun: imports cost once.

``python -m xtuner.engine.torchrun --nproc_per_node=2 -m tests.equivalence.scale_worker RUNS.json``
with a list of ``{"words": [...], "environment": {...}}``.
"""

import json
import os
import sys
from pathlib import Path


def run_all(runs: list[dict]) -> int:
    """Run them; give the first status that is not 0."""
    from xtuner.entry_point import main

    for run in runs:
        os.environ.update(run["environment"])
        status = main(["train", *run["words"], "--launcher", "pytorch"])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
