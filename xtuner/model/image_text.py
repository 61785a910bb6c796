"""Fine-tuning of vision-language models: any class of ``AutoModelForImageTextToText``."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.base import (
    FinetuneModel,
    outputs_of,
    packed_cu_seqlens,
    trained_weights,
    use_our_attention,
)
from xtuner.model.loading import REPLACED, is_zero3_init_enabled
from xtuner.model.modules import attention, image_rows
from xtuner.model.modules.vision_parts import (
    VisionParts,
    add_encoder_targets,
    keep_vision_unquantized,
    modules_to_save,
    outermost,
    trained_by,
    use_attention_in_encoders,
)
from xtuner.model.probe import is_sharded
from xtuner.model.sft import SupervisedFinetune
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin

BLANK = 32
"""Pixels of a side of the image that stands for none, before the processor resizes it."""

IMAGES, VIDEOS = "pixel_values", "pixel_values_videos"
"""What a class takes of images and of videos."""
NOT_USED = frozenset(("last_hidden_state", "hidden_states", "attentions"))
"""Of the outputs of ``get_image_features``: what the visual encoder gives, before the projector."""


class VisionLanguageModel(FinetuneModel):
    """What vision-language models have in common, whatever their loss.

    Rows of text, rows with images and both in one batch. Weights of the visual encoder and the
    projector are found by the model's structure; in a batch without images they get gradients of 0,
    so that several processes make the same calls.

    Args:
        llm: ``dict(type=AutoModelForImageTextToText.from_pretrained, ...)`` or a built model.
        lora: as ``FinetuneModel``; layers of the language model alone are adapted.
        processor: ``dict(type=load_processor, name_or_path=...)`` or a built processor: its
            tokenizer is the model's, and it is saved with the model.
        freeze_visual_encoder: do not train the weights of the visual encoder.
        freeze_projector: do not train the weights between visual encoder and language model.
        freeze_llm: do not train the language model.
        visual_encoder_lora: ``dict(type=LoraConfig, ...)``: adapt the visual encoder, too, with
            this rank and alpha; it is one adapter with that of ``lora``.
        **kwargs: of the class that has the loss.

    Raises:
        UserError: when there is no processor or no visual encoder, nothing is to be trained, or
            ranks share rows.
    """

    lengthens_rows = False
    """See ``vision_language.VisionLanguageModel``."""
    _blank: Any = None
    """A blank image as ``get_image_features`` takes it."""
    _computes_blanks: bool | None = None
    """Whether a batch without images has a blank one; None until the first such batch."""
    _encoder_calls = 1
    """How often every process calls the visual encoder in a batch."""
    _unreached: Collection[str] = ()
    """Names of weights that were to be trained, and that no image reaches."""

    def __init__(
        self,
        llm: Mapping[str, Any] | torch.nn.Module,
        lora: Mapping[str, Any] | LoraConfig | None = None,
        *,
        processor: Mapping[str, Any] | ProcessorMixin | None = None,
        freeze_visual_encoder: bool = True,
        freeze_projector: bool = True,
        freeze_llm: bool = False,
        visual_encoder_lora: Mapping[str, Any] | LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        processor = _built(processor)
        _require_processor(processor)
        _require_whole_rows()
        adapter, encoder_lora = _built(lora), _built(visual_encoder_lora)
        _require_consistent(adapter, encoder_lora, freeze_visual_encoder, freeze_llm)
        self._encoder_lora = encoder_lora
        self._freeze = {
            "visual_encoder": freeze_visual_encoder,
            "projector": freeze_projector,
            "language_model": freeze_llm,
            "other": True,
        }
        kwargs.setdefault("tokenizer", getattr(processor, "tokenizer", None))
        llm = keep_vision_unquantized(llm) if isinstance(llm, Mapping) else llm
        super().__init__(llm, lora=adapter or copy.copy(encoder_lora), **kwargs)
        self.processor = processor
        body = self.causal_lm.base_model
        self._arguments = image_rows.arguments(body.forward)
        self._has_3d_positions = hasattr(body, "get_rope_index")
        self._require_known_inputs()
        self._use_exact_attention()
        self._trains_vision = self._freeze_unreached()
        if not any(weight.requires_grad for weight in self.parameters()):
            raise UserError(
                tr("nothing is trained: all parts of the model are frozen."),
                hint=tr("set freeze_llm, freeze_projector or freeze_visual_encoder to False."),
                where=Where(key="model"),
            )

    def _set_targets(self, config: LoraConfig) -> None:
        parts = VisionParts.of(self.llm)
        adapts_llm = not self._freeze["language_model"]
        if adapts_llm:
            super()._set_targets(config)
        if self._encoder_lora is not None:
            add_encoder_targets(
                config, self._encoder_lora, self.llm, parts, language_model=adapts_llm
            )
        trained = [name for name in parts.of_vision if not self._freeze[parts.part_of(name)]]
        names = modules_to_save(self.llm, outermost(trained))
        if names:
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *names})

    def _freeze_untrained(self) -> None:
        self.parts = VisionParts.of(self.causal_lm)
        for name, weight in self.causal_lm.named_parameters():
            part = self.parts.part_of(name)
            if not self.has_adapter and weight.is_floating_point():
                weight.requires_grad_(not self._freeze[part])
            elif part != "language_model" and self._freeze[part] and "lora_" not in name:
                weight.requires_grad_(False)

    def _freeze_unreached(self) -> bool:
        """Freeze what an image does not reach; whether any weight for images is trained.

        Encoders have poolers, and layers after the one whose output is taken.
        """
        trained = [
            weight
            for name, weight in self.causal_lm.named_parameters()
            if weight.requires_grad and self.parts.part_of(name) != "language_model"
        ]
        if not trained or trained[0].is_meta or is_zero3_init_enabled():
            return bool(trained)
        with torch.enable_grad():
            reached = trained_by(self._features_of_blank(self.causal_lm.device, self.causal_lm))
        for weight in trained:
            weight.requires_grad_(id(weight) in reached)
        left = {id(weight) for weight in trained if not weight.requires_grad}
        self._unreached = {name for name, weight in self.named_parameters() if id(weight) in left}
        return any(weight.requires_grad for weight in trained)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As ``FinetuneModel``; peft has the weights of an adapter that no image reaches, too."""
        if not self.has_adapter:
            return super().state_dict(*args, **kwargs)
        state: dict[str, Tensor] = torch.nn.Module.state_dict(self, *args, **kwargs)
        return trained_weights(self, state, str(kwargs.get("prefix", "")), self._unreached)

    def _use_exact_attention(self) -> None:
        """Compute packed rows by our attention, and encoders by a function that fits them.

        Other functions make masks of packed rows from positions, which images do not number so.
        """
        for llm in self._computing_models():
            if self.use_varlen_attn and llm.config._attn_implementation in REPLACED:
                llm.set_attn_implementation(attention.register())
            if llm.config._attn_implementation == attention.NAME:
                use_attention_in_encoders(llm)

    def _computing_models(self) -> Iterator[PreTrainedModel]:
        """The transformers models that rows go through."""
        yield self.causal_lm

    def _require_known_inputs(self) -> None:
        """Refuse a class that takes more from its processor than kinds of tokens and images.

        Raises:
            UserError: with the names.
        """
        parts = [getattr(self.processor, name) for name in self.processor.get_attributes()]
        known = {name for part in parts for name in part.model_input_names}
        known |= {*image_rows.TOKEN_TYPES, *image_rows.FOR_POSITIONS}
        more = (self._arguments & {*self.processor.model_input_names}) - known
        if "token_type_ids" in self._arguments and not self.processor.return_mm_token_type_ids:
            more |= {"token_type_ids"}
        if more:
            raise UserError(
                tr(
                    "{name} takes {inputs} from its processor, which cannot be trained here.",
                    name=type(self.causal_lm).__name__,
                    inputs=", ".join(sorted(more)),
                ),
                where=Where(key="model.llm"),
            )

    def prepare_batch(self, data: Batch, device: torch.device) -> Batch:
        """As ``FinetuneModel``; positions of three dimensions are computed here.

        Raises:
            UserError: when there are image tokens without images, or the reverse.
        """
        image_rows.require_images(data, self._token_types(data))
        return super().prepare_batch(self._with_positions(data), device)

    def num_items(self, data: Batch) -> dict[str, int]:
        """As the class of the loss; and ``mixed``: 1 for a batch with images and videos.

        The class calls its visual encoder twice there. Where processes share its weights, all of
        them do, in the whole step.
        """
        counts = super().num_items(data)
        if VIDEOS in self._arguments:
            counts["mixed"] = int(_encoder_calls(data) > 1)
        return counts

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute the loss, images included."""
        self._encoder_calls = 2 if num_items_in_batch.get("mixed") else 1
        return super().compute_loss(self._with_positions(data), num_items_in_batch)

    def hidden_states(self, data: Batch, shard: SequenceShard | None = None) -> Tensor:
        """As ``FinetuneModel``, images included."""
        with self._blank_image(data), image_rows.explained():
            return super().hidden_states(data, shard)

    def compute_outputs(self, data: Batch) -> Any:
        """As ``FinetuneModel``, images included."""
        return super().compute_outputs(self._with_positions(data))

    def shard(self, data: Batch) -> SequenceShard:
        """As ``FinetuneModel``; the first packed row with images is probed, too."""
        shard = super().shard(data)
        cu_seqlens = packed_cu_seqlens(data)
        several = cu_seqlens is not None and len(cu_seqlens) > 2
        if several and data.get("images") and not use_our_attention(self):
            raise UserError(
                tr(
                    "packed samples with images are not computed separately by {attention!r} "
                    "attention.",
                    attention=self.causal_lm.config._attn_implementation,
                ),
                hint=tr(
                    "leave attn_implementation out, or set pack_to_max_length = False and "
                    "use_varlen_attn = False."
                ),
                where=Where(key="model.llm.attn_implementation"),
            )
        if several and data.get("images") and "images" not in self.probed_rows:
            self.probed_rows |= {"images"}
            _probe_images(self, data, self._token_types(data))
        return shard

    def inputs(self, data: Batch) -> dict[str, Any]:
        """The arguments of the transformers model, those of its images included."""
        images = data.get("images")
        text: Any = {name: value for name, value in data.items() if name != "images"}
        inputs = super().inputs(text)
        if not images:
            return inputs
        own = {name: value for name, value in images.items() if name in self._arguments}
        if "cu_seq_lens_q" in inputs:
            # without it masks are made from positions, and blocks of images are misplaced
            inputs["attention_mask"] = torch.ones_like(data["input_ids"], dtype=torch.bool)
        names = [name for name in image_rows.TOKEN_TYPES if name in self._arguments]
        return {**inputs, **own, **{name: self._token_types(data) for name in names}}

    def _token_types(self, data: Batch) -> Tensor:
        """(B, S) kinds of tokens: 0 text, 1 image, 2 video."""
        if "mm_token_type_ids" in data:
            return data["mm_token_type_ids"]
        ids = data["input_ids"]
        return torch.tensor(
            self.processor.create_mm_token_type_ids(ids.tolist()), device=ids.device
        )

    def _with_positions(self, data: Batch) -> Batch:
        """The batch with the class's own positions, where images take such."""
        positions = data.get("position_ids")
        is_done = positions is not None and positions.ndim == 3
        if not self._has_3d_positions or not data.get("images") or is_done:
            return data
        types, cu_seqlens = self._token_types(data), packed_cu_seqlens(data)
        own = image_rows.rope_positions(self.causal_lm.base_model, data, types, cu_seqlens)
        return {**data, "position_ids": own}

    @contextlib.contextmanager
    def _blank_image(self, data: Batch, llm: PreTrainedModel | None = None) -> Iterator[None]:
        """Make all weights for images part of a batch without them, without effect.

        They then have gradients of 0, for which other processes may wait; weights that processes
        share are gathered in the same order everywhere, frozen ones too. Probes are no batches:
        each process makes them with text alone.

        Args:
            data: the batch.
            llm: a transformers model instead of the one that is trained.
        """
        llm = self.causal_lm if llm is None else llm
        sharded = is_sharded(self.causal_lm)
        if self._computes_blanks is None:
            self._computes_blanks = self._trains_vision or sharded
        missing = (self._encoder_calls if sharded else 1) - _encoder_calls(data)
        if not self._computes_blanks or missing < 1:
            yield
            return

        def add_nothing(module: object, args: object, output: Tensor) -> Tensor:
            for _ in range(missing):
                features = self._features_of_blank(output.device, llm)
                output = output + features.to(output.dtype) * 0.0
            return output

        handle = llm.get_input_embeddings().register_forward_hook(add_nothing)
        try:
            yield
        finally:
            handle.remove()

    def encode_blank(self, side: int) -> tuple[Callable[[], object], int]:
        """A call that computes a blank image's features, and how many tokens of a row it needs.

        Args:
            side: width and height in pixels; the processor may resize it.
        """
        arguments, tokens = _blank_image(self, side)
        body: Any = self.causal_lm.base_model
        return functools.partial(body.get_image_features, **arguments, return_dict=True), tokens

    def _features_of_blank(self, device: torch.device, llm: PreTrainedModel) -> Tensor:
        """The sum of all that the language model is given of a blank image."""
        if self._blank is None:
            self._blank, _ = _blank_image(self, BLANK)
        images = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._blank.items()
        }
        body: Any = llm.base_model
        found = body.get_image_features(**images, return_dict=True)
        nothing = torch.zeros((), device=device)
        used = {name: value for name, value in found.items() if name not in NOT_USED}
        parts = [value for value in image_rows.float_tensors(used) if value.requires_grad]
        return sum((value.float().sum() for value in parts), start=nothing)


class VisionLanguageFinetune(VisionLanguageModel, SupervisedFinetune):
    """Trains a vision-language model to give the labelled tokens.

    Attention, loss, adapters and all else as ``SupervisedFinetune``; arguments of both classes.
    """

    def _loss_sum_of_all_logits(self, data: Batch, shard: SequenceShard) -> Tensor:
        with self._blank_image(data), image_rows.explained():
            return super()._loss_sum_of_all_logits(data, shard)


def _probe_images(model: VisionLanguageModel, data: Batch, types: Tensor) -> None:
    """Refuse a class whose packed samples with images see each other."""
    llm, training = model.causal_lm, model.training
    if is_sharded(llm):  # other ranks may have no images in this batch
        return
    model.eval()  # dropout would make two calls differ
    try:
        image_rows.require_separate_samples(
            functools.partial(outputs_of, model, llm), data, types, type(llm).__name__
        )
    finally:
        model.train(training)


def _encoder_calls(data: Batch) -> int:
    """How often the class calls its visual encoder for a batch: for images, and for videos."""
    images = data.get("images") or {}
    return max(bool(images), sum(name in images for name in (IMAGES, VIDEOS)))


def _blank_image(model: VisionLanguageModel, side: int) -> tuple[dict[str, Any], int]:
    """A blank image as ``get_image_features`` takes it, and how many tokens of a row it needs."""
    from PIL import Image

    image, token = Image.new("RGB", (side, side)), model.processor.image_token
    made = model.processor(images=[[image]], text=[token], return_tensors="pt")
    body: Any = model.causal_lm.base_model
    names = image_rows.arguments(body.get_image_features)
    arguments = {name: value for name, value in made.items() if name in names}
    return arguments, made["input_ids"].shape[1]


def _built(value: object) -> Any:
    return BUILDER.build(value) if isinstance(value, Mapping) else value


def _require_processor(processor: object) -> None:
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return
    raise UserError(
        tr("a vision-language model needs its processor."),
        hint="model = dict(processor=dict(type=load_processor, name_or_path=MODEL), ...)",
        where=Where(key="model.processor"),
    )


def _require_whole_rows() -> None:
    if get_sequence_parallel_world_size() > 1:
        raise UserError(
            tr("ranks cannot share rows with images."),
            hint=tr("set sequence_parallel_size = 1."),
            where=Where(key="sequence_parallel_size"),
        )


def _require_consistent(
    lora: LoraConfig | None,
    encoder_lora: LoraConfig | None,
    freeze_visual_encoder: bool,
    freeze_llm: bool,
) -> None:
    """Refuse settings that contradict each other."""
    if encoder_lora is not None and not freeze_visual_encoder:
        raise UserError(
            tr("the visual encoder is to be trained as a whole and adapted."),
            hint=tr("remove visual_encoder_lora, or set freeze_visual_encoder = True."),
            where=Where(key="model.visual_encoder_lora"),
        )
    if lora is not None and freeze_llm:
        raise UserError(
            tr("lora adapts the language model, and freeze_llm = True freezes it."),
            hint=tr("remove one of them."),
            where=Where(key="model.freeze_llm"),
        )
    if lora is None and encoder_lora is not None and not freeze_llm:
        raise UserError(
            tr("the visual encoder is to be adapted, and the language model trained as a whole."),
            hint=tr("add lora, or set freeze_llm = True."),
            where=Where(key="model.visual_encoder_lora"),
        )
