"""Batches of the dataset through the model: packed = padded, images read in a worker process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from tests.helpers.image_text import image_text_folder
from xtuner.dataset import VisionLanguageDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.model import VisionLanguageFinetune
from xtuner.tokenization.processor import load_processor


@pytest.mark.parametrize("kind", ["llava_onevision", "gemma3"])
def test_the_loss_of_packed_rows_is_that_of_padded_ones(kind, photos):
    folder = str(image_text_folder(kind))
    processor = dict(type=load_processor, name_or_path=folder)
    source = dict(type=load_dataset, path="json", data_files=str(photos / "rows.jsonl"))
    losses = []
    for packed in (False, True):
        llm = dict(
            type=AutoModelForImageTextToText.from_pretrained,
            pretrained_model_name_or_path=folder,
            dtype=torch.float32,
        )
        rows = VisionLanguageDataset(source, processor, 1024, pack_to_max_length=packed)
        collate = partial(vision_language_collate_fn, processor=processor, use_varlen_attn=packed)
        workers = int(packed)
        batch = next(iter(DataLoader(rows, len(rows), num_workers=workers, collate_fn=collate)))
        model = VisionLanguageFinetune(llm=llm, processor=processor, use_varlen_attn=packed)
        items = model.num_items(batch["data"])
        losses.append(model(**batch, mode="loss", num_items_in_batch=items)["loss"])
    assert losses[0].item() > 5
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
