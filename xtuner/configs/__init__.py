"""The catalogue: which configs there are, and the text of each. Standard library only.

``names()`` lists the curated names; ``render(name)`` writes the config of any name that makes sense
(see ``names.py``); ``describe(name)`` says what it trains; ``cfgs_name_path`` maps each name to the
path of a file.
"""

from __future__ import annotations

from xtuner.configs.catalogue import cfgs_name_path, deepspeed_path, describe, names, render
from xtuner.configs.unknown import UnknownConfig

__all__ = ["UnknownConfig", "cfgs_name_path", "deepspeed_path", "describe", "names", "render"]
