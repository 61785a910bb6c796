"""Peak memory of convert and merge on a model of four shards, beyond the interpreter's own.

Usage: ``python benchmarks/convert_memory.py [--shard-mb 256]``

Makes a Llama of four shards, a full checkpoint of it and a LoRA adapter; runs the two commands and,
as the interpreter's own, the same imports without work, each in a process of its own; writes
``benchmarks/results/convert_memory.json``. The bound is 1.5 shards.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "convert_memory.json"
BOUND = 1.5

# ru_maxrss of a child starts at its parent's, so the peak is read from the kernel's own counter.
MEASURE = """
import sys
from xtuner.entry_point import main
{work}
peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]
print('PEAK', int(peak) * 1024)
"""
IMPORTS = """
import torch, mmengine, safetensors.torch, peft, transformers, rich.progress
from transformers import LlamaForCausalLM
from peft import LoraConfig, get_peft_model
import xtuner.config, xtuner.checkpoint.checkpoint
with torch.device('meta'):
    from transformers import LlamaConfig
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=8)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **small))
    get_peft_model(model, LoraConfig(target_modules=['q_proj']))
torch.ones(64, 64) @ torch.ones(64, 64)
"""
CONFIG = """
from transformers import AutoModelForCausalLM
from {module} import {name} as Model

model = dict(
    type=Model,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path={base!r}),
)
"""


def make_inputs(folder: Path, shard: int) -> None:
    """Write ``base``, ``adapter`` and ``work/iter_1.pth``, each of about four shards or small."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = 1024, 4 * shard // (2 * 12 * 1024 * 1024)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=(12 * hidden * hidden - 4 * hidden * hidden) // (3 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    (folder / "work").mkdir()
    state = {f"llm.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, folder / "work" / "iter_1.pth")
    adapter = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    adapter.save_pretrained(folder / "adapter")


def peak_of(work: str) -> int:
    """Peak resident bytes of a fresh interpreter doing ``work``."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(work=work)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return int(done.stdout.rpartition("PEAK")[2])


def command(*words: object) -> str:
    return f"status = main({[str(word) for word in words]!r})\nassert status == 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard-mb", type=int, default=256)
    parser.add_argument("--model", default="xtuner.model.SupervisedFinetune")
    args = parser.parse_args()
    shard = args.shard_mb * 10**6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = [sys.executable, __file__, "--write", name, str(shard)]
        subprocess.run(writer, check=True, capture_output=True)
        module, _, model = args.model.rpartition(".")
        config = folder / "work" / "config.py"
        config.write_text(CONFIG.format(module=module, name=model, base=str(folder / "base")))
        size = f"{args.shard_mb}MB"
        flags = ("--max-shard-size", size, "--no-verify")
        work = {
            "convert": command(
                "convert", "pth_to_hf", folder / "work" / "iter_1.pth", folder / "hf", *flags
            ),
            "merge": command(
                "convert", "merge", folder / "base", folder / "adapter", folder / "out", *flags
            ),
        }
        own = peak_of(IMPORTS)
        peaks = {name: peak_of(text) for name, text in work.items()}
        shards = len(list((folder / "base").glob("*.safetensors")))
    beyond = {name: round((peak - own) / shard, 2) for name, peak in peaks.items()}
    result = {
        "shard_bytes": shard,
        "shards": shards,
        "interpreter_bytes": own,
        "peak_bytes": peaks,
        "shards_beyond_interpreter": beyond,
        "bound": BOUND,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    raise SystemExit(any(share > BOUND for share in beyond.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        make_inputs(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
