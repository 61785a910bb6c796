"""Sequence parallelism (DeepSpeed-Ulysses): the ranks of a group hold a shard of each row.

Everything but attention works on single tokens, so that a rank computes it for its own shard.
Around attention an all-to-all gives each rank all tokens of some heads, and another one takes the
result back.

``groups``: the process groups. ``shard``: the part of a micro-batch that a rank computes.
``heads``: the all-to-all around attention. The rest are v0.1's functions for users' own code.
"""

from xtuner.utils.lazy import lazy_exports

EXPORTS = {
    "attention": (
        "post_process_for_sequence_parallel_attn",
        "pre_process_for_sequence_parallel_attn",
        "sequence_parallel_wrapper",
    ),
    "collectives": (
        "all_to_all",
        "gather_for_sequence_parallel",
        "gather_forward_split_backward",
        "split_for_sequence_parallel",
        "split_forward_gather_backward",
    ),
    "groups": (
        "get_data_parallel_group",
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_inner_sequence_parallel_group",
        "get_inner_sequence_parallel_rank",
        "get_inner_sequence_parallel_world_size",
        "get_sequence_parallel_group",
        "get_sequence_parallel_rank",
        "get_sequence_parallel_world_size",
        "init_dist",
        "init_inner_sequence_parallel",
        "init_sequence_parallel",
        "is_inner_sequence_parallel_initialized",
    ),
    "loss": ("reduce_sequence_parallel_loss",),
    "padding": ("pad_cumulative_len_for_sequence_parallel", "pad_for_sequence_parallel"),
    "sampler": ("SequenceParallelSampler",),
}
__getattr__, __dir__, __all__ = lazy_exports(__name__, EXPORTS)
