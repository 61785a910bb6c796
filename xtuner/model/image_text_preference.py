"""DPO of a vision-language model: two answers about the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xtuner.model.dpo import DPO
from xtuner.model.image_text import VisionLanguageModel
from xtuner.model.modules import image_rows
from xtuner.model.preference import CompletionLogps
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VisionLanguageDPO(VisionLanguageModel, DPO):
    """Direct preference optimization of a vision-language model.

    Loss and reference as ``DPO``, images as ``VisionLanguageFinetune``; arguments of both classes.
    Batches are pairs of ``VisionLanguagePreferenceDataset``.

    Raises:
        UserError: for ``precompute_reference``, which rows with images do not have.
    """

    def __init__(self, *args: Any, precompute_reference: bool = False, **kwargs: Any) -> None:
        if precompute_reference:
            raise UserError(
                tr("the reference's values of rows with images are not computed in advance."),
                hint=tr("remove precompute_reference."),
                where=Where(key="model.precompute_reference"),
            )
        super().__init__(*args, **kwargs)

    def _computing_models(self) -> Iterator[PreTrainedModel]:
        yield from super()._computing_models()
        if self.ref_llm is not None:
            yield self.ref_llm

    def completion_logps(self, data: Batch, llm: PreTrainedModel | None = None) -> CompletionLogps:
        """As ``DPO``, images included."""
        with self._blank_image(data, llm), image_rows.explained():
            return super().completion_logps(self._with_positions(data), llm)

    def reference_logps(self, data: Batch) -> Tensor:
        """As ``DPO``, images included."""
        return super().reference_logps(self._with_positions(data))
