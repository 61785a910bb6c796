"""Process groups, and sequence parallelism: several ranks share each row."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "processes": ("join_alone", "join_processes"),
        "sequence.attention": (
            "post_process_for_sequence_parallel_attn",
            "pre_process_for_sequence_parallel_attn",
            "sequence_parallel_wrapper",
        ),
        "sequence.collectives": (
            "all_to_all",
            "gather_for_sequence_parallel",
            "gather_forward_split_backward",
            "split_for_sequence_parallel",
            "split_forward_gather_backward",
        ),
        "sequence.groups": (
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
        "sequence.loss": ("reduce_sequence_parallel_loss",),
        "sequence.padding": (
            "pad_cumulative_len_for_sequence_parallel",
            "pad_for_sequence_parallel",
        ),
        "sequence.sampler": ("SequenceParallelSampler",),
    },
)
