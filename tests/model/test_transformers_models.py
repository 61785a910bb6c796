"""The published import paths of mixture-of-experts models load transformers' weights."""

import pytest
import torch

from tests.helpers.tiny import make_model
from xtuner.model.transformers_models.mixtral import MixtralForCausalLM
from xtuner.model.utils import LoadWoInit


def test_published_keywords_load_the_same_model(tmp_path):
    torch.manual_seed(0)
    plain = make_model("mixtral", num_local_experts=2, num_experts_per_tok=1)
    plain.save_pretrained(tmp_path / "moe")
    ours = MixtralForCausalLM.from_pretrained(
        str(tmp_path / "moe"),
        moe_implementation="shard",
        expert_in_one_shard=2,
        trust_remote_code=True,
    )
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def test_another_implementation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="origin, shard"):
        MixtralForCausalLM.from_pretrained(str(tmp_path), moe_implementation="fast")


def test_load_wo_init_skips_the_filling():
    with LoadWoInit():
        tensor = torch.full((3,), 7.0)
        torch.nn.init.zeros_(tensor)
    assert tensor.tolist() == [7.0, 7.0, 7.0]
    assert torch.nn.init.zeros_(tensor).tolist() == [0.0, 0.0, 0.0]
