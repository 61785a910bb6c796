"""DPO, ORPO and reward models of vision-language models: two answers about the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xtuner.model.dpo import DPO
from xtuner.model.image_text import VisionLanguageModel
from xtuner.model.modules import image_rows
from xtuner.model.orpo import ORPO
from xtuner.model.preference import CompletionLogps, PreferenceModel
from xtuner.model.reward import RewardModel
from xtuner.model.reward_classes import require_image_classifier
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _VisionLanguagePreference(VisionLanguageModel, PreferenceModel):
    """What losses of pairs of ``VisionLanguagePreferenceDataset`` have in common."""

    def completion_logps(self, data: Batch, llm: PreTrainedModel | None = None) -> CompletionLogps:
        """As ``PreferenceModel``, images included."""
        data = self._with_positions(data)
        self.shard(data)  # probes the first rows, which is done with text alone on all ranks
        with self._blank_image(data, llm), image_rows.explained():
            return super().completion_logps(data, llm)


class VisionLanguageORPO(_VisionLanguagePreference, ORPO):
    """Odds-ratio preference optimization of a vision-language model.

    Loss as ``ORPO``, images as ``VisionLanguageFinetune``; arguments of both classes.
    """


class VisionLanguageDPO(_VisionLanguagePreference, DPO):
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

    def reference_logps(self, data: Batch) -> Tensor:
        """As ``DPO``, images included."""
        return super().reference_logps(self._with_positions(data))


class VisionLanguageRewardModel(VisionLanguageModel, RewardModel):
    """A reward model of a vision-language model.

    Loss and head as ``RewardModel``, images as ``VisionLanguageFinetune``; arguments of both
    classes. Batches are pairs of ``VisionLanguagePreferenceDataset(is_reward=True, ...)``.

    Raises:
        UserError: for a family that transformers has no sequence classifier with images for: no
            other program could load the result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_image_classifier(self.causal_lm.config)
