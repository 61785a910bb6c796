"""Hooks by their published names, and trackers."""

from __future__ import annotations

import json


def test_tensorboard_by_one_line_of_the_config(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.engine.toy import write_config
    from xtuner.entry_point import main

    extra = """
from mmengine.visualization import TensorboardVisBackend, Visualizer
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
"""
    out = tmp_path / "out"
    config = write_config(tmp_path, extra)
    words = ["--cfg-options", "max_epochs=5", "default_hooks.logger.interval=4"]
    assert main(["train", str(config), "--work-dir", str(out), *words]) == 0
    (events,) = out.glob("*/vis_data/events.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert {"loss", "lr", "grad_norm"} <= set(board.Tags()["scalars"])
    steps = [event.step for event in board.Scalars("loss")]
    assert steps == sorted(steps)
    assert steps[-1] == 40
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 20
