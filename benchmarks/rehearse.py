"""``xtuner rehearse`` for one config of each of 40 families: is every stage green, and how long?

    python benchmarks/rehearse.py            # those that the result does not have yet
    python benchmarks/rehearse.py llama lfm2 # these, again

Each family has the sizes of its class's defaults, without weights; the vocabulary is that of a
small tokenizer. Results are kept in ``benchmarks/results/rehearse.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks" / "results" / "rehearse.json"
VOCABULARY = 512
KINDS = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "qwen3_5_text", "qwen3_next", "gemma"),
    *("gemma2", "gemma3_text", "mistral", "mixtral", "phi", "phi3", "phimoe", "glm", "glm4"),
    *("glm4_moe", "cohere", "cohere2", "smollm3", "olmo2", "olmo3", "olmoe", "granite"),
    *("granitemoehybrid", "starcoder2", "gpt_oss", "lfm2", "nemotron_h", "seed_oss", "ernie4_5"),
    *("exaone4", "hunyuan_v1_dense", "apertus", "falcon_h1", "bamba", "deepseek_v2"),
    *("deepseek_v3", "gpt2"),
)
"""A ``model_type`` of each family."""
SETTINGS: dict[str, dict[str, object]] = {
    # the class's default has no attention layer, and transformers cannot generate with it
    "granitemoehybrid": {"layer_types": 4 * (5 * ["mamba"] + ["attention"] + 2 * ["mamba"])},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    # defaults that its published files always set
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 64,
    },
    "hunyuan_v1_dense": {
        "head_dim": 128,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
}
"""Of families whose defaults are no model that is published."""


def rehearse(kind: str, folder: Path) -> dict[str, object]:
    """Rehearse a LoRA config on a family; give the states and seconds of the stages."""
    from transformers import AutoConfig

    from tests.helpers.tiny import make_tokenizer
    from tests.proving.bases import LORA, document, options, save_rows
    from xtuner.proving.rehearsal import Rehearsal

    base = folder / "base"
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = special | SETTINGS.get(kind, {})
    AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    given = document(LORA, options(base, save_rows(folder / "rows.jsonl", 40)))
    out = folder / "out"
    out.mkdir()
    began = time.perf_counter()
    stages = [*Rehearsal(given, out).run()]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "failed": [[s.name, s.cause] for s in stages if s.state == "failed"],
        "build": next((s.detail for s in stages if s.name == "build"), ""),
        "stages": {s.name: [s.state, round(s.seconds, 1)] for s in stages},
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help="families to rehearse again (default: new ones)")
    args = parser.parse_args()
    found = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    for kind in args.kinds or [kind for kind in KINDS if kind not in found]:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = rehearse(kind, Path(folder))
        RESULT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", "utf-8")
        print(kind, found[kind]["seconds"], found[kind]["failed"] or "green", flush=True)


if __name__ == "__main__":
    main()
