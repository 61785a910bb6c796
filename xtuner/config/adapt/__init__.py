"""Changing a loaded config for this machine: precision, validation, strategy."""
