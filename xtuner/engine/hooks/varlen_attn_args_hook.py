"""The hook that configs for variable-length attention name; batches now carry what it carried."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class VarlenAttnArgsToMessageHubHook(Hook):
    """Does nothing.

    In XTuner v0.1 it passed ``cu_seqlens`` of packed samples to the attention through a global hub.
    Here every batch has them (``cumulative_len``, ``max_seqlen``) and the model hands them to its
    attention as arguments. The name stays so that configs which list the hook keep working.
    """
