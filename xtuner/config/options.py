"""Reading ``--cfg-options``: keys (full or short) and values; nothing in them is run."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.config.document import ConfigDocument
from xtuner.config.sections import SECTIONS, known_keys
from xtuner.config.signatures import parameters_of
from xtuner.config.values import has_key, is_number, item_of, iter_keys, value_at
from xtuner.utils.argument_parser import OTHER_NAMES
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

BASE_MODEL_NAMES = ("pretrained_model_name_or_path", "llm_name_or_path", "path")
BASE_MODEL_KEYS = (
    "model.llm.pretrained_model_name_or_path",
    "model.pretrained_model_name_or_path",
    "model.model_path",
    "tokenizer.pretrained_model_name_or_path",
)
WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Option:
    """One override.

    Attributes:
        typed: the key as it was typed.
        paths: the full keys that it stands for, split at their dots.
        code: the value as Python.
        value: the value; None where ``is_code``, since names are known only in the loaded config.
        is_code: whether ``code`` has names in it.
    """

    typed: str
    paths: tuple[tuple[str, ...], ...]
    code: str
    value: Any
    is_code: bool


def parse_options(words: Sequence[str], document: ConfigDocument) -> list[Option]:
    """Read ``key=value`` words for a loaded config.

    Raises:
        UserError: with all words that are malformed or name no key of the config.
    """
    options, wrong = [], []
    for word in words:
        try:
            options.append(_parse(word, document))
        except UserError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise UserError("\n".join(["--cfg-options:", *(f"  {error}" for error in wrong)]))
    return options


def _parse(word: str, document: ConfigDocument) -> Option:
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(
            tr("--cfg-options: {word!r} is not KEY=VALUE", word=word),
            hint="--cfg-options lr=1e-5 optim_wrapper.optimizer.weight_decay=0.1",
        )
    paths = _full_keys(key, document)
    for path in paths:
        _refuse_unknown(key, path, document)
        _refuse_setting_of_base(key, path, document)
    code, value, is_code = read_value(text, document.source.imported())
    current = [value_at(document.raw, path) for path in paths if has_key(document.raw, path)]
    is_text = len(current) == len(paths) and all(isinstance(each, str) for each in current)
    if is_number(value) and is_text:
        code, value = repr(text), text  # a name made of digits stays a name
    if isinstance(value, str) and not is_code:
        for path in paths:
            _refuse_text_for_number(key, path, value, document)
    return Option(key, tuple(paths), code, value, is_code)


def _full_keys(key: str, document: ConfigDocument) -> list[tuple[str, ...]]:
    """The keys that a key stands for: itself, or those of a short key."""
    path = tuple(key.split("."))
    if key == "model.pretrained":
        settings = [n for n in BASE_MODEL_NAMES if isinstance(item_of(document.raw, n), str)]
        if settings:
            return [(settings[0],)]
        keys = [tuple(each.split(".")) for each in BASE_MODEL_KEYS]
        return [each for each in keys if has_key(document.raw, each)] or keys[:1]
    if path[0] == "optimizer" and len(path) > 1 and "optimizer" not in document.raw:
        path = ("optim_wrapper", "optimizer", *path[1:])
        span = document.source.find(path)
        if span and not span.rest and isinstance(span.node, ast.Name):
            name = span.node.id
            return [(name,)] if document.source.assignments(name) else [path]
    return [path]


def _refuse_unknown(key: str, path: tuple[str, ...], document: ConfigDocument) -> None:
    """Raise unless the config has the key, or what reads the dict around it takes it."""
    holder: Any = document.raw
    for depth, part in enumerate(path):
        if not has_key(holder, [part]):
            if _may_be_new(path[: depth + 1], holder):
                return
            raise _unknown(key, path[: depth + 1], holder, document)
        inner = item_of(holder, part)
        if depth + 1 < len(path) and not isinstance(inner, dict | list | tuple):
            if inner is None:  # `lora = None` may become a dict
                return
            raise UserError(
                tr(
                    "--cfg-options {key}: '{path_key}' is {inner!r}; there is nothing inside it",
                    key=key,
                    path_key=".".join(path[: depth + 1]),
                    inner=inner,
                ),
                where=Where(document.file, key=key),
            )
        holder = inner


def _refuse_setting_of_base(key: str, path: tuple[str, ...], document: ConfigDocument) -> None:
    """Refuse a setting of a base config: what the base computed from it would not change."""
    in_file = document.source.assignments(path[0]) or not document.source.text
    if len(path) > 1 or in_file or path[0] not in document.raw or path[0] in SECTIONS:
        return
    ends = [name for name in iter_keys(document.raw) if name.endswith(f".{path[0]}")]
    listed = " / ".join(f"'{name}'" for name in ends[:3])
    raise UserError(
        tr(
            "--cfg-options: '{key}' is set in a base of this config, where overriding it "
            "would reach nothing",
            key=key,
        ),
        hint=tr("override {listed}.", listed=listed or tr("the final key")),
        where=Where(document.file),
    )


def _may_be_new(path: tuple[str, ...], holder: object) -> bool:
    """Whether a dict may get a key that it does not have."""
    if len(path) == 1:
        return path[0] in SECTIONS
    if not isinstance(holder, dict):
        return False
    kind = dict.get(holder, "type")
    if kind is None:
        known = known_keys(path[:-1])
        if known is not None:
            return path[-1] in known
        near = difflib.get_close_matches(path[-1], map(str, holder), n=1, cutoff=0.8)
        return path[0] in SECTIONS and not near
    parameters = parameters_of(kind)
    return parameters is None or parameters.takes(path[-1])


def _unknown(
    key: str, path: tuple[str, ...], holder: object, document: ConfigDocument
) -> UserError:
    nearest = suggest(key, path, holder, document.raw)
    return UserError(
        tr("--cfg-options: there is no key '{key}' in this config", key=key),
        hint=tr("did you mean {nearest}?", nearest=nearest)
        if nearest
        else tr("'xtuner print-cfg {file}' shows all keys.", file=document.file),
        where=Where(document.file),
    )


def suggest(key: str, path: tuple[str, ...], holder: object, config: dict[str, Any]) -> str:
    """The existing key or keys that are nearest to an unknown one.

    Args:
        key: the key as it was typed.
        path: its parts up to the first one that does not exist.
        holder: the dict or list that lacks ``path[-1]``.
        config: the whole config.

    Returns:
        The keys in quotes; '' when nothing is near.
    """
    other = OTHER_NAMES.get(path[-1])
    if other and has_key(config, other.split(".")[:1]):
        return f"'{other}'"
    if isinstance(holder, list | tuple):
        return f"'{'.'.join(path[:-1])}.0' ... '{'.'.join(path[:-1])}.{len(holder) - 1}'"
    names = list(dict.keys(holder)) if isinstance(holder, dict) else []
    beside = [name for name in names if isinstance(name, str) and name != "type"]
    near = difflib.get_close_matches(path[-1], beside, n=1, cutoff=0.6)
    if near:
        return f"'{'.'.join([*path[:-1], near[0], *key.split('.')[len(path) :]])}'"
    ends = [name for name in iter_keys(config) if name.rpartition(".")[2] == path[-1]]
    return " / ".join(f"'{name}'" for name in ends[:2])


def _refuse_text_for_number(
    key: str, path: tuple[str, ...], text: str, document: ConfigDocument
) -> None:
    """Refuse text where the config has a number: a typing error such as ``lr=le-5``."""
    current = value_at(document.raw, path) if has_key(document.raw, path) else None
    if is_number(current):
        raise UserError(
            tr(
                "--cfg-options {key}: expected a number like {current!r}, got {value!r}",
                key=key,
                current=current,
                value=text,
            ),
            where=Where(document.file, key=".".join(path)),
        )


def read_value(text: str, imported: set[str]) -> tuple[str, Any, bool]:
    """Read the right side of ``key=value``.

    Args:
        text: a Python literal, ``true``/``null`` and the like, a name that the config imports
            (``torch.bfloat16``), a list or dict of these, or else plain text.
        imported: the names that the config imports.

    Returns:
        The value as Python; the value itself (None where it has names in it); whether it has.
    """
    if text.lower() in WORDS:
        value = WORDS[text.lower()]
        return repr(value), value, False
    try:
        node = ast.parse(text.strip(), mode="eval").body
        code = _safe(node, imported)
    except (SyntaxError, ValueError):
        return repr(text), text, False
    try:
        return code, ast.literal_eval(code), False
    except ValueError:
        return code, None, True


def _safe(node: ast.expr, imported: set[str]) -> str:
    """The expression as Python again; it may hold literals and imported names only.

    Raises:
        ValueError: when it holds anything else.
    """
    if isinstance(node, ast.Constant):
        return ast.unparse(node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return ast.unparse(node) if isinstance(node.operand, ast.Constant) else _refuse()
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [_safe(item, imported) for item in node.elts]
        return ast.unparse(node) if not items else _brackets(node, items)
    if isinstance(node, ast.Dict):
        keys = [_safe(key, imported) if key else _refuse() for key in node.keys]
        values = [_safe(value, imported) for value in node.values]
        return "{" + ", ".join(f"{k}: {v}" for k, v in zip(keys, values, strict=True)) + "}"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        words = [(word.arg or _refuse(), _safe(word.value, imported)) for word in node.keywords]
        return "{" + ", ".join(f"{name!r}: {value}" for name, value in words) + "}"
    return _name(node, imported)


def _brackets(node: ast.List | ast.Tuple | ast.Set, items: list[str]) -> str:
    inside = ", ".join(items)
    if isinstance(node, ast.List):
        return f"[{inside}]"
    if isinstance(node, ast.Set):
        return f"{{{inside}}}"
    return f"({inside},)" if len(items) == 1 else f"({inside})"


def _name(node: ast.expr, imported: set[str]) -> str:
    text, root = ast.unparse(node), node
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return _refuse()
    if root.id in imported:
        return text
    if root.id == "torch" and text.count(".") == 1:  # every loader takes a dtype by its name
        return repr(text.partition(".")[2])
    if text.lower() in WORDS:
        return repr(WORDS[text.lower()])
    return repr(text)


def _refuse() -> str:
    raise ValueError("not a value")
