"""Settings that no data can make right: the builders refuse them first, and check-cfg the same."""

from __future__ import annotations

import inspect

import pytest

from xtuner.dataset import (
    InternVL_V1_5_Dataset,
    LLaVADataset,
    RefCOCOJsonDataset,
    VisionLanguageDataset,
    VisionLanguagePreferenceDataset,
    process_hf_dataset,
)
from xtuner.dataset.map_fns import map_function_named
from xtuner.dataset.map_fns.template_map_fn import template_named
from xtuner.dataset.preference_dataset import build_preference_dataset
from xtuner.dataset.refcoco_json import InvRefCOCOJsonDataset
from xtuner.utils.dataset_settings import CHOICES, wrong_settings
from xtuner.utils.errors import UserError
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE

BUILDERS = {
    builder.__name__: builder
    for builder in (
        *(process_hf_dataset, build_preference_dataset, VisionLanguageDataset, LLaVADataset),
        *(VisionLanguagePreferenceDataset, InternVL_V1_5_Dataset, RefCOCOJsonDataset),
        InvRefCOCOJsonDataset,
    )
}
NEEDED = {
    "process_hf_dataset": {"dataset": [], "max_length": 8},
    "build_preference_dataset": {"dataset": [], "tokenizer": None, "max_length": 8},
    "VisionLanguageDataset": {"dataset": [], "processor": None},
    "VisionLanguagePreferenceDataset": {"dataset": [], "processor": None},
    "LLaVADataset": {"image_folder": "", "image_processor": None, "data_path": "a.json"},
}


@pytest.mark.parametrize("builder", BUILDERS)
def test_default_values_are_right_and_choices_are_arguments(builder):
    parameters = inspect.signature(BUILDERS[builder]).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty
    }
    assert not list(wrong_settings(builder, {**defaults, **NEEDED.get(builder, {})}))
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        assert set(CHOICES[builder]) <= set(parameters)


WRONG = [
    ("process_hf_dataset", {"bad_rows": "skip"}),
    ("process_hf_dataset", {"long_samples": None}),
    ("process_hf_dataset", {"train_on": "all"}),
    ("process_hf_dataset", {"train_thinking": True}),
    ("process_hf_dataset", {"part": "test", "val_size": 0.5}),
    ("process_hf_dataset", {"part": "val"}),
    ("process_hf_dataset", {"val_size": -0.5}),
    ("process_hf_dataset", {"val_size": float("nan")}),
    ("process_hf_dataset", {"val_size": True}),
    ("process_hf_dataset", {"max_dataset_length": "100"}),
    ("process_hf_dataset", {"max_dataset_length": -1}),
    ("process_hf_dataset", {"max_length": 8.0}),
    ("process_hf_dataset", {"max_length": None}),
    ("process_hf_dataset", {"map_num_proc": 0}),
    ("process_hf_dataset", {"seed": "0"}),
    ("process_hf_dataset", {"rename_maps": ["ab"]}),
    ("process_hf_dataset", {"rename_maps": [{"old": "a"}]}),
    ("process_hf_dataset", {"dataset": "a.jsonl"}),
    ("process_hf_dataset", {"dataset": None}),
    ("build_preference_dataset", {"is_reward": True}),
    ("build_preference_dataset", {"is_dpo": False}),
    ("build_preference_dataset", {"is_dpo": False, "is_reward": True}),
    ("build_preference_dataset", {"use_varlen_attn": True, "max_packed_length": 15}),
    ("build_preference_dataset", {"dataset": "a.jsonl"}),
    ("VisionLanguageDataset", {"long_samples": "cut"}),
    ("VisionLanguageDataset", {"max_pixels": 0}),
    ("VisionLanguagePreferenceDataset", {"long_samples": "shrink"}),
    ("VisionLanguagePreferenceDataset", {"pack_to_max_length": True}),
    ("VisionLanguagePreferenceDataset", {"train_on": "answers"}),
    ("LLaVADataset", {"bad_images": "skip"}),
    ("LLaVADataset", {"offline_processed_text_folder": "b"}),
    ("LLaVADataset", {"data_path": None}),
]


@pytest.mark.parametrize(("builder", "settings"), WRONG, ids=str)
def test_what_cannot_be_right_is_refused_before_anything_is_read(builder, settings):
    given = {**NEEDED[builder], **settings}
    first = next(wrong_settings(builder, given))
    assert first.key in given or first.key in ("reward_token_id", "is_reward", "val_size")
    with pytest.raises(UserError) as caught:
        BUILDERS[builder](**given)
    assert (caught.value.message, caught.value.hint) == (first.message, first.hint)
    assert caught.value.where.key == first.key


def test_numbers_of_numpy_and_pairs_of_names_are_right():
    import numpy as np

    for settings in (
        {"max_length": np.int64(8)},
        {"val_size": np.float32(0.5)},
        {"val_size": 30.0},
        {"rename_maps": [("a", "b"), ["c", "d"], {"old": "e", "new": "f"}]},
        {"pack_to_max_length": False, "max_length": None},
        {"do_dataset_tokenization": False, "max_length": None},
    ):
        assert not list(wrong_settings("process_hf_dataset", {"max_length": 8, **settings}))


def test_a_map_function_and_a_template_by_name():
    assert map_function_named("alpaca_map_fn").__name__ == "alpaca_map_fn"
    assert map_function_named("auto_map_fn").__name__ == "auto_map_fn"
    assert map_function_named("xtuner.dataset.map_fns.sql_map_fn").__name__ == "sql_map_fn"
    for name in ("alpaca", "alpacca_map_fn", "xtuner.dataset.map_fns.none", "os.gone"):
        with pytest.raises(UserError, match="there is no map function"):
            map_function_named(name)
    assert template_named("qwen_chat") == PROMPT_TEMPLATE.qwen_chat
    assert template_named("xtuner.utils.PROMPT_TEMPLATE.zephyr") == PROMPT_TEMPLATE.zephyr
    assert template_named("auto") == template_named(AUTO_TEMPLATE) == AUTO_TEMPLATE
    for name in ("qwen", "xtuner.utils.PROMPT_TEMPLATE.qwen", "gone.PROMPT_TEMPLATE.default", ""):
        with pytest.raises(UserError, match="there is no prompt template"):
            template_named(name)
