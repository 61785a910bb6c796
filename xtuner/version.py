"""The version of this package, the one place that holds it."""

__version__ = "1.0.0.dev0"
version_info = tuple(int(part) if part.isdigit() else part for part in __version__.split("."))
short_version = __version__
