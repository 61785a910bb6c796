"""Private parts of other libraries that we rely on: each is named, with its place and its reason.

A release of these libraries may change them without notice. Then the test of that name fails and
says what stops working, before a user meets an AttributeError or, worse, other numbers.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xtuner"
FOREIGN = ("transformers", "peft", "torch", "bitsandbytes", "deepspeed", "mmengine", "datasets")


@dataclass(frozen=True)
class Internal:
    """One private part.

    Attributes:
        name: dotted; the longest importable prefix is the module.
        used_in: the file of ours that relies on it, below ``xtuner``.
        reason: what it is for, and what happens without it.
        holds: further condition on the object; True when all is well.
    """

    name: str
    used_in: str
    reason: str
    holds: Callable[[Any], bool] = lambda found: True

    @property
    def word(self) -> str:
        return self.name.rpartition(".")[2]

    def find(self) -> Any:
        words = self.name.split(".")
        pytest.importorskip(words[0])
        for count in range(len(words), 0, -1):
            try:
                module = importlib.import_module(".".join(words[:count]))
            except ModuleNotFoundError:
                continue
            return reduce(getattr, words[count:], module)
        raise ModuleNotFoundError(self.name)


def takes(*names: str) -> Callable[[Any], bool]:
    """Whether a function has parameters of these names."""
    return lambda found: set(names) <= set(inspect.signature(found).parameters)


def says(*words: str) -> Callable[[Any], bool]:
    """Whether the source of a class or function has these words."""

    def holds(found: Any) -> bool:
        source = inspect.getsource(found)
        return all(re.search(rf"\b{word}\b", source) for word in words)

    return holds


INTERNALS = [
    # transformers
    Internal(
        "transformers.masking_utils.flash_attention_mask",
        "model/modules/attention.py",
        "our attention gets no mask, or (B, S); without it each model build fails",
    ),
    Internal(
        "transformers.masking_utils.or_masks",
        "model/modules/index_mask.py",
        "its closure says that tokens see later ones; without it Gemma's image tokens are causal",
        lambda found: found(id).__qualname__.startswith("or_masks."),
    ),
    Internal(
        "transformers.masking_utils.create_causal_mask",
        "model/modules/index_mask.py",
        "joins masks by or_masks, and gives them to ours by these names",
        says("or_masks", "mask_function", "q_offset", "kv_offset", "batch_size", "device"),
    ),
    Internal(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel.get_rope_index",
        "model/modules/image_rows.py",
        "the class's own positions; without it packed rows with images have those of text",
        takes("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"),
    ),
    Internal(
        "transformers.models.auto.video_processing_auto.AutoVideoProcessor",
        "tokenization/processor.py",
        "replaced where torchvision is missing; without it no processor is loaded there",
        lambda found: hasattr(found, "from_pretrained"),
    ),
    Internal(
        "transformers.PreTrainedModel._supports_attention_backend",
        "model/loading.py",
        "says whether a model calls the registered attention; without it packing is refused",
        lambda found: isinstance(found, bool),
    ),
    Internal(
        "transformers.PreTrainedConfig._attn_implementation",
        "model/loading.py",
        "says which attention a model calls; without it eager attention would mix packed samples",
    ),
    Internal(
        "transformers.PreTrainedModel._set_gradient_checkpointing",
        "model/activation_checkpointing.py",
        "gives layers the function that recomputes them; without it offload has no effect",
        takes("gradient_checkpointing_func"),
    ),
    Internal(
        "transformers.PreTrainedModel._from_config",
        "model/meta_model.py",
        "builds a model without weights where a config names a class; without it convert fails",
    ),
    Internal(
        "transformers.PreTrainedConfig._experts_implementation",
        "planning/activations.py",
        "says which function computes experts; without it mixtures are planned by values they lack",
    ),
    Internal(
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts._apply_gate",
        "planning/stand_ins.py",
        "the gate of experts, set by a decorator; without it xtuner plan fails for mixtures",
    ),
    Internal(
        "transformers.ProcessorMixin._process_images",
        "dataset/vision_language/placeholders.py",
        "the placeholder text of an image; without it no row with images can be prepared",
    ),
    Internal(
        "transformers.ProcessorMixin._merge_kwargs",
        "dataset/vision_language/placeholders.py",
        "the settings that a processor gives its image processor; without them, other pixels",
        takes("tokenizer_init_kwargs"),
    ),
    Internal(
        "transformers.Qwen2_5_VLProcessor._get_num_multimodal_tokens",
        "dataset/vision_language/placeholders.py",
        "counts placeholders; without it each size is processed once, which takes longer",
        takes("image_sizes"),
    ),
    Internal(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "export/write_model.py",
        "says whether a file names tensors as the model does; without it convert and merge fail",
        takes("model", "add_legacy"),
    ),
    Internal(
        "transformers.core_model_loading.PrefixChange",
        "export/streaming_merge.py",
        "conversions that change no tensor; without it merge fails",
    ),
    Internal(
        "transformers.core_model_loading.revert_weight_conversion",
        "utils/moe_state_dict.py",
        "names and splits experts as files do; without it get_origin_state_dict fails",
        takes("model", "state_dict"),
    ),
    Internal(
        "transformers.core_model_loading.revert_weight_conversion",
        "export/in_memory_merge.py",
        "reads model._weight_conversions; if not, a dequantised merge has other tensor names",
        says("_weight_conversions"),
    ),
    Internal(
        "transformers.PreTrainedModel.get_expanded_tied_weights_keys",
        "export/write_model.py",
        "fills all_tied_weights_keys; without it tied weights are written twice",
    ),
    Internal(
        "transformers.AutoModelForCausalLM._model_mapping",
        "model/transformers_models/auto.py",
        "configuration class -> model class; without it our families are not registered",
        lambda found: "LlamaConfig" in {key.__name__ for key in found},
    ),
    Internal(
        "transformers.models.auto.tokenization_auto.REGISTERED_TOKENIZER_CLASSES",
        "model/transformers_models/auto.py",
        "tokenizer classes by name; without it a folder's own code would be preferred",
        lambda found: isinstance(found, dict),
    ),
    Internal(
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        "model/backends/cpu/fused_layers.py",
        "replaced in the model's module; without it rotary embeddings are three times slower",
        takes("q", "k", "cos", "sin"),
    ),
    # peft
    Internal(
        "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer",
        "export/streaming_merge.py",
        "replaced, or the adapter would follow its base to the meta device and lose its values",
        takes("adapter_name", "device"),
    ),
    Internal(
        "peft.utils.other.AuxiliaryTrainingWrapper",
        "export/streaming_merge.py",
        "layers that cannot be merged one by one; without it merge fails",
    ),
    Internal(
        "peft.utils.other.ModulesToSaveWrapper",
        "export/streaming_merge.py",
        "modules that an adapter brings in full; without it merge fails",
        says("modules_to_save"),
    ),
    Internal(
        "peft.tuners.lora.layer.LoraLayer",
        "model/lora/fast_lora.py",
        "what a layer computes with; a further variant must be left to peft",
        says("lora_A", "lora_B", "scaling", "lora_dropout", "lora_bias", "lora_variant"),
    ),
    Internal(
        "peft.tuners.lora.layer.LoraLayer.resolve_lora_variant",
        "model/lora/fast_lora.py",
        "how peft says that a layer computes otherwise (DoRA and others): by lora_variant",
    ),
    Internal(
        "peft.tuners.lora.bnb.Linear4bit",
        "model/lora/fast_lora.py",
        "the class of LoRA on 4-bit layers; without it QLoRA falls back to peft's slow way",
    ),
    Internal(
        "peft.tuners.lora.layer.LoraLayer.pissa_init",
        "export/streaming_merge.py",
        "what PiSSA took off the base's weight; without it such adapters cannot be merged",
        takes("adapter_name", "init_lora_weights"),
    ),
    Internal(
        "peft.tuners.lora.layer.LoraLayer.olora_init",
        "export/streaming_merge.py",
        "what OLoRA took off the base's weight; without it such adapters cannot be merged",
        takes("adapter_name"),
    ),
    # bitsandbytes
    Internal(
        "bitsandbytes.nn.Linear4bit",
        "model/loading.py",
        "support_avx512bf16_for_cpu keeps 4-bit weights from being repacked without a backward",
        says("support_avx512bf16_for_cpu"),
    ),
    Internal(
        "bitsandbytes.functional.QuantState",
        "model/lora/fast_lora.py",
        "packing_format_for_cpu marks repacked weights, which have no backward pass",
        lambda found: (
            "packing_format_for_cpu" in inspect.getsource(importlib.import_module(found.__module__))
        ),
    ),
    Internal(
        "bitsandbytes.nn.parametrize.replace_parameter_4bit",
        "model/lora/experts.py",
        "keeps the experts of a mixture in 4 bits; without it QLoRA of mixtures fails",
        takes("module", "param_name", "compress_statistics", "quant_type"),
    ),
    Internal(
        "bitsandbytes.optim.optimizer.sync_gpu",
        "engine/paged_states.py",
        "waits for the GPU after each weight; without the name it would do so again",
    ),
    Internal(
        "bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer",
        "engine/paged_states.py",
        "makes paged memory; without it paged states cannot be resumed",
        takes("p", "dtype"),
    ),
    Internal(
        "bitsandbytes.optim.optimizer.Optimizer8bit.load_state_dict",
        "engine/paged_states.py",
        "move_to_device leaves states in main memory; without it resuming needs room for all",
        takes("move_to_device"),
    ),
    # torch
    Internal(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "model/backends/cpu/attention.py",
        "attention on a CPU with the norms that its backward needs; without it training fails",
    ),
    Internal(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        "model/backends/cpu/attention.py",
        "its backward; without it training on a CPU fails",
    ),
    Internal(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "planning/activations.py",
        "shapes without memory, with autocast; without it xtuner plan counts no activations",
    ),
    Internal(
        "torch._dynamo.exc.TorchDynamoException",
        "model/backends/cpu/kernels.py",
        "compilation failed: the kernels run uncompiled; without it the run would end",
        lambda found: issubclass(found, Exception),
    ),
    Internal(
        "torch.serialization._get_layout",
        "checkpoint/sharded.py",
        "named in the metadata of sharded checkpoints; without it none can be read",
    ),
    Internal(
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "checkpoint/sharded.py",
        "where a shard lies in its file; without it no sharded checkpoint can be read",
        lambda found: {"relative_path", "offset", "length"} <= set(found.__dataclass_fields__),
    ),
    Internal(
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "checkpoint/sharded.py",
        "named in the metadata of sharded checkpoints; without it none can be read",
    ),
    Internal(
        "torch.nn.Module",
        "engine/_strategy/fsdp.py",
        "_parameters, _buffers, _modules are changed in place: 4-bit weights are kept from FSDP, "
        "buffers of a folder's code are computed again, InternVL has two views of its parts",
        says("_parameters", "_buffers", "_modules"),
    ),
    # deepspeed
    Internal(
        "deepspeed.ops.__compatible_ops__",
        "engine/_strategy/deepspeed.py",
        "switches off an operator that is compiled and may hang; without it ZeRO on CPUs fails",
        lambda found: hasattr(found, "__setitem__"),
    ),
    Internal(
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "engine/_strategy/deepspeed.py",
        "named in ZeRO checkpoints; without it they cannot be read as data",
    ),
    Internal(
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "engine/_strategy/deepspeed.py",
        "named in ZeRO checkpoints; without it they cannot be read as data",
    ),
    Internal(
        "deepspeed.utils.tensor_fragment.fragment_address",
        "engine/_strategy/deepspeed.py",
        "named in ZeRO checkpoints; without it they cannot be read as data",
    ),
    # mmengine
    Internal(
        "mmengine.config.utils._is_builtin_module",
        "config/load.py",
        "which imports of a config are not lazy; without it os.environ.get fails in a config",
    ),
    Internal(
        "mmengine.Config._to_lazy_dict",
        "tools/train_dataset.py",
        "a config with its lazy objects; without it train_dataset fails",
    ),
    Internal(
        "mmengine.config.lazy.LazyObject",
        "config/dump.py",
        "_module and _imported say what a lazy object imports; without them dump_config fails",
        says("_module", "_imported"),
    ),
    Internal(
        "mmengine.logging.HistoryBuffer",
        "checkpoint/serialize.py",
        "_log_history and _count_history are in checkpoints; without them logged curves are lost",
        says("_log_history", "_count_history"),
    ),
    Internal(
        "mmengine.runner.Runner._build_param_scheduler",
        "engine/runner/finetune_runner.py",
        "builds the schedules of one optimizer; without it training fails",
    ),
    Internal(
        "mmengine.runner.Runner",
        "engine/runner/finetune_runner.py",
        "_hooks, the loops, _launcher and _has_loaded are read; without them training fails",
        says("_hooks", "_train_loop", "_val_loop", "_test_loop", "_launcher", "_has_loaded"),
    ),
    Internal(
        "mmengine.optim.OptimWrapper",
        "engine/optim.py",
        "_inner_count counts micro-batches; without it accumulation is wrong",
        says("_inner_count"),
    ),
    # datasets
    Internal(
        "datasets.Dataset",
        "dataset/prepare/cache.py",
        "_fingerprint is part of the key of prepared data; without it nothing is cached",
        says("_fingerprint"),
    ),
    # Python
    Internal(
        "atexit._run_exitfuncs",
        "utils/process_exit.py",
        "Python's own exit functions, before os._exit; without it logs may be cut",
    ),
]

# Attributes that only instances have: the class's source says so in the entry of another name.
OF_INSTANCES = {
    "_gradient_checkpointing_func": "transformers.PreTrainedModel._set_gradient_checkpointing",
    "_weight_conversions": "transformers.core_model_loading.revert_weight_conversion",
    "_module": "mmengine.config.lazy.LazyObject",
    "_imported": "mmengine.config.lazy.LazyObject",
    "_log_history": "mmengine.logging.HistoryBuffer",
    "_count_history": "mmengine.logging.HistoryBuffer",
    "_hooks": "mmengine.runner.Runner",
    "_train_loop": "mmengine.runner.Runner",
    "_val_loop": "mmengine.runner.Runner",
    "_test_loop": "mmengine.runner.Runner",
    "_launcher": "mmengine.runner.Runner",
    "_seed": "mmengine.runner.Runner",
    "_parameters": "torch.nn.Module",
    "_buffers": "torch.nn.Module",
    "_modules": "torch.nn.Module",
    "_fingerprint": "datasets.Dataset",
    "_indices": "datasets.Dataset",
    "_inner_count": "mmengine.optim.OptimWrapper",
    "_text": "mmengine.Config._to_lazy_dict",
    "_cfg_dict": "mmengine.Config._to_lazy_dict",
}
# Not a library's: Python documents it, or it is our own folder's name.
KNOWN = {"_exit", "_strategy", "_fields_"}


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda each: f"{each.used_in}:{each.word}")
def test_internal(internal):
    hint = f"{internal.name}, used in xtuner/{internal.used_in}: {internal.reason}."
    try:
        found = internal.find()
    except (AttributeError, ModuleNotFoundError) as error:
        pytest.fail(f"{error}. {hint}")
    assert internal.holds(found), f"it has changed. {hint}"


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda each: f"{each.used_in}:{each.word}")
def test_the_place_that_uses_it(internal):
    file = PACKAGE / internal.used_in
    assert file.is_file(), f"{internal.name} is said to be used in {internal.used_in}"


def own_names() -> set[str]:
    """The private names that are defined in the package itself."""
    names = set()
    for file in PACKAGE.rglob("*.py"):
        names |= set(
            re.findall(r"(?:def |class |self\.|^\s*)(_[a-z]\w*)", file.read_text("utf-8"), re.M)
        )
    return names


def foreign_accesses() -> set[tuple[str, str]]:
    """(file, name) of private attributes and imports that are not the package's own."""
    own, found = own_names(), set()
    for file in PACKAGE.rglob("*.py"):
        if "configs" in file.parts:
            continue
        place = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FOREIGN):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = (name for name in names if re.fullmatch(r"_[a-z]\w*", name))
            found |= {(place, name) for name in private if name not in own}
    return found


def test_every_private_part_is_listed():
    listed = {word for each in INTERNALS for word in each.name.split(".")}
    listed |= set(OF_INSTANCES) | KNOWN
    unlisted = sorted(
        f"{place}: {name}" for place, name in foreign_accesses() if name not in listed
    )
    assert not unlisted, "add them to INTERNALS, with the reason:\n" + "\n".join(unlisted)


def test_attributes_of_instances_belong_to_an_entry():
    assert set(OF_INSTANCES.values()) <= {each.name for each in INTERNALS}
