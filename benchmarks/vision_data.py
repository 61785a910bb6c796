"""Preparing rows with images: rows per second and peak memory, beside TRL's collator.

* ours: ``VisionLanguageDataset`` tokenises and packs the rows. It counts the tokens of images by
  the headers of their files, and decodes none; the data loader's workers do that while a model
  trains.
* trl: ``DataCollatorForVisionLanguageModeling``, as ``SFTTrainer`` calls it, in a ``DataLoader``
  with as many processes, on the first rows. The length of a row is known when its images are
  decoded and processed. ms-swift encodes rows so before it packs them.

Rows ask one question about one photo (some about two, some about none). Photos are JPEG files of
many sizes, each row has its own. The processor is Qwen2.5-VL's with its own settings, its tokenizer
trained on the rows. Each way runs in a new process without a cache, in turns.
Writes ``results/vision_data.json``.

    pip install --no-deps --target /tmp/trl trl
    PYTHONPATH=/tmp/trl python benchmarks/vision_data.py [--rows 20000] [--photos 400] [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data import PeakMemory

RESULTS = Path(__file__).parent / "results" / "vision_data.json"
MAX_LENGTH, PROCESSES, BATCH = 4096, 2, 8
MAX_PIXELS = 1280 * 28 * 28
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(folder: Path, count: int, photos: int) -> None:
    """``rows.jsonl`` and the photos, a file for each row and image."""
    import numpy as np
    from PIL import Image

    draw = random.Random(0)
    noise = np.random.default_rng(0)
    made = folder / "made"
    made.mkdir()
    for number in range(photos):
        width, height = draw.randint(320, 1280), draw.randint(320, 1280)
        blocks = noise.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        photo = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        photo.save(made / f"{number}.jpg", quality=85)
    (folder / "photos").mkdir()
    words = [f"w{number}" for number in range(2000)]
    with (folder / "rows.jsonl").open("w") as stream:
        for row in range(count):
            names = [f"{row}_{place}.jpg" for place in range(draw.choice((1,) * 7 + (2, 2, 0)))]
            for name in names:
                os.link(made / f"{draw.randrange(photos)}.jpg", folder / "photos" / name)
            question = " ".join(["<image>"] * len(names) + draw.choices(words, k=20))
            answer = " ".join(draw.choices(words, k=60))
            talk = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"images": names, "messages": talk}) + "\n")


def make_processor(folder: Path) -> None:
    """Qwen2.5-VL's processor with a tokenizer that is trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    with (folder / "rows.jsonl").open() as stream:
        lines = [line for line, _ in zip(stream, range(2000), strict=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", *SPECIAL, "<|video_pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(lines, trainer)
    target = folder / "processor"
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>"
    ).save_pretrained(target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    pixels = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    pixels |= {"min_pixels": 56 * 56, "max_pixels": MAX_PIXELS}
    kinds = {"image": "Qwen2VLImageProcessor", "video": "Qwen2VLVideoProcessor"}
    for kind, name in kinds.items():
        file = "preprocessor_config.json" if kind == "image" else "video_preprocessor_config.json"
        own = {f"{kind}_processor_type": name, "processor_class": "Qwen2_5_VLProcessor", **pixels}
        (target / file).write_text(json.dumps(own))


def ours(folder: Path, count: int) -> int:
    """Through XTuner; how many tokens the rows have."""
    from datasets import load_dataset

    from xtuner.dataset import VisionLanguageDataset
    from xtuner.tokenization.processor import load_processor

    made = VisionLanguageDataset(
        dict(type=load_dataset, path="json", data_files=str(folder / "rows.jsonl")),
        dict(type=load_processor, name_or_path=str(folder / "processor")),
        image_folder=str(folder / "photos"),
        max_length=MAX_LENGTH,
        map_num_proc=PROCESSES,
    )
    return sum(made.length)


def with_trl(folder: Path, count: int) -> int:
    """Through TRL's collator, batch by batch; how many tokens the first rows have."""
    from datasets import load_dataset
    from PIL import Image
    from torch.utils.data import DataLoader
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from xtuner.tokenization.processor import load_processor

    collate = DataCollatorForVisionLanguageModeling(
        load_processor(str(folder / "processor")), completion_only_loss=True
    )

    def to_batch(rows: list[dict[str, Any]]) -> Any:
        return collate([to_example(row) for row in rows])

    def to_example(row: dict[str, Any]) -> dict[str, Any]:
        question, answer = row["messages"]
        prompt = [{**question, "content": question["content"].replace("<image>", "").strip()}]
        images = [Image.open(folder / "photos" / name).convert("RGB") for name in row["images"]]
        return {
            "images": images,
            "prompt": prompt,
            "completion": [answer],
        }

    part = f"train[:{count}]"
    rows: Any = load_dataset("json", data_files=str(folder / "rows.jsonl"), split=part)
    loader: Any = DataLoader(rows, BATCH, num_workers=PROCESSES, collate_fn=to_batch)
    return sum(int(batch["attention_mask"].sum()) for batch in loader)


WAYS: dict[str, Callable[[Path, int], int]] = {"ours": ours, "trl": with_trl}


def measure_here(way: str, folder: Path, count: int) -> dict[str, float]:
    """Prepare the rows once; called in a process of its own."""
    import datasets

    datasets.disable_progress_bars()
    peak = PeakMemory()
    peak.start()
    begin, used = time.perf_counter(), sum(os.times()[:4])
    tokens = WAYS[way](folder, count)
    seconds, used = time.perf_counter() - begin, sum(os.times()[:4]) - used
    return {
        "rows": count,
        "rows_per_second": round(count / seconds, 1),
        "rows_per_cpu_second": round(count / used, 1),
        "peak_mib": round(peak.bytes / 2**20),
        "tokens": tokens,
    }


def measure(way: str, folder: Path, count: int) -> dict[str, float]:
    """The same in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        caches = {"XTUNER_CACHE": f"{cache}/xtuner", "HF_DATASETS_CACHE": f"{cache}/hf"}
        done = subprocess.run(
            [sys.executable, __file__, "--way", way, "--folder", str(folder), "--rows", str(count)],
            env=os.environ | caches | {"TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure; write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--trl-rows", type=int, default=2000, help="TRL takes the first of them")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure_here(args.way, args.folder, args.rows)))
        return 0
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        make_rows(Path(name), args.rows, args.photos)
        make_processor(Path(name))
        for number in range(args.rounds):
            for way in WAYS:
                count = min(args.rows, args.trl_rows) if way == "trl" else args.rows
                found[way].append(measure(way, Path(name), count))
                print(f"round {number + 1}, {way}: {found[way][-1]}", flush=True)
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for way, runs in found.items()
    }
    one, other = medians.values()
    faster = {
        key: round(one[key] / other[key], 1) for key in ("rows_per_second", "rows_per_cpu_second")
    }
    result = {
        "date": date.today().isoformat(),
        "command": f"python benchmarks/vision_data.py {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "versions": {name: version(name) for name in ("datasets", "transformers", "trl", "pillow")},
        "medians": medians,
        "ours_is_faster_by": faster,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"ours is faster by {faster}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
