"""An exported model in a fresh process, with transformers and peft alone: logits, an answer, stops.

``python -m xtuner.proving.fresh`` imports the libraries, then reads one request as a line of JSON
and prints one answer as a line of JSON. Nothing else of XTuner is imported, unless the model's
family is one that transformers lacks.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

FORCED_AT = 3
"""After how many new tokens a stop is forced."""


def main() -> int:
    """Answer the request."""
    import peft  # noqa: F401  while the rehearsal trains
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(answer(json.loads(sys.stdin.readline()))), flush=True)
    return 0


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load, compare and generate.

    Args:
        request: ``base``, ``adapter``, ``merged`` and ``tokenizer`` (folders), ``expected`` (a file
            of logits), ``ids``, ``stops``, ``question``, ``new_tokens``, ``class`` (the name of
            the one that was trained), ``own_classes`` and ``trusted`` (whether the folders' code
            may run).

    Returns:
        ``differences``, ``tokens`` and ``missed``; or ``step`` (``load`` or ``generate``) and
        ``error`` where one failed.
    """
    found: dict[str, Any] = {}
    step = "load"
    try:
        if request["own_classes"]:
            from xtuner.model.transformers_models import auto  # noqa: F401  registers families
        model = _load(request)
        found["differences"] = _differences(request, model)
        step = "generate"
        found |= _generated(request, model)
    except Exception as error:  # of a folder that may have any fault
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        found |= {"step": step, "error": f"{type(error).__name__}: {first}"}
    return found


def _load(request: Mapping[str, Any]) -> Any:
    """The base with its adapter, or the whole model, in float32."""
    import torch

    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: Any = _auto_class(request).from_pretrained(
        request["base"], trust_remote_code=request["trusted"], **settings
    )
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    return model.eval()


def _auto_class(request: Mapping[str, Any]) -> Any:
    """The Auto class of transformers that gives the class that was trained."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = request["class"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _differences(request: Mapping[str, Any], model: Any) -> dict[str, float]:
    """Largest differences of logits, relative to the largest logit."""
    import torch
    from safetensors.torch import load_file

    ids = torch.tensor(request["ids"])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        found = {}
        if request["expected"]:
            expected = load_file(request["expected"])["logits"]
            found["trained"] = _relative(logits, expected)
        if request["merged"]:
            merged: Any = _auto_class(request).from_pretrained(
                request["merged"],
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=request["trusted"],
            )
            found["merged"] = _relative(
                merged.eval()(input_ids=ids, use_cache=False).logits, logits
            )
    return found


def _relative(found: Tensor, wanted: Tensor) -> float:
    size = min(found.shape[-1], wanted.shape[-1])
    gap = (found[..., :size] - wanted[..., :size]).abs().max()
    return float(gap / wanted.abs().max())


def _generated(request: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A short answer, and whether generation ends at each token that ends one."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(
        request["tokenizer"], trust_remote_code=request["trusted"]
    )
    question = request["question"]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(question, return_tensors="pt").input_ids
    try:
        saved = GenerationConfig.from_pretrained(request["tokenizer"])
    except OSError:  # nothing is said beside the model's own
        saved = GenerationConfig.from_model_config(model.config)
    saved.do_sample, saved.max_new_tokens = False, request["new_tokens"]
    saved.temperature = saved.top_p = saved.top_k = None
    with torch.no_grad():
        answer = model.generate(ids, generation_config=saved)[0, ids.shape[1] :]
        missed = [
            stop for stop in request["stops"] if len(_forced(model, ids, saved, stop)) != FORCED_AT
        ]
    return {"tokens": len(answer), "missed": missed}


def _forced(model: PreTrainedModel, ids: Tensor, settings: GenerationConfig, stop: int) -> Any:
    """New tokens where the third one is forced to be ``stop``; more where that does not end it."""
    import torch
    from transformers import LogitsProcessor

    eos = settings.eos_token_id
    ends = {stop, *(eos if isinstance(eos, list) else [eos])}

    class Force(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Leave one token; no other stop may come before it."""
            place = input_ids.shape[1] - ids.shape[1] + 1
            forced = torch.full_like(scores, -torch.inf)
            free = next(n for n in range(scores.shape[-1]) if n not in ends)
            forced[:, stop if place == FORCED_AT else free] = 0.0
            return forced

    longer = {"max_new_tokens": FORCED_AT + 3}
    generate: Any = model.generate
    found = generate(ids, generation_config=settings, logits_processor=[Force()], **longer)
    return found[0, ids.shape[1] :]


if __name__ == "__main__":
    sys.exit(main())
