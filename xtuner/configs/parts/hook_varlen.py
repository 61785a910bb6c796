"""Where packed samples end."""

from xtuner.engine.hooks import VarlenAttnArgsToMessageHubHook

hook = dict(type=VarlenAttnArgsToMessageHubHook)
