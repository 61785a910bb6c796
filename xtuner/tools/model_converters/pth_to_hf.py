"""``xtuner convert pth_to_hf``: a checkpoint of training as a Hugging Face model or adapter."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.tools.arguments import (
    add_config_options,
    add_dtype,
    add_max_shard_size,
    add_reader,
    add_safe_serialization,
)
from xtuner.tools.model_converters.verify_vision import rounding, verify_vision_model
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import torch
    from mmengine import Config
    from peft import PeftModel

    from xtuner.export.trained_weights import TrainedWeights
    from xtuner.model.base import FinetuneModel


OTHER_FILES = (".py", ".json", ".yaml", ".yml", ".safetensors", ".gguf")
"""What files of no checkpoint end with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.usage = "%(prog)s [CONFIG] PTH OUT [options]"
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[CONFIG] PTH OUT",
        help=tr(
            "the config (by default the one beside the checkpoint), the checkpoint, "
            "the folder to write"
        ),
    )
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--fp32", action="store_true", help=tr("write fp32"))
    add_dtype(dtype, tr("dtype to write (default: as trained)"))
    add_max_shard_size(parser)
    add_safe_serialization(parser)
    parser.add_argument(
        "--save-format",
        choices=("xtuner", "official", "huggingface"),
        default="xtuner",
        help=tr("layout of LLaVA models"),
    )
    add_reader(parser)
    add_config_options(parser)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=tr(
            "compare the logits with the trained model's (default: for small models; of large "
            "ones the files are compared)"
        ),
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help=tr("convert even if training and serving build different prompts"),
    )


def run(args: argparse.Namespace) -> int:
    """Convert; nothing is left behind unless all of it went well."""

    from xtuner.config import load_config, write_config
    from xtuner.export import llava as llava_format
    from xtuner.export import model_folder
    from xtuner.export.shards import check_space, parse_size
    from xtuner.export.sidecar_files import write_reward_token
    from xtuner.export.trained_template import reward_token_of
    from xtuner.export.trained_weights import REMAP_AFTER, TrainedWeights
    from xtuner.model.meta_model import build_meta_model
    from xtuner.registry import BUILDER
    from xtuner.utils.files import written_aside

    config, checkpoint, out = _paths(args.words)
    shard_size = parse_size(args.max_shard_size)
    model_folder.check_output(out, [checkpoint])
    name = "fp32" if args.fp32 else args.dtype
    dtype = None if name == "auto" else torch_dtype(name)
    cfg = load_config(config, args.cfg_options)
    if "model" not in cfg:
        raise UserError(tr("the config has no model."), where=Where(config))
    if args.save_format != "xtuner":
        llava_format.require_llava(cfg.model, args.save_format)
    weights = TrainedWeights(checkpoint, min(REMAP_AFTER, shard_size // 4))
    if getattr(cfg.model.type, "needs_weights", False):
        meta_model = BUILDER.build(_unquantised(cfg.model))
    else:
        meta_model = build_meta_model(cfg.model)
    weights.check(meta_model.state_dict())
    check_space(out, weights.nbytes)
    with written_aside(out) as aside:
        aside.mkdir(parents=True)
        written = _write(cfg, meta_model, weights, aside, dtype, args)
        tokenizer = _write_tokenizer(cfg, aside, args.force)
        if args.save_format == "huggingface" and tokenizer is not None:
            llava_format.write_processor(cfg, tokenizer, aside)
        if (aside / "visual_encoder").is_dir() and "image_processor" in cfg:
            BUILDER.build(cfg.image_processor).save_pretrained(aside / "visual_encoder")
        reward_token = reward_token_of(cfg)
        if reward_token is not None:
            write_reward_token(aside, reward_token)
        write_config(cfg, aside / "xtuner_config.py")
        if args.verify is not False:
            if hasattr(meta_model, "visual_encoder"):
                verify_vision_model(cfg, weights, aside, written, dtype, args)
            else:
                _verify_result(cfg, weights, aside, meta_model, dtype, args.verify)
        _fit_reader(meta_model, aside, args.reader)
    print(tr("wrote {out}", out=out))
    if args.save_format == "xtuner":
        print(_next_steps(meta_model, out, cfg, args.reader))
    return 0


def _paths(words: list[str]) -> tuple[str, Path, Path]:
    """Config, checkpoint and output; the config is looked for when it is not given."""
    if not 2 <= len(words) <= 3:
        raise UserError(
            tr("expected 2 or 3 arguments, got {count}.", count=len(words)),
            hint="xtuner convert pth_to_hf [CONFIG] PTH OUT",
            status=2,
        )
    checkpoint, out = Path(words[-2]), Path(words[-1])
    if not checkpoint.exists():
        raise UserError(
            tr("there is no such checkpoint."),
            hint=tr("training writes them into its work dir as iter_N.pth."),
            where=Where(str(checkpoint)),
        )
    from xtuner.checkpoint.checkpoint import config_beside

    _require_checkpoint(checkpoint)
    config = config_beside(checkpoint)
    if len(words) == 3:
        return _as_trained(words[0], config), checkpoint, out
    if config is None:
        raise UserError(
            tr("there is no config beside this checkpoint."),
            hint="xtuner convert pth_to_hf CONFIG PTH OUT",
            where=Where(str(checkpoint)),
        )
    return str(config), checkpoint, out


def _require_checkpoint(path: Path) -> None:
    """Refuse what is no whole checkpoint: a part of one, a run's folder, a file of another kind."""
    from xtuner.checkpoint.checkpoint import checkpoints_of
    from xtuner.export.model_folder import checkpoint_around, convert_hint

    whole = checkpoint_around(path)
    if whole is not None and whole != path:
        raise UserError(
            tr("this is a part of the checkpoint {whole}.", whole=whole),
            hint=convert_hint(whole),
            where=Where(str(path)),
        )
    newest = next(iter(checkpoints_of(path)), None)
    if whole is None and newest is not None:
        raise UserError(
            tr("this folder has checkpoints; it is none itself."),
            hint=convert_hint(newest),
            where=Where(str(path)),
        )
    if path.suffix in OTHER_FILES:
        raise UserError(
            tr("this is no checkpoint of training."),
            hint="xtuner convert pth_to_hf [CONFIG] PTH OUT",
            where=Where(str(path)),
        )


def _as_trained(given: str, beside: Path | None) -> str:
    """The run's own copy of the config that was given: its overrides (--cfg-options) are in it."""
    name = Path(given).name.removesuffix(".py")
    if beside is None or beside.stem != name or beside.resolve() == Path(given).resolve():
        return given
    print(tr("using {beside}: {name} with the settings of the run", beside=beside, name=name))
    return str(beside)


def _write(
    cfg: Config,
    meta_model: FinetuneModel,
    weights: TrainedWeights,
    aside: Path,
    dtype: torch.dtype | None,
    args: argparse.Namespace,
) -> FinetuneModel:
    """Write the model; the one it was written of, with values where it was not streamed."""
    from rich.progress import Progress

    from xtuner.export import write_model
    from xtuner.export.llava import complete_parts
    from xtuner.export.shards import parse_size
    from xtuner.export.untrained import complete_from_base
    from xtuner.model.llava import LLaVAModel

    size, safe = parse_size(args.max_shard_size), args.safe_serialization
    if args.save_format != "xtuner":  # these hold the parts too that were not trained
        from xtuner.registry import BUILDER

        model = BUILDER.build(_unquantised(cfg.model))
        model.load_state_dict(weights.tensors, strict=False)
        model.tokenizer = model.tokenizer or BUILDER.build(cfg.get("tokenizer"))
        model.to_hf(aside, dtype=dtype, max_shard_size=size, save_format=args.save_format)
        written: FinetuneModel = model
        return written
    if not write_model.can_stream(meta_model, weights):
        import torch

        # Read straight from the mapped file, whatever load_state_dict of the model would copy.
        torch.nn.Module.load_state_dict(meta_model, weights.tensors, strict=False, assign=True)
        if isinstance(meta_model, LLaVAModel):
            complete_parts(meta_model, cfg.model)
        meta_model.to_hf(aside, dtype=dtype, safe_serialization=safe, max_shard_size=size)
        complete_from_base(aside, getattr(meta_model, "llm", None))
        return meta_model
    if write_model.is_adapter(meta_model.llm):
        write_model.write_adapter(meta_model.llm, weights, aside, dtype=dtype, safe=safe)
        return meta_model
    with Progress() as progress:
        task = progress.add_task(tr("writing"), total=weights.nbytes)
        write_model.write_full_model(
            meta_model.llm,
            weights,
            aside,
            dtype=dtype,
            shard_size=size,
            safe=safe,
            progress=lambda nbytes: progress.advance(task, nbytes),
        )
    return meta_model


def _unquantised(model: Mapping[str, Any]) -> Any:
    """The model's config without quantisation: what is written as a whole is in 16 bits or more."""
    plain: Any = copy.deepcopy(model)
    found = [key for key in ("quantization_llm", "quantization_vit") if plain.pop(key, False)]
    for part in ("llm", "visual_encoder"):
        settings = plain.get(part)
        if isinstance(settings, dict) and settings.pop("quantization_config", None) is not None:
            found.append(part)
    if found:
        print(tr("the weights that were quantised in training are written as the base has them."))
    return plain


def _write_tokenizer(cfg: Config, aside: Path, force: bool) -> Any:
    """Write the run's tokenizer with the run's prompt template, if they go together.

    Returns:
        The tokenizer, if the config has one.
    """
    from xtuner.export.sidecar_files import write_processor, write_tokenizer
    from xtuner.export.trained_template import (
        processor_of,
        template_of,
        tokenizer_of,
        uses_own_template,
    )
    from xtuner.proving.templates import compare, refuse
    from xtuner.tokenization.chat_template import answer_stops
    from xtuner.tokenization.template_check import PLAIN_PROBES, check_own_template

    tokenizer = tokenizer_of(cfg)
    if tokenizer is None:
        return None
    try:
        template = template_of(cfg)
    except UserError as error:
        if not force:
            raise
        print(error)
        template = None
    processor = processor_of(cfg)
    if processor is not None:
        write_processor(aside, processor)
    write_tokenizer(aside, tokenizer, template)
    if force:
        return tokenizer
    if template is not None:
        refuse(compare(tokenizer, template))
    elif uses_own_template(cfg):
        stops = answer_stops(tokenizer)[0]
        refuse(check_own_template(tokenizer, stops, PLAIN_PROBES).differences)
    return tokenizer


def _verify_result(
    cfg: Config,
    weights: TrainedWeights,
    aside: Path,
    meta_model: FinetuneModel,
    dtype: torch.dtype | None,
    asked: bool | None,
) -> None:
    """Verify what was written; of large models the files alone, unless it is asked for."""
    from transformers import PreTrainedModel

    from xtuner.export import verify, write_model
    from xtuner.export.model_folder import find_model
    from xtuner.export.verify_streamed import check_trained
    from xtuner.model.reward import RewardModel

    if not hasattr(meta_model, "llm"):
        name = type(meta_model).__name__
        print(tr("not verified: only {name} itself knows what its 'to_hf' writes.", name=name))
        return
    llm: Any = meta_model.llm
    size = 2 * sum(parameter.numel() for parameter in llm.parameters())
    if asked or size <= verify.AUTO_VERIFY_BYTES:
        _verify(cfg, weights, aside, meta_model, dtype)
    elif write_model.can_stream(meta_model, weights):
        whole = not write_model.is_adapter(llm) and llm.name_or_path
        base = find_model(str(llm.name_or_path)) if whole else None
        check_trained(write_model.trained_tensors(llm, weights), aside, base)
    elif isinstance(meta_model, RewardModel) and meta_model.has_adapter:
        named = write_model.trained_tensors(llm, weights)
        head = weights.read("v_head.weight")
        check_trained(meta_model.classifier_adapter(named, head), aside)
    elif isinstance(llm, PreTrainedModel):
        is_reward = isinstance(meta_model, RewardModel)
        _check_reloaded(cfg, weights, aside, meta_model, is_reward=is_reward)
    else:
        name = type(llm).__name__
        print(tr("not verified, as {name} is large: '--verify' does so.", name=name))


def _loader(cfg: Config, meta_model: FinetuneModel) -> type:
    """The class that loads what was written: the config's, or that of the model a function made."""
    loader = getattr(cfg.model.llm.type, "__self__", None)
    return loader if isinstance(loader, type) else type(meta_model.llm)


def _check_reloaded(
    cfg: Config,
    weights: TrainedWeights,
    aside: Path,
    meta_model: FinetuneModel,
    *,
    is_reward: bool,
) -> None:
    """Compare a checkpoint with the model that was written of it, loaded by its class."""
    from xtuner.export.in_memory_merge import load_base
    from xtuner.export.verify_reloaded import check_trained_model

    model = load_base(
        aside,
        None,
        "cpu",
        num_labels=1 if is_reward else None,
        auto_class=_loader(cfg, meta_model),
        trust_remote_code=bool(cfg.model.llm.get("trust_remote_code")),
    )
    check_trained_model(weights, model)


def _verify(
    cfg: Config,
    weights: TrainedWeights,
    aside: Path,
    meta_model: FinetuneModel,
    written_dtype: torch.dtype | None,
) -> None:
    """Compare the model as trained with what was written, loaded by stock libraries."""

    from xtuner.export import verify, write_model
    from xtuner.registry import BUILDER

    adapter = write_model.is_adapter(meta_model.llm)
    classifier = hasattr(meta_model, "v_head")
    measure: Any = verify.compute_rewards if classifier else verify.compute_logits
    dtype = rounding(cfg, weights, written_dtype)
    with verify.quiet_transformers():
        trained = BUILDER.build(cfg.model)
        trained.load_state_dict(weights.tensors, strict=False)
        verify.to_fp32(trained.llm)
        ids = verify.probe_ids(trained.llm.config.get_text_config().vocab_size)
        expected = measure(trained if classifier else trained.llm, ids)
        # a reward model has its head beside the language model: its logits alone are compared
        experts = verify.has_experts(trained.llm) and not classifier
        exact = verify.own_weights(trained.llm) if experts else {}
        if not experts:
            verify.check_stored_weights(verify.own_weights(trained.llm, copy=False), aside, dtype)
        del trained
        if adapter:
            written = verify.load_with_peft(cfg.model.llm, aside, classifier=classifier)
        else:
            trusted = bool(cfg.model.llm.get("trust_remote_code"))
            written = verify.load_with_transformers(
                aside,
                classifier=classifier,
                auto_class=_loader(cfg, meta_model),
                trust_remote_code=trusted,
            )
        written = verify.to_fp32(written)
        found = measure(written, ids)
    what, difference = tr("the trained model"), verify.compare(expected, found)
    if experts:
        verify.check_experts(
            written, exact, lambda model: verify.compare(expected, measure(model, ids)), dtype, what
        )
    else:
        verify.check_difference(difference, dtype, what)


def _fit_reader(meta_model: FinetuneModel, aside: Path, reader: str) -> None:
    """Fit what was written to the program that will read it, last: training knows other names."""
    from xtuner.export import readers, write_model
    from xtuner.export.model_folder import find_model

    llm: Any = getattr(meta_model, "llm", None)
    if reader == readers.TRANSFORMERS:
        _warn_of_lost_layers(llm)
        return
    if llm is None or hasattr(meta_model, "visual_encoder"):
        raise UserError(
            tr("--for is for language models."),
            hint=tr("without --for it is written for transformers and peft."),
        )
    if not write_model.is_adapter(llm):
        readers.check_model(aside, find_model(str(llm.name_or_path)), reader)
        return
    base = find_model(str(llm.get_base_model().name_or_path))
    if readers.fit_adapter(aside, base, reader):
        print(
            tr(
                "the adapter's tensors are named as in the class of the base's config.json; "
                "'convert merge' takes an adapter that was written without --for."
            )
        )


def _warn_of_lost_layers(llm: Any) -> None:
    """Say which layers of a LoRA adapter peft, without XTuner, would leave out."""
    from xtuner.model.lora.adapter_files import layers_lost_by_peft

    config = getattr(llm, "peft_config", {}).get("default")
    if config is None or config.peft_type != "LORA":
        return
    lost = layers_lost_by_peft(llm)
    if lost:
        print(
            tr(
                "warning: peft alone renames {count} layers of this adapter when it reads them, "
                "and leaves them out ({names}): merge it with 'xtuner convert merge'.",
                count=len(lost),
                names=", ".join(lost[:3]),
            ),
            file=sys.stderr,
        )


def _next_steps(
    meta_model: FinetuneModel, out: Path, cfg: Config, reader: str = "transformers"
) -> str:
    """The commands that use what was written, as they can be typed."""
    from xtuner.export import write_model
    from xtuner.export.serving import adapter_command, serving_commands
    from xtuner.reporting.summary import template_name

    llm: Any = getattr(meta_model, "llm", None)
    template = _template_name(cfg) or template_name(cfg)
    if hasattr(meta_model, "visual_encoder") and not (out / "projector").is_dir():  # InternVL
        words = [
            out,
            "--image",
            _image(cfg),
            *(("--prompt-template", template) if template else ()),
        ]
        return tr("Ask about an image:") + f"\n  {_command('chat', *words)}"
    if hasattr(meta_model, "visual_encoder"):
        own = (out / "config.json").is_file() or not llm.name_or_path
        vision = getattr(meta_model.visual_encoder, "name_or_path", "") or "VISUAL_ENCODER"
        words = [out if own else llm.name_or_path, "--llava", out, "--visual-encoder", vision]
        words += ["--image", _image(cfg), "--prompt-template", template or "NAME"]
        return tr("Ask about an image:") + f"\n  {_command('chat', *words)}"
    if hasattr(meta_model, "v_head"):
        adapter = write_model.is_adapter(llm)
        judge = [llm.get_base_model().name_or_path, "--adapter", out] if adapter else [out]
        return tr("Score answers with it:") + f"\n  {_command('chat', *judge)}"
    if not write_model.is_adapter(llm):
        return serving_commands(out)
    base = str(llm.get_base_model().name_or_path)
    if reader != "transformers":
        return tr("Use it:") + f"\n  {adapter_command(reader, base, out)}"
    return "\n".join(
        [
            tr("Use it:"),
            f"  {_command('chat', base, '--adapter', out)}",
            f"  {_command('convert', 'merge', base, out, f'{out}_merged')}",
            *_about_new_rows(llm),
        ]
    )


def _about_new_rows(llm: PeftModel) -> list[str]:
    """What peft alone does not do, where the vocabulary has grown; its ``Auto`` classes fail."""
    from xtuner.export.model_folder import find_model, read_json

    base: Any = llm.get_base_model()
    rows = int(base.get_input_embeddings().weight.shape[0])
    config = read_json(find_model(str(base.name_or_path)) / "config.json")
    before = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size", rows))
    if rows <= before:
        return []
    line = tr("with peft alone, the base gets its new rows first:")
    return [line, f"  base.resize_token_embeddings({rows})"]


def _image(cfg: Config) -> str:
    """An image to ask about: one that the run has asked about."""
    images = cfg.get("evaluation_images") or "FILE"
    given = [images] if isinstance(images, str) else images
    return str(next(filter(None, given), "FILE"))


def _template_name(cfg: Config) -> str | None:
    """The name of the template that the data use, where it is a published one."""
    from xtuner.export.trained_template import template_of
    from xtuner.utils.templates import PROMPT_TEMPLATE

    try:
        used = template_of(cfg)
    except UserError:
        return None
    return next((name for name, each in PROMPT_TEMPLATE.items() if used and each == used), None)


def _command(*words: object) -> str:
    return shlex.join(["xtuner", *map(str, words)])
