"""The changes that make a run fit, in order, each of which the config takes."""

import pytest

from tests.helpers.architectures import make_config
from tests.helpers.image_text import image_text_folder
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.helpers.tiny_internvl import save_internvl
from tests.helpers.vision_language import save_clip
from xtuner.config.check.checker import check_document
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.planning import memory
from xtuner.planning import remedies as module
from xtuner.planning.cards import Card
from xtuner.planning.memory import LIBRARIES
from xtuner.planning.plan import Machine, Planner
from xtuner.planning.remedies import options_of, remedies


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


def words_of(found):
    return [word for each in found for word in (*each.change.options, *each.change.words)]


FULL, LORA = "llama2_7b_full_wizardlm_e1", "qwen3_8b_lora_alpaca_e3"


def test_cheap_changes_come_first(folder):
    config, found = planned(
        folder, LORA, "batch_size=8", "model.use_activation_checkpointing=False", mib=800
    )
    assert words_of(found)[0] == "model.use_activation_checkpointing=True"
    batch, counts = words_of(found)[1:3]
    assert batch.startswith("batch_size=") and counts.startswith("accumulative_counts=")
    rows = int(batch.split("=")[1]) * int(counts.split("=")[1])
    assert rows == 8 * config.values["accumulative_counts"]  # the same optimizer step
    assert found[-1].plan.fits
    totals = [each.plan.memory.total for each in found]
    assert totals == sorted(totals, reverse=True)


def test_what_is_changed_is_what_the_config_takes(folder):
    config, found = planned(folder, FULL, "batch_size=1", mib=180)
    changed = override(config, words_of(found))
    errors = [each for each in check_document(changed) if each.severity == "error"]
    assert not [each for each in errors if each.code.startswith("XT02")], errors
    again = Planner(rows=100).plan(changed, found[-1].plan.machine)
    assert again.fits and again.memory == found[-1].plan.memory


def test_full_training_becomes_an_adapter_at_last(folder):
    _, found = planned(folder, FULL, "batch_size=1", mib=400)
    words = words_of(found)
    assert any(word.startswith("model.lora=") for word in words)
    # its states are small: they need no 8 bits any more
    assert not any("bitsandbytes" in word for word in words)


def test_states_in_8_bits_come_before_an_adapter(folder):
    _, found = planned(folder, FULL, "batch_size=1", mib=640)
    assert words_of(found) == ["optim_type=bitsandbytes.optim.AdamW8bit"]


def test_several_gpus_share_the_model(folder):
    _, found = planned(folder, FULL, "batch_size=1", mib=550, gpus=8)
    assert words_of(found) == ["--fsdp"]
    assert found[0].plan.settings.sharding.name == "fsdp" and found[0].plan.fits


def text_folder(path, kind):
    """A language model without weights."""
    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, vocab_size=4096)
    config = make_config(kind, **sizes)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return [f"pretrained_model_name_or_path={path}", "max_length=128"]


def llava(path):
    words = [f"llm_name_or_path={save_tiny(path / 'llm')}", "max_length=128"]
    return [*words, f"visual_encoder_name_or_path={save_clip(path / 'clip')}"]


def vision(path):
    return [f"base={str(image_text_folder('gemma3'))!r}", "model.freeze_visual_encoder=False"]


def errors_of(config):
    found = check_document(config)
    return {(each.code, each.message) for each in found if each.severity == "error"}


LLAVA = "llava_internlm2_chat_1_8b"
RUNS = {
    "qwen1_5_moe_a2_7_b_chat_full_alpaca_e3": lambda path: text_folder(path, "qwen2_moe"),
    "internlm2_chat_1_8b_dpo_full": lambda path: text_folder(path, "llama"),
    "internlm2_chat_1_8b_orpo_full_varlenattn": lambda path: text_folder(path, "llama"),
    "internlm2_chat_1_8b_reward_full_ultrafeedback": lambda path: text_folder(path, "llama"),
    "qwen3_8b_qlora_alpaca_e3": lambda path: text_folder(path, "mistral"),
    f"{LLAVA}_clip_vit_large_p14_336_e1_gpu8_pretrain": llava,
    f"{LLAVA}_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune": llava,
    "internvl_v1_5_internlm2_2b_finetune": lambda path: [f"path={save_internvl(path / 'whole')}"],
    "tests/equivalence/image_text_config.py": vision,
}
FAST = ("qwen1_5_moe_a2_7_b_chat_full_alpaca_e3", "internvl_v1_5_internlm2_2b_finetune")


@pytest.mark.parametrize("name", few_fast(list(RUNS), FAST))
def test_each_change_can_be_made_and_saves_what_is_said(name, tmp_path, monkeypatch):
    """With those before it; the models are so small that CUDA would be most of the memory."""
    monkeypatch.setattr(memory, "LIBRARIES", 0)
    monkeypatch.setattr(module, "LEAST_GAIN", 0.9999)
    words = [*RUNS[name](tmp_path), "model.use_activation_checkpointing=False"]
    config = override(load(name), words)
    planner = Planner()
    least = planner.plan(config, Machine(card=Card("none", 1)))
    found = remedies(planner, config, least)
    totals = [least.memory.total, *(each.plan.memory.total for each in found)]
    assert len(found) > 1 and totals == sorted(totals, reverse=True)
    known = errors_of(config)  # data that are not here
    for count, each in enumerate(found, 1):
        changed = override(config, options_of(found[:count]))
        assert errors_of(changed) <= known, each.change
        assert Planner().plan(changed, each.change.machine).memory == each.plan.memory
    card = Card("just enough", int(totals[2] / 0.97) + 2)
    plan = planner.plan(config, Machine(card=card))
    assert remedies(planner, config, plan)[-1].plan.fits


def test_nothing_helps(folder):
    _, found = planned(folder, LORA, mib=1)
    assert not found or not found[-1].plan.fits
