"""Every published import path works: those of the 578 configs, and those of docs and examples."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import make_model

GOLDEN = Path(__file__).parent.parent / "golden" / "published_imports.json"
OF_CONFIGS = [name for name in json.loads(GOLDEN.read_text("utf-8")) if name.startswith("xtuner.")]
OF_DOCS = {
    "xtuner.apis": "DefaultTrainingArguments build_lora_model build_model build_qlora_model",
    "xtuner.configs": "cfgs_name_path",
    "xtuner.dataset": "RefCOCOJsonEvalDataset decode_base64_to_image expand2square load_image "
    "load_json_file",
    "xtuner.dataset.map_fns": "DATASET_FORMAT_MAPPING llava_image_only_map_fn template_map_fn",
    "xtuner.dataset.preference_dataset": "intel_orca_dpo_map_fn",
    "xtuner.dataset.samplers": "InternlmRepoSampler",
    "xtuner.engine": "DeepSpeedStrategy TrainLoop",
    "xtuner.evaluation.metrics.reward_metric": "RewardMetric",
    "xtuner.model.modules": "ProjectorConfig ProjectorModel dispatch_modules",
    "xtuner.registry": "BUILDER MAP_FUNC",
    "xtuner.utils": "DEFAULT_IMAGE_TOKEN DEFAULT_PAD_TOKEN_INDEX IGNORE_INDEX IMAGE_TOKEN_INDEX "
    "SUPPORT_MODELS StopWordStoppingCriteria get_origin_state_dict load_state_dict_into_model",
    "xtuner.version": "__version__ version_info",
}


@pytest.mark.parametrize("path", OF_CONFIGS)
def test_names_of_configs(path):
    module, _, name = path.partition(":")
    if name:
        assert hasattr(importlib.import_module(module), name)
    else:
        importlib.import_module(module)


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in OF_DOCS.items() for name in names.split()],
)
def test_names_of_docs_and_examples(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_aliases_are_the_classes_that_configs_name():
    import xtuner.engine
    from xtuner.engine._strategy import DeepSpeedStrategy
    from xtuner.engine.runner import TrainLoop

    assert xtuner.engine.DeepSpeedStrategy is DeepSpeedStrategy
    assert xtuner.engine.TrainLoop is TrainLoop


def test_dispatch_modules_makes_attention_ours():
    from xtuner.model.modules import dispatch_modules

    torch.manual_seed(0)
    model = make_model("llama").eval()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    assert dispatch_modules(model, use_varlen_attn=True) is None
    assert model.config._attn_implementation == "xtuner"
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    return make_model("mixtral", num_local_experts=4, num_experts_per_tok=2).eval()


def test_original_state_dict_is_what_files_hold(mixtral, tmp_path):
    from xtuner.export.weights import Weights
    from xtuner.utils import get_origin_state_dict

    mixtral.save_pretrained(tmp_path)
    weights = Weights(tmp_path)
    original = get_origin_state_dict(mixtral.state_dict(), mixtral)
    assert sorted(original) == sorted(weights.infos)
    assert any(".experts.3." in name for name in original)
    assert all(torch.equal(original[name], weights.read(name)) for name in original)


def test_original_state_dict_is_loaded_back(mixtral):
    from xtuner.utils import get_origin_state_dict, load_state_dict_into_model

    ids = torch.arange(12)[None]
    other = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2).eval()
    original = get_origin_state_dict(mixtral.state_dict(), mixtral)
    assert not torch.equal(other(input_ids=ids).logits, mixtral(input_ids=ids).logits)
    assert load_state_dict_into_model(other, original) == []
    assert torch.equal(other(input_ids=ids).logits, mixtral(input_ids=ids).logits)


def test_what_a_state_dict_lacks_is_said_and_kept(mixtral):
    from xtuner.utils import get_origin_state_dict, load_state_dict_into_model

    original = get_origin_state_dict(mixtral.state_dict(), mixtral)
    del original["model.norm.weight"]
    original["lm_head.weight"] = original["lm_head.weight"][:-1]
    other = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    torch.nn.init.constant_(other.model.norm.weight, 3.0)
    head = other.lm_head.weight.clone()
    messages = load_state_dict_into_model(other, original)
    assert messages == ["missing: model.norm.weight", "size mismatch: lm_head.weight"]
    assert torch.equal(other.model.norm.weight, torch.full((64,), 3.0))
    assert torch.equal(other.lm_head.weight, head)
