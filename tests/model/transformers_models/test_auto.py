"""Registration: our classes are taken for their families' folders, and no code of a folder runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import configuration_utils

from tests.helpers.architectures import make_config
from xtuner.model.transformers_models import auto

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CHATGLM = {
    "padded_vocab_size": 64,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_layers": 1,
    "num_attention_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
INTERNVL_CHAT = {"vision_config": VISION, "llm_config": {**TINY, "model_type": "internlm2"}}
FIELDS = {"chatglm": CHATGLM, "internvl_chat": INTERNVL_CHAT}
"""Fields of ``config.json``; ``TINY`` for the other families."""
CAUSAL = sorted(
    name for name, family in auto.FAMILIES.items() if "AutoModelForCausalLM" in family.models
)
CODE = "raise SystemExit('code of the folder ran')\n"


@pytest.fixture(params=CAUSAL)
def folder(request, tmp_path):
    """A folder as the hub has it, whose code ends the process if it runs."""
    family = auto.FAMILIES[request.param]
    causal = family.models["AutoModelForCausalLM"]
    causal = causal if isinstance(causal, str) else causal[0]
    names = {"AutoConfig": f"configuration.{family.config}"}
    names |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"modeling.{causal}")
    fields = FIELDS.get(request.param, TINY)
    architecture = "ChatGLMModel" if request.param == "chatglm" else causal
    config = {**fields, "model_type": request.param, "auto_map": names}
    config["architectures"] = [architecture]
    config |= {"attn_implementation": "flash_attention_2", "torch_dtype": "float32"}
    for file in ("configuration.py", "modeling.py"):
        (tmp_path / file).write_text(CODE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("trusted", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}])
def test_our_classes_win_over_the_folders_code(folder, trusted):
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        found = getattr(transformers, name).from_pretrained(folder, **trusted)
        assert type(found).__module__.startswith("xtuner.model.transformers_models.")


def test_what_is_saved_keeps_the_fields_of_the_hub(folder):
    before = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation != before["attn_implementation"]
    model.save_pretrained(folder / "saved")
    after = json.loads((folder / "saved/config.json").read_text())
    for key in before.keys() - {"attn_implementation"}:
        if isinstance(before[key], dict):  # a part's config gets its defaults, too
            assert after[key].items() >= before[key].items(), key
        else:
            assert after[key] == before[key], key
    assert "rope_parameters" not in after


def test_saving_warns_of_no_deprecated_name(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", warned.append)
    config = transformers.AutoConfig.for_model("internlm2", **TINY, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    assert not warned
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_tuple_of_an_auto_class_is_read_by_architectures(tmp_path):
    config = transformers.AutoConfig.for_model("internlm2", **TINY, reward_token_id=5)
    config.architectures = ["InternLM2ForRewardModel"]
    for name in ("AutoModel", "AutoModelForSequenceClassification"):
        model = getattr(transformers, name).from_config(config)
        assert type(model).__name__ == "InternLM2ForRewardModel"


@pytest.mark.slow
def test_registration_imports_no_models():
    code = (
        "import sys, xtuner.model.transformers_models.auto as auto\n"
        "def loaded(): return [name for name in sys.modules if '.modeling_' in name\n"
        "    and name.startswith('xtuner.')]\n"
        "assert not loaded(), loaded()\n"
        "auto.register(); auto.AutoConfig.for_model('internlm2')\n"
        "assert loaded() == ['xtuner.model.transformers_models.internlm2.modeling_internlm2']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_of_text_whose_own_folder_no_auto_class_reads_is_not_taken():
    def classes(kind):
        return list(auto.model_classes(auto.AutoModelForCausalLM, kind))

    assert classes("mllama") == ["MllamaForConditionalGeneration"]
    assert classes("llama4") == ["Llama4ForCausalLM"]  # which llama4_text names


@pytest.mark.parametrize("kind", ["mistral3", "llava", "qwen2_5_vl"])
def test_folders_for_images_and_text_are_loaded_with_the_class_that_they_name(kind, tmp_path):
    named = transformers.AutoModelForImageTextToText.from_config(make_config(kind))
    named.save_pretrained(tmp_path)
    loaded = auto.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(named)
    for name, weight in named.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
