"""The words of ``--cfg-options``: keys (long or short) and values; nothing in them is run."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.config.sections import SECTIONS, known_keys
from xtuner.config.source import Source, value_at
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

# Names that other tools use for our settings: only ever suggested, never accepted.
ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "epochs": "max_epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulative_counts",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "model_name_or_path": "pretrained_model_name_or_path",
    "output_dir": "work_dir",
    "max_grad_norm": "max_norm",
    "seed": "randomness.seed",
}
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
    """One override: the key as typed, the keys it stands for, and the value as Python."""

    typed: str
    paths: tuple[tuple[str, ...], ...]
    code: str
    value: Any  # None together with is_code: known only once the config is loaded
    is_code: bool


def parse_options(words: Sequence[str], source: Source, config: dict[str, Any]) -> list[Option]:
    """Read ``key=value`` words against a loaded config.

    Raises:
        UserError: with all words that are malformed or name no key of the config.
    """
    options, wrong = [], []
    for word in words:
        try:
            options.append(_parse(word, source, config))
        except UserError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise UserError("\n".join(["--cfg-options:", *(f"  {error}" for error in wrong)]))
    return options


def _parse(word: str, source: Source, config: dict[str, Any]) -> Option:
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(
            tr("--cfg-options: {word!r} is not KEY=VALUE", word=word),
            hint="--cfg-options lr=1e-5 optim_wrapper.optimizer.weight_decay=0.1",
        )
    paths = _long_keys(key, source, config)
    for path in paths:
        _refuse_unknown(key, path, source, config)
        _refuse_setting_of_base(key, path, source, config)
    code, value, is_code = read_value(text, source.imported())
    if _is_number(value) and all(isinstance(_current(config, path), str) for path in paths):
        code, value = repr(text), text  # a name made of digits stays a name
    for path in paths:
        _refuse_wrong_kind(key, path, value, is_code, config, source)
    return Option(key, tuple(paths), code, value, is_code)


def _long_keys(key: str, source: Source, config: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a key stands for: itself, or the places that a short key means."""
    path = tuple(key.split("."))
    if key == "model.pretrained":
        names = [name for name in BASE_MODEL_NAMES if _is_path_setting(config, name)]
        if names:
            return [(names[0],)]
        return [tuple(k.split(".")) for k in BASE_MODEL_KEYS if _has(config, k.split("."))] or [
            ("model", "llm", "pretrained_model_name_or_path")
        ]
    if path[0] == "optimizer" and len(path) > 1 and "optimizer" not in config:
        path = ("optim_wrapper", "optimizer", *path[1:])
        site = source.find(path)
        if site and not site.rest and isinstance(site.node, ast.Name):
            name = site.node.id
            return [(name,)] if source.assignments(name) else [path]
    return [path]


def _is_path_setting(config: dict[str, Any], name: str) -> bool:
    return isinstance(dict.get(config, name), str)


def _has(config: dict[str, Any], path: Sequence[str]) -> bool:
    try:
        value_at(config, path)
    except KeyError:
        return False
    return True


def _current(config: dict[str, Any], path: Sequence[str]) -> Any:
    return value_at(config, path) if _has(config, path) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_unknown(
    key: str, path: tuple[str, ...], source: Source, config: dict[str, Any]
) -> None:
    """Raise unless the key is there or whatever reads the dict around it takes it."""
    holder: Any = config
    for depth, part in enumerate(path):
        inner = value_at(holder, [part]) if _has(holder, [part]) else None
        if not _has(holder, [part]):
            if _may_be_new(path[: depth + 1], holder):
                return
            raise _unknown(key, path[: depth + 1], holder, source, config)
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
                where=Where(source.file, key=key),
            )
        holder = inner


def _refuse_setting_of_base(
    key: str, path: tuple[str, ...], source: Source, config: dict[str, Any]
) -> None:
    """What a base config has computed from its settings is fixed when this file begins."""
    from_base = source.text and not source.assignments(path[0]) and path[0] in config
    if len(path) > 1 or not from_base or path[0] in SECTIONS:
        return
    ends = [name for name in all_keys(config) if name.endswith(f".{path[0]}")]
    listed = " / ".join(f"'{name}'" for name in ends[:3])
    raise UserError(
        tr(
            "--cfg-options: '{key}' is set in a base of this config, where overriding it "
            "would reach nothing",
            key=key,
        ),
        hint=tr("override {listed}.", listed=listed or tr("the final key")),
        where=Where(source.file),
    )


def _may_be_new(path: tuple[str, ...], holder: Any) -> bool:
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
    from xtuner.config.signatures import parameters_of

    parameters = parameters_of(kind)
    return parameters is None or parameters.takes(path[-1])


def _unknown(
    key: str, path: tuple[str, ...], holder: Any, source: Source, config: dict[str, Any]
) -> UserError:
    nearest = suggest(key, path, holder, config)
    return UserError(
        tr("--cfg-options: there is no key '{key}' in this config", key=key),
        hint=tr("did you mean {nearest}?", nearest=nearest)
        if nearest
        else tr("'xtuner print-cfg {file}' shows all keys.", file=source.file),
        where=Where(source.file),
    )


def suggest(key: str, path: tuple[str, ...], holder: Any, config: dict[str, Any]) -> str:
    """The nearest real key or keys to an unknown one, '' when nothing is near."""
    elsewhere = ELSEWHERE.get(path[-1])
    if elsewhere and _has(config, elsewhere.split(".")[:1]):
        return f"'{elsewhere}'"
    if isinstance(holder, list | tuple):
        return f"'{'.'.join(path[:-1])}.0' ... '{'.'.join(path[:-1])}.{len(holder) - 1}'"
    beside = [name for name in holder if isinstance(name, str) and name not in ("type",)]
    near = difflib.get_close_matches(path[-1], beside, n=1, cutoff=0.6)
    if near:
        return f"'{'.'.join([*path[:-1], near[0], *key.split('.')[len(path) :]])}'"
    ends = [name for name in all_keys(config) if name.rpartition(".")[2] == path[-1]]
    return " / ".join(f"'{name}'" for name in ends[:2])


def all_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config."""
    if isinstance(value, dict):
        items = [(str(key), dict.__getitem__(value, key)) for key in dict.keys(value)]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return
    for key, item in items:
        yield f"{prefix}{key}"
        yield from all_keys(item, f"{prefix}{key}.")


def _refuse_wrong_kind(
    key: str,
    path: tuple[str, ...],
    value: Any,
    is_code: bool,
    config: dict[str, Any],
    source: Source,
) -> None:
    """A word where a number stands is a slip: ``lr=le-5``."""
    current = _current(config, path)
    if _is_number(current) and isinstance(value, str) and not is_code:
        raise UserError(
            tr(
                "--cfg-options {key}: expected a number like {current!r}, got {value!r}",
                key=key,
                current=current,
                value=value,
            ),
            where=Where(source.file, key=".".join(path)),
        )


def read_value(text: str, imported: set[str]) -> tuple[str, Any, bool]:
    """Read the right side of ``key=value``.

    Args:
        text: a Python literal, ``true``/``null`` and the like, a name that the config imports
            (``torch.bfloat16``), a list or dict of these, or else plain text.
        imported: the names that the config imports.

    Returns:
        The value as Python; the value itself (None where names stand in it); whether they do.
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
    """The expression as Python again, with nothing in it but literals and imported names."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
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
