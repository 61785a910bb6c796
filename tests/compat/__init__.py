"""Configs of the published XTuner v0.1.23, as test data: they load, fit and can be overridden."""
