"""The changes that make a run fit, in order, each of which the config takes."""

import pytest

from tests.helpers.architectures import make_config
from tests.helpers.tiny import make_tokenizer
from xtuner.config.check.checker import check_document
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.planning.cards import Card
from xtuner.planning.memory import LIBRARIES
from xtuner.planning.plan import Machine, Planner
from xtuner.planning.remedies import remedies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is wide enough for its parts to have their usual shares; no weights."""
    path = tmp_path_factory.mktemp("model")
    config = make_config(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=8192,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def document(folder, name, *options):
    return override(load(name), [f"pretrained_model_name_or_path={folder}", *options])


def planned(folder, name, *options, mib, gpus=1, **machine):
    card = Card("tiny", int((LIBRARIES + mib * 2**20) / 0.97))
    config, planner = document(folder, name, *options), Planner(rows=100)
    plan = planner.plan(config, Machine(card=card, gpus=gpus, **machine))
    assert not plan.fits
    return config, remedies(planner, config, plan)


def options_of(found):
    return [word for each in found for word in (*each.change.options, *each.change.words)]


FULL, LORA = "llama2_7b_full_wizardlm_e1", "qwen3_8b_lora_alpaca_e3"


def test_cheap_changes_come_first(folder):
    config, found = planned(
        folder, LORA, "batch_size=8", "model.use_activation_checkpointing=False", mib=800
    )
    assert options_of(found)[0] == "model.use_activation_checkpointing=True"
    batch, counts = options_of(found)[1:3]
    assert batch.startswith("batch_size=") and counts.startswith("accumulative_counts=")
    rows = int(batch.split("=")[1]) * int(counts.split("=")[1])
    assert rows == 8 * config.values["accumulative_counts"]  # the same optimizer step
    assert found[-1].plan.fits
    totals = [each.plan.memory.total for each in found]
    assert totals == sorted(totals, reverse=True)


def test_what_is_changed_is_what_the_config_takes(folder):
    config, found = planned(folder, FULL, "batch_size=1", mib=180)
    changed = override(config, options_of(found))
    errors = [each for each in check_document(changed) if each.severity == "error"]
    assert not [each for each in errors if each.code.startswith("XT02")], errors
    again = Planner(rows=100).plan(changed, found[-1].plan.machine)
    assert again.fits and again.memory == found[-1].plan.memory


def test_full_training_becomes_an_adapter_at_last(folder):
    _, found = planned(folder, FULL, "batch_size=1", mib=180)
    words = options_of(found)
    assert words[0].endswith("bitsandbytes.optim.AdamW8bit")
    assert any(word.startswith("model.lora=") for word in words)


def test_several_gpus_share_the_model(folder):
    _, found = planned(folder, FULL, "batch_size=1", mib=550, gpus=8)
    assert options_of(found) == ["--fsdp"]
    assert found[0].plan.settings.sharding.name == "fsdp" and found[0].plan.fits


def test_nothing_helps(folder):
    _, found = planned(folder, LORA, mib=1)
    assert not found or not found[-1].plan.fits
