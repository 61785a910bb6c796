"""From a name's cards and parts to the text of a whole config, in five commented parts.

PART 1 (Settings) is nothing but the names that the chosen parts leave free. Their values come
from, in increasing order of precedence: the defaults, the method, the dataset's card, the model's
card, the name itself, the table of exceptions.
"""

from __future__ import annotations

import fnmatch
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xtuner.configs.cards import Code, ModelCard, Source
from xtuner.configs.fragments import (
    Fragment,
    Placeholders,
    expression,
    filled,
    import_lines,
    names_in,
    part,
    renamed,
)
from xtuner.configs.settings import DEFAULTS, EXCEPTIONS, IMAGES, LAYOUT, METHODS, WITH_IMAGES

if TYPE_CHECKING:
    from xtuner.configs.names import ConfigName

WIDTH = 88
TITLES = (
    "PART 1  Settings",
    "PART 2  Model & Tokenizer",
    "PART 3  Dataset & Dataloader",
    "PART 4  Scheduler & Optimizer",
    "PART 5  Runtime",
)
BENCHMARK = {
    "accumulative_counts": 1,
    "dataloader_num_workers": 4,
    "save_steps": -1,
    "evaluation_freq": 50,
    "log_interval": 1,
    "throughput": True,
}
VISUALS = {
    "evaluation_images": (),
    "evaluation_videos": ("video_frames", "video_fps"),
}
"""Settings of what questions are about, and what belongs to them."""
SPLITS = ("data_files", "data_hub", "data_json", "data_ms")
"""Parts whose rows ``val_size`` can split."""
MAP_FNS = "xtuner.dataset.map_fns"
PREFERENCES = "xtuner.dataset.preference_dataset"
# Modules of the names that values use (a part has its own imports).
MODULES: Mapping[str, str] = {
    "AdamW": "torch.optim",
    "PROMPT_TEMPLATE": "xtuner.utils",
    "SYSTEM_TEMPLATE": "xtuner.utils",
    "default_collate_fn": "xtuner.dataset.collate_fns",
    "preference_collate_fn": "xtuner.dataset.collate_fns.preference_collate_fn",
    "orpo_dpo_mix_40k_map_fn": PREFERENCES,
    "template_map_fn_factory": MAP_FNS,
}


def render_config(parsed: ConfigName) -> str:
    """The text of the config of a name."""
    values = values_of(parsed)
    processor = [part("processor")] if _takes_images(parsed) else []
    parts = [
        [_tokenizer(parsed, values), *processor, _model(parsed, values)],
        _data(parsed, values),
        [optim(values, _accumulate(parsed))],
        [_runtime(parsed, values)],
    ]
    return assemble(_headline(parsed, values), parts, values)


def values_of(parsed: ConfigName) -> dict[str, Any]:
    """Every setting of a name, and the values of the placeholders in the parts."""
    model, method, dataset = parsed.model, parsed.method, parsed.dataset
    values: dict[str, Any] = dict(DEFAULTS)
    values["pretrained_model_name_or_path"] = model.path
    values["template"] = dataset.template or model.template
    values["bot_name"] = model.title
    values.update(method.settings)
    if dataset.kind == "vision":
        values.update(IMAGES[method.weights])
    for source in dataset.sources:
        values[source.path[0]] = source.path[1]
    values.update(dataset.settings)
    values.update({key: value for key, value in model.settings.items() if key not in METHODS})
    values.update(model.settings.get(parsed.method_name, {}))
    if parsed.benchmark:
        values.update(BENCHMARK)
    values.update(parsed.options)
    for pattern, settings in EXCEPTIONS:
        if fnmatch.fnmatchcase(parsed.name, pattern):
            values.update(settings)
    values["pretrained_model_name_or_path"] += values.pop("path_suffix", "")
    values["prompt_template"] = Code(f"PROMPT_TEMPLATE.{values['template']}")
    if method.kind == "sft":
        values["use_varlen_attn"] = dataset.packed and values["batch_size"] == 1
    return values


def optim(values: Mapping[str, Any], accumulate: str) -> Fragment:
    """``parts/optim.py``; ``accumulate`` is the expression for the micro-batches of a step."""
    return filled(part("optim"), {"ETA_MIN": literal(values["eta_min"]), "ACCUMULATE": accumulate})


def _accumulate(parsed: ConfigName) -> str:
    """The micro-batches of a step: more where GPUs share a row, so that it has as many rows."""
    shared = "" if _takes_images(parsed) else " * sequence_parallel_size"
    return f"accumulative_counts{shared}"


def _takes_images(parsed: ConfigName) -> bool:
    return parsed.dataset.kind == "vision"


def _headline(parsed: ConfigName, values: Mapping[str, Any]) -> str:
    model, method, dataset = parsed.model, parsed.method, parsed.dataset
    epochs = values["max_epochs"]
    what = f"{model.title}: {method.title}, on {dataset.title}, {epochs} epoch{'s' * (epochs > 1)}."
    if dataset.note:
        what += "\n" + dataset.note
    return headline(what, parsed.name, method.weights, model.billions, values)


def headline(what: str, name: str, weights: str, billions: float, values: Mapping[str, Any]) -> str:
    """The comment at the top of a file: what it trains, and the command."""
    command = f"xtuner train {name}_copy.py"
    lines = ["# ruff: noqa: C408"]
    for paragraph in what.splitlines():
        lines += textwrap.wrap(paragraph, WIDTH, initial_indent="# ", subsequent_indent="# ")
    lines.append("#")
    parallel = values.get("sequence_parallel_size", 1)
    if parallel > 1 or (weights == "full" and billions > 3):
        lines += [
            "# It needs several GPUs; on a machine with eight:",
            f"#     NPROC_PER_NODE=8 {command} \\",
            "#         --deepspeed deepspeed_zero3",
        ]
    else:
        lines += [f"#     {command}"]
    return "\n".join(lines) + "\n"


def _tokenizer(parsed: ConfigName, values: Mapping[str, Any]) -> Fragment:
    path = "tokenizer_path" if "tokenizer_path" in values else "pretrained_model_name_or_path"
    return tokenizer(parsed.model, path, values)


def tokenizer(model: ModelCard, path: str, values: Mapping[str, Any]) -> Fragment:
    """``parts/tokenizer.py`` for a model whose path is in the setting ``path``."""
    fields = {key: literal(value) for key, value in model.tokenizer.items()}
    return filled(
        part("tokenizer"),
        {
            "MODEL_PATH": path,
            "PADDING_SIDE": literal(values["padding_side"]),
            "TOKENIZER_FIELDS": fields,
        },
    )


def _model(parsed: ConfigName, values: Mapping[str, Any]) -> Fragment:
    method = parsed.method
    llm = language_model(parsed.model, method.weights, "pretrained_model_name_or_path")
    if _takes_images(parsed):
        llm = renamed(llm, "AutoModelForCausalLM", "AutoModelForImageTextToText")
    lora = filled(part("lora"), lora_placeholders(values))
    adapters = {"lora": expression(lora)} if method.adapters else {}
    # A separate tokenizer may have more tokens than the model.
    own = {"TOKENIZER": {"tokenizer": "tokenizer"} if "tokenizer_path" in values else {}}
    placeholders: Placeholders = {
        "LLM": expression(llm),
        "LORA": adapters,
        **(own if method.kind == "sft" and not _takes_images(parsed) else {}),
    }
    model = filled(part(f"model_{_model_kind(parsed)}"), placeholders)
    return Fragment(model.text, {**model.modules, **llm.modules, **lora.modules})


def _model_kind(parsed: ConfigName) -> str:
    """Which ``parts/model_<kind>.py`` it uses."""
    if not _takes_images(parsed):
        return parsed.method.kind
    return "vision" if parsed.method.kind == "sft" else f"vision_{parsed.method.kind}"


def language_model(model: ModelCard, weights: str, path: str) -> Fragment:
    """``parts/llm_<weights>.py`` for a model whose path is in the setting ``path``."""
    return filled(part(f"llm_{weights}"), {"MODEL_PATH": path})


def lora_placeholders(values: Mapping[str, Any]) -> Placeholders:
    """The placeholders of ``parts/lora.py``."""
    targets = values["lora_targets"]
    return {
        "LORA_R": literal(values["lora_r"]),
        "LORA_ALPHA": literal(values["lora_alpha"]),
        "LORA_DROPOUT": literal(values["lora_dropout"]),
        "LORA_TASK": literal(values["lora_task"]),
        "LORA_TARGETS": {"target_modules": literal(targets, column=23)} if targets else {},
    }


def _data(parsed: ConfigName, values: Mapping[str, Any]) -> list[Fragment]:
    sources = parsed.dataset.sources
    blocks = [_source(parsed, source, values) for source in sources]
    variable = sources[0].variable
    if len(sources) > 1:
        variables = "[" + ", ".join(source.variable for source in sources) + "]"
        blocks.append(filled(part("data_concat"), {"DATASETS": variables}))
        variable = "train_dataset"
    if _is_intern(parsed):
        return [*blocks, filled(part("loader_intern"), {"DATASET": variable})]
    if _takes_images(parsed):
        return [*blocks, filled(part("loader_vision"), {"DATASET": variable}), part("val_size")]
    collate = "default_collate_fn" if parsed.method.kind == "sft" else "preference_collate_fn"
    blocks.append(filled(part("loader"), {"DATASET": variable, "COLLATE": collate}))
    if all(source.part in SPLITS for source in sources):
        blocks.append(part("val_size"))
    return blocks


def _source(parsed: ConfigName, source: Source, values: Mapping[str, Any]) -> Fragment:
    method = parsed.method
    pretrain = parsed.dataset.kind == "pretrain"
    reward = method.kind == "reward"
    keyword, _, value = source.load.partition("=")
    more = {keyword: value} if keyword else {}
    fragment = part(source.part)
    placeholders: Placeholders = {
        "VARIABLE": source.variable,
        "LOCAL_FILES": {"path": literal(source.loader), "data_files": "data_files", **more},
        "REWARD": {"is_reward": "True", "reward_token_id": "reward_token_id"} if reward else {},
    }
    if _takes_images(parsed):
        return filled(fragment, placeholders)
    placeholders = {
        **placeholders,
        "PATH": source.path[0],
        "LOAD_FIELDS": more,
        "MAP_FN": source.map_fn or "None",
        "TEMPLATE_MAP_FN": "None"
        if pretrain
        else "dict(type=template_map_fn_factory, template=prompt_template)",
        "MAX_ROWS": {"max_dataset_length": "max_dataset_length"}
        if "max_dataset_length" in values
        else {},
        "SHUFFLE": literal(values["shuffle_before_pack"]),
        "IS_DPO": literal(not reward),
        "IS_REWARD": literal(reward),
        "REWARD_TOKEN": "reward_token_id" if reward else "-1",
        "PACKED_LENGTH": {"max_packed_length": "max_packed_length"}
        if values["use_varlen_attn"]
        else {},
    }
    return filled(fragment, placeholders)


def _runtime(parsed: ConfigName, values: Mapping[str, Any]) -> Fragment:
    fields = {"is_intern_repo_dataset": "True"} if _is_intern(parsed) else {}
    hooks = [info_hook(fields)]
    if parsed.method.kind != "reward":
        hooks.append(_chat_hook(parsed, values))
    if values["use_varlen_attn"]:
        hooks.append(part("hook_varlen"))
    if values["throughput"]:
        hooks.append(part("hook_throughput"))
    return runtime(hooks, values)


def info_hook(fields: Mapping[str, str] | None = None) -> Fragment:
    """The hook that shows a sample, with these further keyword arguments."""
    return filled(part("hook_info"), {"INFO_FIELDS": fields or {}})


def _is_intern(parsed: ConfigName) -> bool:
    """Whether rows are packed and ordered by InternLM's rules."""
    return parsed.dataset.sources[0].part.startswith("intern_")


def _chat_hook(parsed: ConfigName, values: Mapping[str, Any]) -> Fragment:
    own_template = parsed.dataset.kind in ("pretrain", "vision")
    images = ["processor"] if _takes_images(parsed) else []
    for name, more in VISUALS.items():
        images += [name, *more] if images and values.get(name) else []
    fields = {key: literal(value) for key, value in parsed.dataset.hook.items()}
    return filled(
        part("hook_chat"),
        {
            "IMAGE_FIELDS": {name: name for name in images},
            "HOOK_FIELDS": fields,
            "PROMPT_TEMPLATE": {} if own_template else {"prompt_template": "prompt_template"},
        },
    )


def runtime(hooks: Iterable[Fragment], values: Mapping[str, Any]) -> Fragment:
    """``parts/runtime.py`` with these custom hooks."""
    modules: dict[str, str] = {}
    items = []
    for hook in hooks:
        modules.update(hook.modules)
        items.append("    " + expression(hook).replace("\n", "\n    ") + ",\n")
    fragment = filled(
        part("runtime"),
        {
            "HOOKS": "[\n" + "".join(items) + "]",
            "LOG_INTERVAL": literal(values["log_interval"]),
            "CHECKPOINT_FIELDS": {} if values["save_optimizer"] else {"save_optimizer": "False"},
        },
    )
    return Fragment(fragment.text, {**fragment.modules, **modules})


def assemble(top: str, parts: list[list[Fragment]], values: Mapping[str, Any]) -> str:
    """Put a file together: headline, imports, the settings that the parts need, and the parts.

    Args:
        top: the comment at the top.
        parts: the fragments of PART 2 to PART 5.
        values: a value for every free name in them.
    """
    modules = dict(MODULES)
    for fragment in (fragment for group in parts for fragment in group):
        modules.update(fragment.modules)
    texts = [fragment.text for group in parts for fragment in group]
    bodies = ["\n".join(fragment.text for fragment in group) for group in parts]
    settings = _settings(texts, modules, values)
    body = "\n".join(
        _banner(title) + text for title, text in zip(TITLES, [settings, *bodies], strict=True)
    )
    read = frozenset[str]().union(*(names_in(text)[0] for text in [settings, *texts]))
    imported = {name for name in read if name in modules or name.endswith("_map_fn")}
    modules.update({name: modules.get(name, MAP_FNS) for name in imported})
    return top + import_lines(imported, modules) + "\n" + body


def _banner(title: str) -> str:
    ruler = "#" * 71
    return f"{ruler}\n#{title:^69}#\n{ruler}\n"


def _settings(texts: Sequence[str], modules: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """The text of PART 1: the free names of the other parts, grouped and explained."""
    ours = {name for _, group in LAYOUT for name in group}
    free = _free(texts, modules)
    missing = free - ours
    assert not missing, f"settings that no part of LAYOUT explains: {missing}"
    while True:  # a setting's value may use another setting
        code_of = [literal(values[name]) for name in free if isinstance(values[name], Code)]
        more = _free(code_of, modules) & ours
        if more <= free:
            break
        free |= more
    groups = []
    for title, group in LAYOUT:
        why_of = {**group, **(WITH_IMAGES if "video_frames" in free else {})}
        lines = [_setting(name, values[name], why_of[name]) for name in group if name in free]
        if lines:
            groups.append(f"# {title}\n" + "".join(lines))
    return "\n".join(groups)


def _free(texts: Sequence[str], modules: Mapping[str, str]) -> set[str]:
    names = [names_in(text) for text in texts]
    read = frozenset[str]().union(*(read for read, _ in names))
    known = frozenset(modules).union(*(assigned for _, assigned in names))
    return {name for name in read - known if not name.endswith("_map_fn")}


def _setting(name: str, value: object, why: str) -> str:
    text = f"{name} = {literal(value, column=len(name) + 3)}"
    if not why:
        return text + "\n"
    if "\n" in text or width(text) + 4 + width(why) > WIDTH:
        return f"# {why}\n{text}\n"
    return f"{text}  # {why}\n"


def literal(value: object, column: int = 0) -> str:
    """A value as ruff would write it.

    Args:
        value: a string, number, truth value, None, ``Code``, or a list or tuple of these.
        column: where its first line begins; a list that would be too wide gets one item a line.
    """
    if isinstance(value, Code):
        return str(value) if column + width(value) <= WIDTH else f"(\n    {value}\n)"
    if isinstance(value, str):
        if column + width(_string(value)) > WIDTH and "\n" in value:
            segments = "".join(f"    {_string(line)}\n" for line in value.splitlines(keepends=True))
            return f"(\n{segments})"
        return _string(value)
    if isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        items = [_string(item) if type(item) is str else literal(item) for item in value]
        line = opening + ", ".join(items) + closing
        if column + width(line) <= WIDTH:
            return line
        return opening + "\n" + "".join(f"    {item},\n" for item in items) + closing
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:e}".partition("e")
        short = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
        return short if float(short) == value else repr(value)
    return repr(value)


def _string(value: str) -> str:
    """A string in double quotes, or in single ones where that needs fewer backslashes."""
    quote = "'" if value.count('"') > value.count("'") else '"'
    text = value.replace("\\", "\\\\").replace("\n", "\\n").replace(quote, "\\" + quote)
    return quote + text + quote


def width(text: str) -> int:
    """Columns that a line of text takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
