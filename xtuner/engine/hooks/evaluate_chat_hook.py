"""Asks the model the same questions now and then, so that people see what it learns."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from xtuner.dataset.map_fns.template_map_fn import template_named
from xtuner.dataset.videos import FrameSampling, Visual
from xtuner.dataset.vision_language.image_prompt import (
    encode_image_prompt,
    load_video,
    text_message,
    user_message,
)
from xtuner.dataset.vision_language.placeholders import placeholders_of
from xtuner.registry import BUILDER
from xtuner.tokenization.chat_template import answer_stops, render_question
from xtuner.tokenization.rendering import rendered
from xtuner.tokenization.segments import encode_segments, prefix_ids, split_images
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE
from xtuner.utils.terminal import printable

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

    from xtuner.engine.runner.finetune_runner import FinetuneRunner
    from xtuner.utils.types import ImageProcessor, Tokenizer

logger = logging.getLogger(__name__)

TOKENS_BEFORE_TRAINING = 50
Video = str | Sequence[str]
"""A file, a folder of frames, or a list of frames."""


@HOOKS.register_module()
class EvaluateChatHook(Hook):
    """Generates answers before the training (short ones), every ``every_n_iters``, after a
    validation and at the end. They are shown and written to ``vis_data/eval_outputs_iter_N.txt``
    in the log folder. Generation is greedy, so that answers of different times compare, and
    leaves the random state as it was.

    Args:
        tokenizer: the tokenizer, or its config.
        evaluation_inputs: a question, or several.
        evaluation_images: a picture for each question, or one for all (path or URL); for models
            that see. None for a question without one. Questions whose picture cannot be read are
            not asked, and that is said.
        evaluation_videos: videos, likewise: a file, a folder of frames or a list of frames for
            each question. They need ``processor``.
        video_frames: frames of a video at most, as ``VisionLanguageDataset``.
        video_fps: frames per second of a video, as ``VisionLanguageDataset``.
        image_processor: the image processor of LLaVA or InternVL 1.5, or its config.
        processor: the processor of a ``VisionLanguageFinetune``, or its config. It makes the
            prompts, by its own chat template; ``prompt_template`` is not read.
        system: the system text; taken literally, braces too.
        prompt_template: an entry of ``PROMPT_TEMPLATE`` or its name; ``PROMPT_TEMPLATE.auto`` for
            the tokenizer's own chat template; None to give the model the bare question.
        every_n_iters: micro-batches between two rounds of questions; None for none in between.
        max_new_tokens: length of an answer.
        stop_word: a text to stop at.
        stop_words: texts to stop at, besides those of the template.
        generation_kwargs: further settings of ``generate``.
        template_arguments: given to the tokenizer's own chat template, such as
            ``dict(enable_thinking=False)``.
    """

    priority = "LOW"

    def __init__(
        self,
        tokenizer: Tokenizer | Mapping[str, Any],
        evaluation_inputs: str | Sequence[str],
        evaluation_images: str | Sequence[str | None] | None = None,
        image_processor: ImageProcessor | Mapping[str, Any] | None = None,
        system: str = "",
        prompt_template: str | Mapping[str, Any] | None = None,
        every_n_iters: int | None = None,
        max_new_tokens: int = 600,
        stop_word: str | None = None,
        stop_words: Sequence[str] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        processor: ProcessorMixin | Mapping[str, Any] | None = None,
        evaluation_videos: str | Sequence[Video | None] | None = None,
        video_frames: int = 16,
        video_fps: float | None = 2.0,
    ) -> None:
        self.tokenizer = _built(tokenizer)
        self.processor = _built(processor)
        self.image_processor = _built(image_processor)
        self.inputs = _listed(evaluation_inputs)
        self.images: list[str | None] = _listed(evaluation_images)
        self.videos: list[Video | None] = _listed(evaluation_videos)
        self.frames = FrameSampling(video_frames, video_fps)
        self._require_fitting()
        self.system = system or ""
        self.template = _template(prompt_template)
        self.every_n_iters = every_n_iters
        self.max_new_tokens = max_new_tokens
        self.stop_words = [*_listed(stop_word), *(stop_words or ())]
        self.generation_kwargs = dict(generation_kwargs or {})
        self.template_arguments = dict(template_arguments or {})
        self._is_due = False
        self._seen: list[list[torch.Tensor | Visual | None]] | None = None

    def _require_fitting(self) -> None:
        """Refuse other numbers of pictures or videos than of questions, and a model without videos.

        Raises:
            UserError: with the numbers.
        """
        for name, given in (("images", self.images), ("videos", self.videos)):
            if given and len(given) not in (1, len(self.inputs)):
                raise UserError(
                    tr(
                        "EvaluateChatHook: {count} {name} for {inputs} evaluation_inputs.",
                        count=len(given),
                        name=f"evaluation_{name}",
                        inputs=len(self.inputs),
                    ),
                    hint=tr("give one for all questions, or one for each."),
                )
        if self.videos and self.processor is None:
            raise UserError(
                tr("EvaluateChatHook: evaluation_videos need a processor."),
                hint=tr("add processor=processor."),
            )
        if any(video is not None for video in self.videos):
            placeholders_of(self.processor).videos.require()

    def before_train(self, runner: FinetuneRunner) -> None:
        """Ask the model as it is before the training."""
        self.evaluate(runner, min(TOKENS_BEFORE_TRAINING, self.max_new_tokens), runner.iter)

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Ask where it is due, at the end of an optimizer step."""
        if self.every_n_iters and self.every_n_train_iters(runner, self.every_n_iters):
            self._is_due = True
        if self._is_due and runner.train_loop.step_finished:
            self._is_due = False
            if runner.iter + 1 < runner.max_iters:  # the end has a round of its own
                self.evaluate(runner, self.max_new_tokens, runner.iter + 1)

    def after_train(self, runner: FinetuneRunner) -> None:
        """Ask the trained model."""
        self.evaluate(runner, self.max_new_tokens, runner.iter)

    def after_val(self, runner: FinetuneRunner) -> None:
        """Ask after a validation within a training."""
        if runner._train_loop is not None and not isinstance(runner._train_loop, dict):
            self.evaluate(runner, self.max_new_tokens, runner.iter)

    @torch.no_grad()
    def evaluate(self, runner: FinetuneRunner, max_new_tokens: int, done: int) -> None:
        """Generate an answer to each question, show and write them.

        All processes generate, as a sharded model needs them all; the first one shows.

        Args:
            runner: whose model is asked.
            max_new_tokens: of an answer.
            done: iterations that the model was trained for.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        was_training = model.training
        model.eval()
        devices = [runner.device] if runner.device.type == "cuda" else []
        step = math.ceil(done / runner.train_loop.accumulative_counts)
        texts = []
        try:
            with torch.random.fork_rng(devices), runner.autocast():
                for number in self._askable():
                    if is_main_process():  # before the seconds that an answer takes
                        print(tr("Sample output (step {step}):", step=step), flush=True)
                    texts.append(self._answer(model, runner.device, number, max_new_tokens))
                    if is_main_process():
                        print(f"{printable(texts[-1])}\n", flush=True)
        finally:
            model.train(was_training)
        if is_main_process():
            path = Path(runner.log_dir) / "vis_data" / f"eval_outputs_iter_{runner.iter}.txt"
            write_text(path, "\n\n".join(texts) + "\n")

    def prompt(self, question: str) -> list[int]:
        """The token ids the model gets for a question, as training and chat build them."""
        if self.template is None:
            return list(self.tokenizer.encode(question))
        if self.template == AUTO_TEMPLATE:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": question})
            arguments = {"add_generation_prompt": True, **self.template_arguments}
            return self._encode(rendered(self.tokenizer, messages, **arguments))
        assert isinstance(self.template, Mapping)
        text = render_question(self.template, question, 1, self.system)
        return [*prefix_ids(self.tokenizer), *self._encode(text)]

    def _answer(
        self, model: PreTrainedModel, device: torch.device, number: int, max_new_tokens: int
    ) -> str:
        inputs = {name: value.to(device) for name, value in self._model_inputs(number).items()}
        ids = inputs["input_ids"]
        llm = getattr(model, "llm", model)
        settings = self._settings(max_new_tokens, getattr(llm, "generation_config", None))
        generating: Any = model if hasattr(model, "generate") else model.llm
        answer = generating.generate(**inputs, **settings)[0]
        shown = [token for token in answer.tolist() if token >= 0]
        if len(shown) < ids.shape[1] or answer[: ids.shape[1]].tolist() != ids[0].tolist():
            shown = [token for token in ids[0].tolist() if token >= 0] + shown
        return self.tokenizer.decode(self._once(shown))

    def _once(self, ids: list[int]) -> list[int]:
        """The ids with one token in place of the many of an image or a video."""
        marks = {getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video")}
        pairs = zip([None, *ids], ids, strict=False)
        return [token for before, token in pairs if token not in marks or before != token]

    def _model_inputs(self, number: int) -> dict[str, torch.Tensor]:
        """What the model gets for a question: ids (1, S), their mask, its picture."""
        question = self.inputs[number]
        seen: list[Any] = self._about(number)
        if self.processor is not None:
            messages = [text_message("system", self.system)] if self.system else []
            messages.append(user_message(question, seen))
            return encode_image_prompt(self.processor, messages, seen, self.template_arguments)
        if seen:
            question = f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        ids = torch.tensor([self.prompt(question)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"pixel_values": seen[0]} if seen else {})

    def _settings(
        self, max_new_tokens: int, generation_config: GenerationConfig | None
    ) -> dict[str, Any]:
        """Keywords of ``generate``: greedy, ending where ``answer_stops`` says."""
        template = self.template if isinstance(self.template, Mapping) else None
        ids, texts = answer_stops(self.tokenizer, template, generation_config, self.stop_words)
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": ids or None,
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        }
        if texts:
            settings |= {"stop_strings": texts, "tokenizer": self.tokenizer}
        return settings | self.generation_kwargs

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added; an image's place is kept by ``IMAGE_TOKEN_INDEX``."""
        segments = split_images(text) if self.images else [text]
        encoded = encode_segments(self.tokenizer, segments, with_image_token=bool(self.images))
        return [token for piece in encoded for token in piece]

    def _askable(self) -> list[int]:
        """The questions whose pictures and videos are there."""
        numbers = range(len(self.inputs))
        return [n for n in numbers if not any(each is None for each in self._about(n))]

    def _about(self, number: int) -> list[torch.Tensor | Visual | None]:
        """A question's picture and video; None for one that cannot be read."""
        if self._seen is None:
            # Read by one process: were a picture there for some only, the others would wait.
            read: list[Any] = [None]
            if is_main_process():
                images = [self._read(image) for image in self.images]
                read = [[images, [self._read(video, is_video=True) for video in self.videos]]]
            broadcast_object_list(read)
            (self._seen,) = read
        found: list[torch.Tensor | Visual | None] = []
        lists: tuple[Sequence[Any], Sequence[Any]] = self.images, self.videos
        for given, seen in zip(lists, self._seen or (), strict=True):
            index = number if len(given) > 1 else 0
            if given and given[index] is not None:
                found.append(seen[index])
        return found

    def _read(self, place: Video | None, is_video: bool = False) -> torch.Tensor | Visual | None:
        """A picture: (1, 3, H, W), or for a processor the image; or a video."""
        from xtuner.dataset.images import load_image, pixel_values

        if place is None:
            return None
        try:
            if is_video or not isinstance(place, str):
                return load_video(place, self.processor, self.frames)
            read = load_image(place, upright=self.processor is not None)  # as training does
            if self.processor is not None:
                return read
            pixels: torch.Tensor = pixel_values(read, self.image_processor, square=True)
        except (OSError, ValueError) as error:
            logger.warning(
                tr("EvaluateChatHook: %s cannot be read (%s); it is not asked about"), place, error
            )
            return None
        return pixels[None]


def _built(value: object) -> Any:
    return BUILDER.build(value) if isinstance(value, dict) else value


def _listed(value: str | Sequence[Any] | None) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _template(template: str | Mapping[str, Any] | None) -> str | Mapping[str, Any] | None:
    """The template itself, where a name was given."""
    return template_named(template) if isinstance(template, str) else template
