"""Measures speed."""

from xtuner.engine.hooks import ThroughputHook

hook = dict(type=ThroughputHook)
