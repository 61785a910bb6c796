"""The version of this package, the one place that holds it."""

__version__ = "0.2.0"
version_info = tuple(int(part) for part in __version__.split("."))
short_version = __version__
