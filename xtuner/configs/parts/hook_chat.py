"""Asks the model now and then."""

from xtuner.engine.hooks import EvaluateChatHook

hook = dict(
    type=EvaluateChatHook,
    tokenizer=tokenizer,
    **IMAGE_FIELDS_HERE,
    every_n_iters=evaluation_freq,
    **HOOK_FIELDS_HERE,
    evaluation_inputs=evaluation_inputs,
    system=SYSTEM,
    **PROMPT_TEMPLATE_HERE,
)
