"""Loading and saving tokenizers so that a folder keeps the files the hub's own code reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import AddedToken

from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import os

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


class HubFiles:
    """Mixin for tokenizers: writes a folder's files back as they were, with what has changed.

    transformers 5 leaves ``add_bos_token`` out of ``tokenizer_config.json``, renames keys that
    earlier versions read, and gives fast tokenizers a ``tokenizer.json``. The hub's own code runs
    on the earlier versions, so ``save_pretrained`` writes the folder's own configuration with the
    chat template, named special tokens and added tokens of now, and no file of another kind.

    Attributes:
        named_tokens: special tokens that the family's code names where the configuration does not.
        code_tokens: tokens beyond the vocabulary file that the family's code adds by itself.
        saved_settings: keyword arguments that are written where they are true.
        writes_names: whether that code reads named special tokens from the configuration.
    """

    _folder: dict[str, Any]
    _folder_code: dict[str, bytes]
    _folder_tokens: dict[int, AddedToken]
    named_tokens: ClassVar[dict[str, str]] = {}
    code_tokens: ClassVar[tuple[str, ...]] = ()
    saved_settings: ClassVar[tuple[str, ...]] = ()
    writes_names: ClassVar[bool] = True

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: dict[str, Any], *args: object, **kwargs: object
    ) -> Any:
        files = dict(resolved_vocab_files)  # transformers takes names out of it
        folder = {
            name: json.loads(Path(files[key]).read_text("utf-8"))
            for name, key in (
                (CONFIG, "tokenizer_config_file"),
                (SPECIAL, "special_tokens_map_file"),
            )
            if files.get(key)
        }
        loader: Any = super()
        tokenizer = loader._from_pretrained(resolved_vocab_files, *args, **kwargs)
        for number, token in folder.get(CONFIG, {}).get("added_tokens_decoder", {}).items():
            if tokenizer.convert_tokens_to_ids(token["content"]) != int(number):
                _refuse(token["content"], number, str(args[0]))
        tokenizer._folder = folder
        tokenizer._folder_code = _code(files, folder.get(CONFIG, {}))
        tokenizer._folder_tokens = dict(tokenizer.added_tokens_decoder)
        return tokenizer

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: object, **kwargs: object
    ) -> tuple[str, ...]:
        """Write the tokenizer's files into a folder; arguments are those of transformers."""
        saver: Any = super()
        files = saver.save_pretrained(save_directory, *args, **kwargs)
        if not hasattr(self, "_folder"):
            return files
        for name, code in self._folder_code.items():
            (Path(save_directory) / name).write_bytes(code)
        contents = {CONFIG: self._config()}
        if SPECIAL in self._folder:
            contents[SPECIAL] = self._folder[SPECIAL] | self._changed_names()
        for name, content in contents.items():
            with written_aside(Path(save_directory) / name) as aside:
                text = json.dumps(content, indent=2, ensure_ascii=False)
                aside.write_text(text + "\n", "utf-8")
        return tuple(dict.fromkeys([*files, *(str(Path(save_directory) / n) for n in contents)]))

    def _config(self: Any) -> dict[str, Any]:
        """What ``tokenizer_config.json`` holds: the folder's, and what has changed since."""
        config = copy.deepcopy(self._folder.get(CONFIG, {}))
        config["tokenizer_class"] = config.get("tokenizer_class") or type(self).__name__
        config |= self._changed_names()
        config |= {name: True for name in self.saved_settings if getattr(self, name)}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        written = config.get("added_tokens_decoder", {})
        new = {
            str(number): token.__getstate__()
            for number, token in self.added_tokens_decoder.items()
            if self._is_new(number, str(token))
        }
        if new:
            config["added_tokens_decoder"] = written | new
        return config

    def _is_new(self: Any, number: int, token: str) -> bool:
        """Whether an added token is neither in the folder's files nor in the family's code."""
        written = self._folder.get(CONFIG, {}).get("added_tokens_decoder", {})
        known = token in self.code_tokens or str(number) in written
        beyond = number >= self.vocab_size and not known
        before = self._folder_tokens.get(number)
        return beyond or repr(self.added_tokens_decoder[number]) != repr(before)

    def _changed_names(self: Any) -> dict[str, str]:
        """Named special tokens that differ from the folder's."""
        if not self.writes_names:
            return {}
        before = self.named_tokens | self._folder.get(CONFIG, {}) | self._folder.get(SPECIAL, {})
        return {
            name: str(token)
            for name, token in self._special_tokens_map.items()
            if token is not None and str(token) != _content(before.get(name))
        }


def _code(files: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The Python files that ``auto_map`` names, to be copied unread.

    Args:
        files: paths of the folder's tokenizer files, by argument name.
        config: its ``tokenizer_config.json``.
    """
    if not config:
        return {}
    folder = Path(files["tokenizer_config_file"]).parent
    classes = (config.get("auto_map") or {}).get("AutoTokenizer") or []
    names = {f"{name.split('.')[0]}.py" for name in classes if name and "--" not in name}
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _content(token: object) -> str | None:
    """The text of a special token as a configuration writes it."""
    if isinstance(token, dict):
        return token.get("content")
    return str(token) if isinstance(token, str | AddedToken) else None


def _refuse(token: str, number: str, folder: str) -> None:
    raise UserError(
        tr(
            "the added token {token!r} should have the id {number}: there is a gap after the "
            "vocabulary.",
            token=token,
            number=number,
        ),
        where=Where(file=f"{folder}/{CONFIG}", key="added_tokens_decoder"),
    )
