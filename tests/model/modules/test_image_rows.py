"""Arguments of rows with images: positions of packed samples, images and tokens that belong."""

import pytest
import torch

from tests.helpers.image_text import collated, image_text_folder, plain_image_text, samples_of
from xtuner.model.modules import image_rows
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_of_a_packed_row_are_those_of_its_samples(kind):
    processor, body = load_processor(image_text_folder(kind)), plain_image_text(kind).base_model
    samples = samples_of(processor)
    data = collated(processor, samples, packed=True)
    types = data["mm_token_type_ids"]
    found = image_rows.rope_positions(body, data, types, data["cumulative_len"][0])
    alone = [collated(processor, [sample], packed=False) for sample in samples]
    wanted = [
        image_rows.rope_positions(body, each, each["mm_token_type_ids"], None) for each in alone
    ]
    assert torch.equal(found, torch.cat(wanted, 2))
    assert not torch.equal(found[1], found[2])  # height and width
    assert torch.equal(wanted[1], torch.arange(wanted[1].shape[2]).expand(3, 1, -1))
    rows = collated(processor, samples, packed=False)
    padded = image_rows.rope_positions(body, rows, rows["mm_token_type_ids"], None)
    for row, each in enumerate(wanted):
        assert torch.equal(padded[:, row, : each.shape[2]], each[:, 0])


def test_images_and_their_tokens_come_together():
    types, images = torch.tensor([[0, 1, 0]]), {"pixel_values": torch.zeros(1)}
    image_rows.require_images({"images": images}, types)
    image_rows.require_images({}, torch.zeros_like(types))
    with pytest.raises(UserError, match="no images came"):
        image_rows.require_images({}, types)
    with pytest.raises(UserError, match="no image tokens"):
        image_rows.require_images({"images": images}, torch.zeros_like(types))


@pytest.mark.parametrize("is_apart", [True, False])
def test_samples_that_see_each_other_are_refused(is_apart):
    data = {
        "input_ids": torch.arange(1, 9)[None],
        "cumulative_len": [torch.tensor([0, 3, 5, 8], dtype=torch.int32)],
    }

    def forward(batch):
        ids = batch["input_ids"].float()
        order = torch.arange(1.0, 9)
        samples = (ids * order).split([3, 2, 3], dim=1) if is_apart else [ids * order]
        return torch.cat([each.cumsum(1) for each in samples], 1)[..., None]

    types = torch.zeros(1, 8, dtype=torch.long)
    types[0, 1] = 1
    if is_apart:
        image_rows.require_separate_samples(forward, data, types, "Model")
        return
    with pytest.raises(UserError, match="not computed separately by Model"):
        image_rows.require_separate_samples(forward, data, types, "Model")


def test_all_tensors_of_an_output():
    one, two = torch.zeros(2), torch.zeros(3)
    nested = {"a": one, "b": [None, (two, torch.zeros(1, dtype=torch.long))], "c": "text"}
    assert [len(each) for each in image_rows.float_tensors(nested)] == [2, 3]
