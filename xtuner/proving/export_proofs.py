"""Proofs about what is exported: the converted model, the merged one, the chat template."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict

from xtuner.config.values import iter_dicts, raw_dict
from xtuner.export.trained_template import template_arguments_of, template_of
from xtuner.export.verify import compare as compare_logits
from xtuner.export.verify import (
    compute_logits,
    compute_rewards,
    load_with_peft,
    load_with_transformers,
    quiet_transformers,
    to_fp32,
)
from xtuner.proving.proof import Measured, Proof, Skipped, prove
from xtuner.proving.reduce import trusts_code
from xtuner.proving.subject import INITIAL, Subject, iter_ids
from xtuner.proving.templates import PROBES, Mismatch
from xtuner.proving.templates import compare as compare_templates
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

TOKENS = 64
"""Of a sample on which logits are compared."""


class ExportProofs:
    """Proofs about the folder that ``xtuner convert`` writes.

    Args:
        subject: what is computed with.
        config: the written config; the trained weights are beside it.
        base: the folder of the base model.
    """

    def __init__(self, subject: Subject, config: Path, base: Path) -> None:
        self.subject, self.config, self.base = subject, config, base
        self.written = config.parent / "exported"
        self.merged_folder = config.parent / "merged"
        self.is_reward = False

    def all(self) -> list[Proof]:
        """All of them."""
        return [
            prove("exported", self.exported),
            prove("merged", self.merged),
            prove("template", self.template),
        ]

    @property
    def _has_adapter(self) -> bool:
        return (self.written / "adapter_config.json").is_file()

    def exported(self) -> Measured:
        """The converted model, loaded by transformers and peft, against the trained one."""
        words = [str(self.config), str(self.config.parent / INITIAL), str(self.written)]
        run_command("convert", "pth_to_hf", *words, "--no-verify", "--dtype", "fp32")
        with quiet_transformers():
            model = self.subject.model()
            self.is_reward = hasattr(model, "v_head")
            wanted = self._measure(model if self.is_reward else model.llm)
            found = self._measure(self._load_exported(quantized=True))
        name = tr("an adapter") if self._has_adapter else tr("a whole model")
        return Measured(compare_logits(wanted, found).relative, name)

    def merged(self) -> Measured:
        """The merged model against the base in float32 with the adapter."""
        if not self.written.is_dir():
            raise Skipped(tr("nothing was exported."))
        if not self._has_adapter:
            raise Skipped(tr("all weights are trained: there is no adapter."))
        out = str(self.merged_folder)
        run_command("convert", "merge", str(self.base), str(self.written), out, "--no-verify")
        with quiet_transformers():
            wanted = self._measure(self._load_exported(quantized=False))
            found = self._measure(self._load(self._llm(quantized=False), self.merged_folder))
        return Measured(compare_logits(wanted, found).relative)

    def template(self) -> Measured:
        """Conversations of the data by the exported tokenizer, against the ids of training."""
        if not self.written.is_dir():
            raise Skipped(tr("nothing was exported."))
        from xtuner.model.transformers_models.auto import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(
            self.written, trust_remote_code=trusts_code(raw_dict(self.subject.cfg))
        )
        if not tokenizer.chat_template:
            raise Skipped(tr("the tokenizer has no chat template, and the data need none."))
        template = template_of(self.subject.cfg)
        if template is not None:
            return self._published(tokenizer, template)
        return self._own(tokenizer)

    def _published(self, tokenizer: Tokenizer, template: Mapping[str, Any]) -> Measured:
        stops = exported_stops(self.written)
        found = compare_templates(tokenizer, template, PROBES, stops or None)
        grave = [each for each in found if not each.harmless]
        detail = tr("{count} conversations", count=len(PROBES))
        return Measured(len(grave), str(grave[0]) if grave else detail)

    def _own(self, tokenizer: Tokenizer) -> Measured:
        """The tokenizer's own template: rows as messages, against the rows as they are trained."""
        pairs = messages_and_samples(self.subject)
        if not pairs:
            raise Skipped(tr("the rows are no conversations of text."))
        wrong = []
        for messages, sample in pairs:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted = list(sample["input_ids"])
            if ids[: len(wanted)] != wanted:
                wrong.append(_difference(tokenizer, wanted, ids))
        stops = exported_stops(self.written)
        ends = {_last_label(sample) for _, sample in pairs} - {None}
        if stops and ends and not ends & set(stops):
            shown = ", ".join(repr(tokenizer.decode([end])) for end in ends)
            wrong.append(
                tr("answers end with {shown}, at which generation does not stop", shown=shown)
            )
        detail = tr("{count} conversations", count=len(pairs))
        return Measured(len(wrong), wrong[0] if wrong else detail)

    def _measure(self, model: torch.nn.Module) -> torch.Tensor:
        ids = next(iter_ids(self.subject.samples[0]))
        batch = torch.tensor([list(ids)[:TOKENS]])
        return (compute_rewards if self.is_reward else compute_logits)(model, batch)

    def _load(self, settings: Mapping[str, Any], folder: Path) -> Any:
        """A model of a folder, by the class that the config loads the base with."""
        if self.is_reward:
            return load_with_transformers(folder, classifier=True)
        changed = {**settings, "pretrained_model_name_or_path": str(folder), "dtype": torch.float32}
        return to_fp32(BUILDER.build(ConfigDict(changed)))

    def _llm(self, *, quantized: bool) -> dict[str, Any]:
        settings = dict(self.subject.cfg.model.llm)
        if not quantized:
            settings.pop("quantization_config", None)
        return settings | {"attn_implementation": "eager"}

    def _load_exported(self, *, quantized: bool) -> Any:
        settings = self._llm(quantized=quantized)
        if not self._has_adapter:
            return self._load(settings, self.written)
        if self.is_reward:
            return load_with_peft(settings, self.written, classifier=True)
        from peft import PeftModel

        from xtuner.export.streaming_merge import read_adapter, resize_embeddings

        base: Any = BUILDER.build(ConfigDict(settings))
        resize_embeddings(base, read_adapter(self.written))
        return to_fp32(PeftModel.from_pretrained(base, str(self.written)))


def run_command(*words: str) -> str:
    """Run ``xtuner WORDS`` in this process, as a user types it; give what it printed.

    Raises:
        UserError: when its exit status is not 0.
    """
    from xtuner.entry_point import main

    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = main(list(words))
    print(said.getvalue(), errors.getvalue(), sep="")
    if status:
        _, _, text = errors.getvalue().rpartition(tr("error: "))
        message, _, hint = text.strip().partition("\n" + tr("Hint: "))
        raise UserError(message, hint=hint)
    return said.getvalue()


def exported_stops(folder: Path) -> list[int]:
    """The ids at which an exported model stops; empty where it does not say."""
    from xtuner.proving.shrink import read_json

    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def messages_and_samples(subject: Subject) -> list[tuple[Sequence[Any], Mapping[str, Any]]]:
    """Rows of the data as messages, each with the sample that training makes of it.

    Only where a row becomes one sample, and its conversation is text.
    """
    from xtuner.tokenization.messages import messages_of

    settings = ConfigDict(subject.cfg.train_dataloader.dataset).copy()
    if template_arguments_of(subject.cfg) or "template_map_fn" not in settings:
        return []
    mapped = {**settings, "do_dataset_tokenization": False, "template_map_fn": None}
    for _, part in iter_dicts(mapped):
        part.pop("shuffle_before_pack", None)
    rows = BUILDER.build(ConfigDict(mapped))
    pairs = []
    counts = Counter(tuple(sample.get("rows") or ()) for sample in subject.samples)
    for sample in subject.samples:
        numbers = tuple(sample.get("rows") or ())
        alone = len(numbers) == 1 and counts[numbers] == 1 and numbers[0] < len(rows)
        row = rows[numbers[0]] if alone else {}
        if row.get("messages"):
            pairs.append((row["messages"], sample))
        elif row.get("conversation"):
            pairs.append((messages_of(row["conversation"]), sample))
    return pairs


def _last_label(sample: Mapping[str, Any]) -> int | None:
    """The id of the last trained token that is not white space after an answer's end."""
    labels = [label for label in sample["labels"] if label >= 0]
    return labels[-1] if labels else None


def _difference(tokenizer: Tokenizer, wanted: list[int], found: list[int]) -> str:
    pairs = enumerate(zip(wanted, found, strict=False))
    shorter = min(len(wanted), len(found))
    place = next((n for n, (one, other) in pairs if one != other), shorter)
    window = slice(max(0, place - 3), place + 5)
    return str(
        Mismatch(
            tr("token {place} differs", place=place),
            None,
            str(tokenizer.convert_ids_to_tokens(wanted[window])),
            str(tokenizer.convert_ids_to_tokens(found[window])),
        )
    )
