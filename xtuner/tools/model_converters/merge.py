"""``xtuner convert merge``: an adapter merged into its base model, layer by layer."""

from __future__ import annotations

import argparse
import functools
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.tools.arguments import (
    add_dtype,
    add_max_shard_size,
    add_reader,
    add_safe_serialization,
    add_trust_remote_code,
)
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError
from xtuner.utils.files import copy_side_files
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import torch

    from xtuner.export.streaming_merge import StreamingMerge
    from xtuner.export.weights import Weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("model_name_or_path", help=tr("the base model"))
    parser.add_argument("adapter_name_or_path", help=tr("the adapter's folder"))
    parser.add_argument("save_dir", help=tr("the folder to write"))
    add_max_shard_size(parser)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "auto"),
        default="auto",
        help=tr("where layers are merged (default: a GPU if there is one)"),
    )
    add_dtype(parser, tr("dtype to write (default: the base's)"))
    parser.add_argument("--is-clip", action="store_true", help=tr("the base is a CLIP model"))
    add_safe_serialization(parser)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=tr(
            "compare the logits with base + adapter (default: for small models; of large ones "
            "the files are compared)"
        ),
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help=tr("merge into another base of the same shapes"),
    )
    add_reader(parser)
    add_trust_remote_code(parser)


def run(args: argparse.Namespace) -> int:
    """Merge; see ``layer_merge`` for how."""

    from xtuner.export import model_folder, verify
    from xtuner.export.fingerprint import check_fingerprint
    from xtuner.export.readers import check_model
    from xtuner.export.serving import serving_commands
    from xtuner.export.shards import check_space, parse_size
    from xtuner.export.weights import Weights
    from xtuner.tools.chat_reward import is_reward_model
    from xtuner.utils.constants import REWARD_FILE
    from xtuner.utils.files import written_aside

    parse_size(args.max_shard_size)
    base = model_folder.find_model(args.model_name_or_path)
    adapter = model_folder.find_model(args.adapter_name_or_path, "adapter_config.json")
    out = Path(args.save_dir)
    model_folder.check_output(out, [base, adapter])
    dtype = None if args.dtype == "auto" else torch_dtype(args.dtype)
    args.device = _device(args.device)
    weights = Weights(base)
    if args.force:
        print(tr("the base is not compared (--force)"))
    elif check_fingerprint(adapter, weights) == "same":
        print(tr("the base is the one that the adapter was trained on"))
    check_space(out, weights.nbytes)
    small = args.verify or weights.nbytes <= verify.AUTO_VERIFY_BYTES
    by_logits = args.verify is not False and small and not args.is_clip
    with written_aside(out) as aside:
        aside.mkdir(parents=True)
        by_files = args.verify is not False and not by_logits
        check = _write(weights, adapter, aside, dtype, args, check=by_files)
        check_model(aside, base, args.reader)
        if (adapter / REWARD_FILE).is_file():
            shutil.copy(adapter / REWARD_FILE, aside / REWARD_FILE)
        if model_folder.copy_tokenizer(adapter, aside):
            print(tr("tokenizer and chat template: the adapter's"))
        if by_logits:
            _verify(base, adapter, aside, args.trust_remote_code)
        elif check is not None:
            check(aside)
    print(tr("wrote {out}", out=out))
    if is_reward_model(base, adapter):
        print(tr("Score answers with it:") + f"\n  xtuner chat {shlex.quote(str(out))}")
    elif not args.is_clip:
        print(serving_commands(out))
    return 0


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            tr("there is no CUDA device here."),
            hint=tr("use --device cpu."),
        )
    return asked


def _write(
    weights: Weights,
    adapter: Path,
    aside: Path,
    dtype: torch.dtype | None,
    args: argparse.Namespace,
    *,
    check: bool,
) -> Callable[[Path], None] | None:
    """Write the merged model, layer by layer where possible; give a check of its files if asked."""
    from xtuner.export.shards import parse_size
    from xtuner.export.streaming_merge import CannotStream, prepare_streaming_merge
    from xtuner.export.verify_streamed import check_merged

    size, safe, device = parse_size(args.max_shard_size), args.safe_serialization, args.device
    try:
        if args.is_clip:
            raise CannotStream(tr("CLIP models"))
        merge = prepare_streaming_merge(
            weights, adapter, dtype, device, trust_remote_code=args.trust_remote_code
        )
    except CannotStream as reason:
        print(tr("{reason} are merged with the full model in memory", reason=reason))
        return _write_in_memory(weights.path, adapter, aside, dtype, args, check=check)
    if merge.untied:
        print(
            tr(
                "embedding and head are no longer tied, as the adapter changes only one of them: "
                "both are written (tie_word_embeddings: false)"
            )
        )
    _write_streaming(merge, aside, size, safe)
    return functools.partial(check_merged, merge) if check else None


def _write_streaming(merge: StreamingMerge, aside: Path, shard_size: int, safe: bool) -> None:
    from rich.progress import Progress

    from xtuner.export import model_folder
    from xtuner.export.shards import ShardWriter

    with ShardWriter(aside, merge.plan, shard_size, safe) as writer, Progress() as progress:
        total = sum(info.nbytes for info in merge.plan)
        task = progress.add_task(tr("merging"), total=total)
        for name, tensor in merge.tensors(lambda nbytes: progress.advance(task, nbytes)):
            writer.write(name, tensor)
    copy_side_files(merge.base.path, aside)
    main = next(info.dtype for info in merge.plan if info.dtype.is_floating_point)
    # under the name that the base's config.json has: other programs may know that one alone
    named = {"dtype", "torch_dtype"} & model_folder.read_json(aside / "config.json").keys()
    dtypes = dict.fromkeys(named or {"dtype"}, str(main).removeprefix("torch."))
    model_folder.update_json(aside / "config.json", **dtypes, **merge.config_changes)


def _write_in_memory(
    base: Path,
    adapter: Path,
    aside: Path,
    dtype: torch.dtype | None,
    args: argparse.Namespace,
    *,
    check: bool,
) -> Callable[[Path], None] | None:
    from xtuner.export.in_memory_merge import merge_in_memory, reshard
    from xtuner.export.shards import parse_size

    whole = aside.parent / "whole"
    whole.mkdir()
    verdict = merge_in_memory(
        base,
        adapter,
        whole,
        dtype=dtype,
        device=args.device,
        is_clip=args.is_clip,
        trust_remote_code=args.trust_remote_code,
        check=check,
    )
    reshard(whole, aside, parse_size(args.max_shard_size), args.safe_serialization)
    return verdict


def _verify(base: Path, adapter: Path, merged: Path, trusted: bool) -> None:
    """Compare stock peft's base + adapter with the merged folder in stock transformers."""
    import torch

    from xtuner.export import verify
    from xtuner.export.adapted_class import auto_class_of
    from xtuner.export.in_memory_merge import load_base
    from xtuner.export.model_folder import read_adapter_config, read_json
    from xtuner.export.streaming_merge import read_adapter, resize_embeddings
    from xtuner.export.weights import Weights
    from xtuner.model.lora.adapter_files import load_adapter

    classifier = str(read_adapter_config(adapter).task_type).endswith("SEQ_CLS")
    measure = verify.compute_rewards if classifier else verify.compute_logits
    own: Any = auto_class_of(base, read_adapter(adapter), classifier=classifier)
    how: dict[str, Any] = {"auto_class": own, "trust_remote_code": trusted}
    settings = read_json(merged / "config.json")
    dtype = getattr(torch, settings.get("dtype") or settings.get("torch_dtype") or "float32")
    with verify.quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied weights: they are compared here
        load: Any = functools.partial(verify.load_with_transformers, classifier=classifier, **how)
        found_model = load(merged)
        ids = verify.probe_ids(found_model.config.get_text_config().vocab_size)
        found = measure(found_model, ids)
        labels = found_model.config.num_labels
        is_tied = bool(found_model.config.get_text_config().tie_word_embeddings)
        del found_model
        quantised = "quantization_config" in read_json(base / "config.json")
        if quantised:
            heads = labels if classifier else None
            model = load_base(base, torch.float32, "cpu", num_labels=heads, **how)
        else:
            model = load(base, num_labels=labels)
        resize_embeddings(model, read_adapter(adapter))
        if not is_tied:
            verify.untie(model)
        experts = verify.has_experts(model)
        before = verify.own_weights(model) if experts or quantised else None
        wrapped = load_adapter(model, adapter)
        expected = measure(wrapped, ids)
        exact = wrapped.merge_and_unload().state_dict()
        if experts:
            verify.check_experts(
                load(merged),
                exact,
                lambda model: verify.compare(expected, measure(model, ids)),
                dtype,
                tr("base + adapter"),
                before,
            )
            return
        known = before or verify.stored_weights(exact, Weights(base))
        verify.check_stored_weights(exact, merged, dtype, known)
    verify.check_difference(verify.compare(expected, found), dtype, tr("base + adapter"))
