"""Configs: loaded by name or path with overrides that reach, and written out again.

The front of ``config_load.py`` (reading, overriding) and ``config_dump.py`` (writing).
"""

from xtuner.engine.config_dump import dump_config
from xtuner.engine.config_load import load_config

__all__ = ["dump_config", "load_config"]
