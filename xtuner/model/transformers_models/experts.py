"""Keywords that v0.1 gave to its own mixture-of-experts classes, on transformers' classes."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class PublishedExperts:
    """Adds the published keywords of ``from_pretrained``; the weights are transformers' own.

    transformers 5 keeps all experts of a layer in one tensor, which is what
    ``moe_implementation='shard'`` was for; so the keywords change nothing any more.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: object,
        moe_implementation: str = "origin",
        expert_in_one_shard: int | None = None,
        **settings: object,
    ) -> Any:
        """Load a model as transformers does.

        Args:
            pretrained_model_name_or_path: hub name or folder.
            *args: handed on.
            moe_implementation: ``origin`` or ``shard``; both mean transformers' grouped experts.
            expert_in_one_shard: accepted for published configs.
            **settings: handed on.

        Raises:
            ValueError: for another ``moe_implementation``.
        """
        if moe_implementation not in ("origin", "shard"):
            raise ValueError(f"moe_implementation={moe_implementation!r}; there are: origin, shard")
        settings.pop("trust_remote_code", None)  # the class is transformers' own
        loader: Any = super()
        return loader.from_pretrained(pretrained_model_name_or_path, *args, **settings)
