"""A config on its way to a run: one object that each stage takes and gives back changed.

The stages are ``load.load``, ``override.override``, ``check.check_document``, ``adapt.adapt`` and
``dump.dump``; ``engine/train.py: prepare`` is their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from xtuner.config.source import ConfigSource
from xtuner.config.values import copy_config, own_values, raw_dict


@dataclass(frozen=True)
class ConfigDocument:
    """A config: its source text, its values, and what changed them. Stages do not change it.

    Attributes:
        source: the text, overrides included; empty where the file is plain data (YAML, JSON).
        config: the values; imported names in it are lazy until they are read.
        original: the text of the file, without overrides.
        loaded: the values that ``source`` alone gives.
        overrides: the words of ``--cfg-options``.
        notes: what adapting changed, one line each, for the user.
    """

    source: ConfigSource
    config: Config
    original: ConfigSource
    loaded: Config
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file's path; ``NAME.py`` for a name of the catalogue."""
        return self.source.file

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return Path(self.file).stem

    @property
    def is_python(self) -> bool:
        """Whether the file is Python and not plain data."""
        return self.file.endswith(".py")

    @property
    def raw(self) -> dict[str, Any]:
        """All names of the config, the imported ones too; imported names stay lazy."""
        return raw_dict(self.config)

    @property
    def values(self) -> dict[str, Any]:
        """The keys that the config defines itself; imported names stay lazy."""
        return own_values(self.config)

    def with_text(self, source: ConfigSource, config: Config) -> ConfigDocument:
        """The document with another text, and the values that this text gives."""
        return replace(self, source=source, config=config, loaded=config)

    def editable(self) -> ConfigDocument:
        """The document with a copy of its values, which a stage may change."""
        return replace(self, config=copy_config(self.config))


def document_of(config: Config) -> ConfigDocument:
    """The document of a config that ``load_config`` gave, changed since or not."""
    file = str(config.filename or "config.py")
    source = ConfigSource(config._text if file.endswith(".py") else "", file)
    return ConfigDocument(source, config, original=source, loaded=config)
