"""Rows with images through the dataset and the collate function: as the processor alone does it."""

import itertools

import pytest
import torch
from datasets import load_dataset
from PIL import Image

from tests.dataset.vision_language.conftest import ROWS, SIZES, talk, write_rows
from tests.helpers.tiny import make_tokenizer
from xtuner.checkpoint.data_fingerprint import DataFingerprint
from xtuner.dataset import ConcatDataset, VisionLanguageDataset
from xtuner.dataset.collate_fns import default_collate_fn, vision_language_collate_fn
from xtuner.dataset.prepare.token_stats import all_token_stats, token_stats_of
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.dataset.vision_language.content_parts import conversation_of
from xtuner.registry import BUILDER
from xtuner.reporting.summary import lengths
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError

TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


def build(file, processor, **settings):
    source = dict(type=load_dataset, path="json", data_files=str(file))
    settings = dict(max_length=1024, pack_to_max_length=False) | settings
    return VisionLanguageDataset(source, processor, **settings)


def reference(processor, row, folder):
    """What transformers itself makes of a row."""
    found = conversation_of(row)
    text = processor.apply_chat_template(found.messages)
    images = [Image.open(folder / ref.place).convert("RGB") for ref in found.images]
    made = processor(
        text=[text],
        images=[images] if images else None,
        add_special_tokens=False,  # the template writes them
        return_tensors="pt",
    )
    types = made.get("mm_token_type_ids", made.get("token_type_ids"))
    if types is None:
        types = torch.tensor(processor.create_mm_token_type_ids(made["input_ids"].tolist()))
    rest = {name: value for name, value in made.items() if name not in TEXT_KEYS}
    return made["input_ids"][0], types[0], rest


def is_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_ids_types_and_pixels_equal_those_of_the_processor(photos, family):
    made = build(photos / "rows.jsonl", family)
    assert len(made) == len(ROWS)
    for number, row in enumerate(ROWS):
        batch = vision_language_collate_fn([made[number]], family)["data"]
        ids, types, images = reference(made.processor, row, photos)
        assert batch["input_ids"][0].tolist() == ids.tolist()
        assert batch["mm_token_type_ids"][0].tolist() == types.tolist()
        assert is_equal(dict(batch.get("images", {})), images)
        assert batch["images_per_sample"] == [len(row["images"])]
        labels = batch["labels"][0]
        assert not (types[labels != IGNORE_INDEX]).any()
        assert (labels != IGNORE_INDEX).any()


def test_packed_rows_hold_the_same_samples_with_their_images(photos, family):
    alone = build(photos / "rows.jsonl", family)
    longest = max(alone.length)
    packed = build(photos / "rows.jsonl", family, pack_to_max_length=True, max_length=longest * 2)
    assert len(packed) < len(alone) and max(packed.length) <= longest * 2
    rows = [packed[number] for number in range(len(packed))]
    batch = vision_language_collate_fn(rows, family, use_varlen_attn=True)["data"]
    order = batch["rows"]
    assert sorted(order) == list(range(len(ROWS))) and batch["parts"] == [0] * len(ROWS)
    samples = [alone[number] for number in order]
    expected = default_collate_fn(samples, use_varlen_attn=True)["data"]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], expected[name])
    assert torch.equal(batch["cumulative_len"][0], expected["cumulative_len"][0])
    assert batch["max_seqlen"] == longest
    assert batch["images_per_sample"] == [len(ROWS[number]["images"]) for number in order]
    single = vision_language_collate_fn(samples, family, use_varlen_attn=True)["data"]
    assert is_equal(dict(batch["images"]), dict(single["images"]))
    assert torch.equal(batch["mm_token_type_ids"], single["mm_token_type_ids"])
    bounds = itertools.pairwise(batch["cumulative_len"][0].tolist())
    for sample, (start, stop) in zip(samples, bounds, strict=True):
        types = alone.processor.create_mm_token_type_ids([sample["input_ids"]])[0]
        assert batch["mm_token_type_ids"][0, start:stop].tolist() == types


def test_a_template_that_rewrites_earlier_answers_gives_several_samples(photos, qwen, caplog):
    processor = BUILDER.build(qwen)
    is_earlier = "message['role'] == 'assistant' and not loop.last"
    end = f"{{{{ '!' if {is_earlier} else '<|im_end|>' }}}}"
    processor.chat_template = processor.chat_template.replace("<|im_end|>", end)
    made = build(photos / "rows.jsonl", processor)
    numbers = [number for (number,) in made.table["rows"]]
    assert numbers == [0, 1, 1, 2, 3, 4, 4]
    assert [len(made[n]["images"][0]) for n in range(7)] == [1, 2, 2, 0, 1, 1, 3]
    assert [image.size for image in made[6]["images"][0]] == [SIZES[n] for n in (4, 5, 0)]
    vision_language_collate_fn([made[n] for n in range(7)], processor)
    assert "not trained on" not in caplog.text
    assert all(set(made[n]["labels"]) != {IGNORE_INDEX} for n in range(7))
    processor.chat_template = processor.chat_template.replace("'image'", "'picture'")
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* 0 <\|image_pad\|> .* for 1 images"):
        build(photos / "rows.jsonl", processor, bad_rows="error")


def test_texts_with_tokens_of_images_are_refused(tmp_path, family):
    kind = family["name_or_path"].rpartition("/")[2]
    processor = BUILDER.build(family)
    soft = getattr(processor.tokenizer, "image_token", processor.image_token)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for token in {soft, processor.image_token} - {"<image>"}:
        rows = [{"images": ["a.png"], "messages": talk(f"<image> {token}", "Zap")}]
        with pytest.raises(UserError, match=r"no row is left(.*\n){4}.* in the text"):
            build(write_rows(tmp_path, rows, f"{kind}.jsonl"), family)


def test_a_padded_batch(photos, qwen):
    made = build(photos / "rows.jsonl", qwen)
    batch = vision_language_collate_fn([made[1], made[2]], qwen, pad_index=5)["data"]
    ids, second = made[1]["input_ids"], made[2]["input_ids"]
    assert batch["input_ids"].tolist() == [ids, second + [5] * (len(ids) - len(second))]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), len(second)]
    assert batch["images_per_sample"] == [2, 0]
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    plain = vision_language_collate_fn([made[1]], qwen, return_hf_format=True)
    assert {"pixel_values", "image_grid_thw", "input_ids"} <= set(plain)


def test_everything_but_placeholders_is_trained_where_asked(photos, family):
    made = build(photos / "rows.jsonl", family, train_on="everything")
    row = made[1]
    (types,) = made.processor.create_mm_token_type_ids([row["input_ids"]])
    for token, label, kind in zip(row["input_ids"], row["labels"], types, strict=True):
        assert label in (token, IGNORE_INDEX)
        assert not kind or label == IGNORE_INDEX
    untrained = row["labels"].count(IGNORE_INDEX)
    assert 0 < untrained < len(row["labels"]) // 2 + sum(types)


def test_long_rows_are_dropped_refused_or_shrunk_never_cut(tmp_path, qwen):
    for number in range(2):
        Image.new("RGB", (56, 56)).save(tmp_path / f"{number}.png")
    rows = [
        {"images": ["0.png", "1.png"], "messages": talk("<image><image>", "a")},
        {"images": ["0.png"], "messages": talk("<image>", "a")},
        {"images": ["0.png"], "messages": talk("<image>" + "long " * 50, "a")},
    ]
    file = write_rows(tmp_path, rows)
    whole = build(file, qwen)
    assert [row["images"][0][0].size for row in map(whole.__getitem__, range(3))] == [(56, 56)] * 3
    limit = whole.length[1] + 2
    dropped = build(file, qwen, max_length=limit)
    assert dropped.table["rows"][:] == [[1]]
    stats = token_stats_of(dropped.table)
    assert stats.dropped["too_long"] == [0, 2] and stats.tokens_dropped == sum(whole.length[::2])
    with pytest.raises(UserError, match=r"rows.jsonl:1 has \d+ tokens, more than max_length="):
        build(file, qwen, max_length=limit, long_samples="error")
    shrunk = build(file, qwen, max_length=limit, long_samples="shrink")
    assert shrunk.table["rows"][:] == [[0], [1]] and max(shrunk.length) <= limit
    small = shrunk[0]["images"][0]
    assert small[0].size == small[1].size and small[0].width < 56
    vision_language_collate_fn([shrunk[0]], qwen)  # the processor writes as many tokens


def test_images_are_scaled_down_to_max_pixels(photos, qwen):
    made = build(photos / "rows.jsonl", qwen, max_pixels=900)
    sizes = [image.size for number in range(5) for image in made[number]["images"][0]]
    assert all(width * height <= 900 for width, height in sizes)
    shapes = [SIZES[n] for n in (0, 1, 2, 3, 4, 5, 0)]
    for (width, height), (wide, high) in zip(sizes, shapes, strict=True):
        assert width / height == pytest.approx(wide / high, rel=0.15)
    assert sizes[5] == (28, 28)  # small enough as it is
    vision_language_collate_fn([made[number] for number in range(5)], qwen)


def test_an_image_that_breaks_off_or_changes_keeps_its_row_untrained(tmp_path, qwen, caplog):
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    for name in ("cut", "changed", "good"):
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    rows = [
        {"images": [f"{name}.png"], "messages": talk("<image>", name)}
        for name in ("cut", "changed", "good", "gone")
    ]
    Image.fromarray(noise).save(tmp_path / "gone.png")
    file = write_rows(tmp_path, rows)
    packed = build(file, qwen, pack_to_max_length=True, shuffle_before_pack=False)
    Image.new("RGB", (99, 20)).save(tmp_path / "changed.png")
    (tmp_path / "gone.png").unlink()
    row = packed[0]
    assert row["rows"] == [0, 1, 2, 3]
    bounds = list(itertools.pairwise(row["cumulative_len"]))
    trained = [any(x != IGNORE_INDEX for x in row["labels"][a:b]) for a, b in bounds]
    assert trained == [False, False, True, False]
    lines = [line for line in caplog.text.splitlines() if "not trained on" in line]
    for number, why in ((1, "cut.png"), (2, "it is 99 x 20, and was 64 x 64"), (4, "No such file")):
        assert any(f"rows.jsonl:{number}: " in line and why in line for line in lines)
    assert len(lines) == 3
    batch = vision_language_collate_fn([row], qwen, use_varlen_attn=True)["data"]
    assert batch["images_per_sample"] == [1, 1, 1, 1]


def test_the_cost_of_rows_counts_pixels_and_sorts_batches(photos, qwen):
    made = build(photos / "rows.jsonl", qwen)
    assert [cost > 0 for cost in made.modality_length] == [True, True, False, True, True]
    pixels = sum(SIZES[n][0] * SIZES[n][1] for n in (4, 5, 0)) // 28**2
    assert made.modality_length[4] == made.length[4] + pixels
    both = ConcatDataset([made, made])
    assert both[5]["part"] == 1
    sampler = LengthGroupedSampler(both, 2, length_property="modality_length", seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(10))
    kinds = [both.modality_length[n] > 0 for n in order]
    assert all(a == b for a, b in zip(kinds[::2], kinds[1::2], strict=True))


def test_what_looks_at_rows_before_a_run_decodes_no_images(photos, qwen, monkeypatch):
    from xtuner.dataset.vision_language import dataset

    made = build(photos / "rows.jsonl", qwen, max_length=999)
    monkeypatch.delattr(dataset, "decode_image")
    both = ConcatDataset([made, made])
    assert DataFingerprint.of(made).rows == 5 and DataFingerprint.of(both).rows == 10
    other = build(photos / "rows.jsonl", qwen, max_length=999, train_on="everything")
    assert DataFingerprint.of(made) != DataFingerprint.of(other)
    assert [stats.rows_trained for stats in all_token_stats(both)] == [5, 5]
    assert list(lengths(made)) == made.length
    assert ConcatDataset([[1], [2]]).table is None


def test_train_and_val_rows_are_apart_and_limits_hold(photos, qwen):
    settings = dict(val_size=2, seed=1)
    train = build(photos / "rows.jsonl", qwen, **settings)
    val = build(photos / "rows.jsonl", qwen, part="val", **settings)
    numbers = [n for part in (train, val) for (n,) in part.table["rows"]]
    assert sorted(numbers) == list(range(5)) and len(val) == 2
    assert len(build(photos / "rows.jsonl", qwen, max_dataset_length=3)) == 3


def test_prepared_once_and_again_after_a_change(photos, qwen, monkeypatch):
    from xtuner.dataset.vision_language import dataset

    build(photos / "rows.jsonl", qwen, max_length=777)
    prepared = []
    own = dataset.encode_image_rows
    monkeypatch.setattr(
        dataset, "encode_image_rows", lambda *args: prepared.append(1) or own(*args)
    )
    build(photos / "rows.jsonl", qwen, max_length=777)
    assert not prepared
    other = {**qwen, "max_pixels": 900}
    for number, settings in enumerate(
        [{"max_pixels": 10_000}, {"image_folder": f"{photos}/../{photos.name}/."}, {}]
    ):
        build(photos / "rows.jsonl", qwen if settings else other, max_length=777, **settings)
        assert len(prepared) == (1, 1, 2)[number]  # a folder by another name is the same


def test_what_is_no_processor_for_images_is_refused(photos, qwen):
    with pytest.raises(UserError, match="reads text alone, no images"):
        build(photos / "rows.jsonl", make_tokenizer())
    with pytest.raises(UserError, match=r"long_samples: expected .* got 'cut'"):
        build(photos / "rows.jsonl", qwen, long_samples="cut")
    with pytest.raises(UserError, match="no row is left"):
        build(photos / "rows.jsonl", qwen, max_length=3)


def test_another_processor_for_the_batch_is_refused(photos, qwen, processor_folder):
    made = build(photos / "rows.jsonl", qwen)
    other = dict(qwen, name_or_path=str(processor_folder("mistral3")))
    with pytest.raises(UserError, match="writes other placeholders"):
        vision_language_collate_fn([made[4]], other)
