"""Random rows, files and config edits: never a traceback, and the doctor agrees with training.

``XTUNER_FUZZ=2000 pytest tests/corpus/test_fuzz.py`` tries so many cases of each kind, at random.
"""

from __future__ import annotations

import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpus import walk
from tests.corpus.test_corpus import folder, has_errors, tokenizer  # noqa: F401 (fixtures)

EXAMPLES = int(os.environ.get("XTUNER_FUZZ", "0"))


def fuzz(default: int):
    return settings(
        max_examples=EXAMPLES or default,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


TEXTS = st.sampled_from(
    ["hi", "", " ", "a\nb", "你好", "<think>\n\n</think>", "<image>", "{x}", "\0", "null"]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(0, 1), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "role", "content", "text", "type"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "User", ""])
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": ROLES, "content": st.one_of(TEXTS, TEXTS, VALUES)},
            optional={"loss": VALUES, "tool_calls": VALUES, "from": ROLES, "value": VALUES},
        ),
        VALUES,
    ),
    max_size=5,
)
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": VALUES, "n": VALUES}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("instruction", "input", "output"), VALUES)),
    st.fixed_dictionaries({"conversations": MESSAGES}),
    VALUES,
)
GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
)
FUNCTIONS = st.sampled_from(
    ["openai_map_fn", "alpaca_map_fn", "wizardlm_map_fn", "auto_map_fn", None]
)
TEMPLATES = st.sampled_from(["qwen_chat", "auto", None])
COUNT = iter(range(10**9))


def agree(case, tokenizer) -> None:  # noqa: F811
    """The doctor has an error where training refuses the file, and only there."""
    case = {"file": f"a{next(COUNT)}.jsonl", **case}
    dataset = walk.dataset_of(case, tokenizer)
    found, made = walk.doctor(dataset), walk.train(dataset)
    if isinstance(made, str) and not made.startswith("no row is left"):
        assert has_errors(found), (found, made)
    assert not (isinstance(made, int) and has_errors(found)), (found, made)


@fuzz(60)
@given(rows=st.lists(ROWS, min_size=1, max_size=4), map_fn=FUNCTIONS, template=TEMPLATES)
def test_rows(rows, map_fn, template, tokenizer):  # noqa: F811
    agree(
        {"lines": [GOOD, *map(json.dumps, rows)], "map_fn": map_fn, "template": template}, tokenizer
    )


FILES = {
    "lines": f"{GOOD}\n" * 3,
    "array": f"[{GOOD}, {GOOD}, {GOOD}]",
    "indented": json.dumps([json.loads(GOOD)] * 3, indent=1),
    "objects": f"{json.dumps(json.loads(GOOD), indent=1)}\n" * 3,
    "field": f'{{"version": 1, "data": [{GOOD},\n{GOOD},\n{GOOD}], "note": null}}',
}
PIECES = (
    "",
    "{",
    "}",
    "[",
    "]",
    '"',
    ",",
    ":",
    "\n",
    "\\",
    "\r",
    "\t",
    "\u2028",
    "é",
    "null",
    "07",
)
SPLITS = ("train", "train", "train[:2]", "train[1:]")


@fuzz(80)
@given(
    seed=st.integers(0, 10**9),
    cuts=st.integers(1, 4),
    layout=st.sampled_from(sorted(FILES)),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_files(seed, cuts, layout, suffix, tokenizer):  # noqa: F811
    """Good files with characters taken out, put in and doubled."""
    rng = random.Random(seed)
    text = list(FILES[layout])
    for _ in range(cuts):
        place = rng.randrange(len(text))
        text[place : place + rng.choice((0, 1, 9))] = rng.choice((*PIECES, "\ud800"))
    case = {"lines": "".join(text).split("\n"), "map_fn": "openai_map_fn"}
    case["file"] = f"f{next(COUNT)}{suffix}"
    case["loader"] = {"field": "data"} if layout == "field" else {"split": rng.choice(SPLITS)}
    if "\ud800" not in text:
        case["encoding"] = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "gb18030"))
    agree(case, tokenizer)


KEYS = st.sampled_from(
    [
        *(
            "model",
            "model.lora",
            "model.llm",
        ),
        *(
            "tokenizer",
            "train_dataloader",
            "train_dataloader.dataset",
        ),
        *(
            "optim_wrapper",
            "optim_wrapper.optimizer",
            "param_scheduler",
        ),
        *(
            "custom_hooks",
            "default_hooks",
            "default_hooks.checkpoint",
        ),
        *(
            "train_cfg",
            "train_cfg.max_epochs",
            "max_length",
        ),
        *(
            "lr",
            "batch_size",
            "visualizer",
        ),
        *(
            "randomness",
            "work_dir",
            "train_dataloader.dataset.dataset",
        ),
        *(
            "train_dataloader.sampler",
            "model.llm.quantization_config",
        ),
    ]
)


@fuzz(80)
@given(key=KEYS, value=VALUES, name=st.sampled_from(["type", "x", "lr", "interval", "dtype"]))
def test_config_edits(key, value, name):
    """A section set to anything, and anything put into a section."""
    head, *rest = key.split(".")
    target = head + "".join(f"[{word!r}]" for word in rest)
    walk.problems({"append": [f"{target} = {value!r}"]})
    walk.problems(
        {"append": [f"if isinstance({target}, dict):", f"    {target}[{name!r}] = {value!r}"]}
    )


pytestmark = [pytest.mark.usefixtures("folder"), *([pytest.mark.timeout(0)] if EXAMPLES else [])]
