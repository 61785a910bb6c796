"""A config made small: each change is told, everything else stays the user's."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.proving.bases import LORA, QLORA, document, options, save_base, save_rows
from xtuner.config.dump import write_config
from xtuner.config.load import load
from xtuner.config.values import iter_dicts, name_of, raw_dict
from xtuner.proving import reduce, stage_work
from xtuner.proving.reduce import Limits
from xtuner.proving.rows import sample_rows, spread
from xtuner.utils.errors import UserError


def values(name: str, *words: str) -> dict:
    return raw_dict(document(name, list(words)).editable().config)


def test_the_longest_row_is_in_the_sample():
    rows = Dataset.from_list([{"text": "a" * (1 + 90 * (n == 37))} for n in range(100)])
    for count in (1, 5, 16):
        found = sample_rows(rows, count)
        assert len(found) == count and max(map(len, found["text"])) == 91
    assert sample_rows(rows, 5)["text"][0] == "a" and spread(10, 3) == [0, 3, 6]
    assert sample_rows(rows, 200) is rows


def test_lines_that_training_leaves_out_are_left_out(tmp_path):
    """A file with a broken line trains with ``bad_rows="drop"``, so it is rehearsed, too."""
    base, rows = save_base(tmp_path / "base"), save_rows(tmp_path / "rows.jsonl", 12)
    rows.write_text("{broken\n" + rows.read_text("utf-8"), "utf-8")
    words = ["train_dataset.bad_rows='drop'", "pack_to_max_length=False", "use_varlen_attn=False"]
    given = document(LORA, options(base, rows, *words))
    found = stage_work.prepare_data(given, tmp_path, Limits(rows=5))
    assert (found["rows"], found["estimated"]) == (5, 12)
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        stage_work.prepare_data(document(LORA, options(base, rows)), tmp_path, Limits(rows=5))


def test_a_config_without_hooks_saves_while_it_trains():
    found = values(LORA)
    del found["default_hooks"], found["env_cfg"]
    reduce.run_alone(found)
    reduce.few_steps(found, Limits())
    assert found["default_hooks"]["checkpoint"]["interval"] > 0
    assert found["env_cfg"]["dist_cfg"] == {"backend": "gloo"}


def test_models_are_replaced_wherever_they_are_named(tmp_path):
    base, rows = save_base(tmp_path / "base"), save_rows(tmp_path / "rows.jsonl")
    given = document(QLORA, options(base, rows)).editable()
    found = raw_dict(given.config)
    (model,) = reduce.shrink_models(found, given.file, tmp_path / "models")
    reduce.use_float32(found)
    write_config(given, tmp_path / "small.py")
    written = load(str(tmp_path / "small.py")).values
    names = {part[reduce.PATH] for _, part in iter_dicts(written) if dict.get(part, reduce.PATH)}
    assert names == {str(model.folder)}
    llm = written["model"]["llm"]
    assert llm["dtype"] == llm["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"
    assert llm["quantization_config"]["load_in_4bit"] is True
    assert written["model"]["lora"]["r"] == 64 and written["optim_wrapper"]["dtype"] == "float32"


def test_lengths_batches_and_steps(tmp_path):
    found = values(LORA, "accumulative_counts=16", "max_length=4096")
    limits = Limits(rows=5, tokens=128)
    changes = [*reduce.sample_data(found, 5), *reduce.shorten(found, 128)]
    changes += reduce.few_steps(found, limits)
    dataset = found["train_dataloader"]["dataset"]
    assert name_of(dict.get(dataset["dataset"], "type")) == "sample_rows"
    assert dataset["dataset"]["count"] == 5 and dataset["max_length"] == 128
    assert found["optim_wrapper"]["accumulative_counts"] == 2
    assert found["train_cfg"]["max_iters"] == 8 and "max_epochs" not in found["train_cfg"]
    assert found["default_hooks"]["checkpoint"]["interval"] == 4
    (chat,) = [hook for hook in found["custom_hooks"] if "evaluation_inputs" in hook]
    assert (chat["every_n_iters"], chat["max_new_tokens"]) == (4, 8)
    assert "128 tokens of 4096" in changes and "accumulative_counts=2" in changes
    again = reduce.sample_data(found, 5)
    assert again and name_of(dict.get(dataset["dataset"]["dataset"], "type")) == "load_dataset"


def test_what_one_cpu_lacks_is_taken_out():
    found = values(LORA, "sequence_parallel_size=4", "load_from='big.pth'")
    found["optim_wrapper"]["optimizer"]["type"] = reduce.LazyObject(
        "bitsandbytes.optim", "AdamW8bit"
    )
    changes = reduce.run_alone(found)
    assert found["load_from"] is None and found["sequence_parallel_size"] == 1
    assert name_of(dict.get(found["optim_wrapper"]["optimizer"], "type")) == "AdamW"
    assert found["optim_wrapper"]["optimizer"]["lr"] == 2e-4
    assert "AdamW in place of AdamW8bit" in changes and len(changes) == 3
    found["model"]["peft_model"] = "adapter"
    with pytest.raises(UserError, match="peft_model"):
        reduce.run_alone(found)


def test_other_trainings_are_refused():
    given = document(LORA, []).editable()
    reduce.require_runner(given, "prove")
    given.config.pop("train_cfg")
    with pytest.raises(UserError, match="no train_cfg"):
        reduce.require_runner(given, "prove")
    given.config.framework = "huggingface"
    with pytest.raises(UserError, match="Trainer"):
        reduce.require_runner(given, "prove")
