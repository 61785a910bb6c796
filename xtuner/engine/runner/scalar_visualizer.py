"""mmengine's visualizer for numbers only: without a canvas, which takes over a second."""

from __future__ import annotations

from pathlib import Path

from mmengine.utils import ManagerMixin
from mmengine.visualization import LocalVisBackend, Visualizer


class ScalarVisualizer(Visualizer):
    """Writes the logged numbers to ``<save_dir>/vis_data/scalars.json``, as mmengine's default.

    Args:
        name: the run's name.
        save_dir: the folder of the run's logs.
    """

    def __init__(self, name: str, save_dir: str) -> None:
        ManagerMixin.__init__(self, name)  # Visualizer's own makes matplotlib figures
        self._dataset_meta = None
        folder = str(Path(save_dir) / "vis_data")
        self._vis_backends = {"LocalVisBackend": LocalVisBackend(save_dir=folder)}
