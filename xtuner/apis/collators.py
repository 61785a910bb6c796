"""The collators of the known datasets. They are one and the same; each name is published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def data_collator(return_hf_format: bool = True) -> Callable[..., Any]:
    """A function that makes a batch of rows.

    Args:
        return_hf_format: give the tensors as ``Trainer`` wants them, else under ``data``.
    """
    from xtuner.dataset.collate_fns import default_collate_fn

    return partial(default_collate_fn, return_hf_format=return_hf_format)


alpaca_data_collator = data_collator
alpaca_enzh_data_collator = data_collator
alpaca_zh_data_collator = data_collator
arxiv_data_collator = data_collator
code_alpaca_data_collator = data_collator
colorist_data_collator = data_collator
lawyer_data_collator = data_collator
lawyer_crime_data_collator = data_collator
lawyer_reference_data_collator = data_collator
medical_data_collator = data_collator
moss_003_sft_data_collator = data_collator
moss_003_sft_no_plugins_data_collator = data_collator
moss_003_sft_plugins_data_collator = data_collator
oasst1_data_collator = data_collator
openorca_data_collator = data_collator
sql_data_collator = data_collator
tiny_codes_data_collator = data_collator
wizardlm_data_collator = data_collator
