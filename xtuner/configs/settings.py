"""The settings of a config: what each is for, its default, and its value for each method.

A value comes from, in increasing order of precedence: the defaults, the method, the dataset's card,
the model's card, the options of the name, the table of exceptions. The last entries of ``DEFAULTS``
are not settings of a file: they are the values of placeholders in its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.configs.cards import Code

# The datasets of the InternVL mixture for LLaVA, in order: its settings end in _data_path and
# _image_folder.
INTERNVL_SETS = (
    "sharegpt4v_caption",
    "llava",
    "sharegpt4v",
    "dvqa",
    "chartqa",
    "ai2d",
    "docvqa",
    "geoqa",
    "synthdog",
)

# PART 1 of a config: its settings in this order, each with what it is for. A text that is too
# long for the line of its value is put above it.
LAYOUT: tuple[tuple[str, Mapping[str, str]], ...] = (
    (
        "Model",
        {
            "pretrained_model_name_or_path": "a name on the Hugging Face hub or a local folder",
            "tokenizer_path": "the tokenizer that made the tokens of your data",
            "llm_name_or_path": "a name on the Hugging Face hub or a local folder",
            "visual_encoder_name_or_path": "visual encoder",
            "path": "a name on the Hugging Face hub or a local folder",
            "pretrained_pth": "projector weights that pretraining saved",
            "freeze_visual_encoder": "train the language model, not what sees",
            "freeze_projector": "nor the layers between the two",
            "bot_name": "name of the assistant",
            "use_varlen_attn": "packed samples do not attend to each other",
            "dpo_loss_type": "sigmoid, robust, hinge, ipo, kto_pair, sppo_hard or nca_pair",
            "loss_beta": "DPO: pull of the reference model; ORPO: weight of the odds ratio",
            "label_smoothing": "share of pairs whose labels may be swapped",
            "reward_token_id": "a token that ends a sample; the reward is read there",
            "loss_type": "ranking or focal",
            "penalty_type": "log_barrier, L2 or none",
        },
    ),
    (
        "Data",
        {
            "alpaca_zh_path": "a name on the hub or a local folder",
            "alpaca_en_path": "a name on the hub or a local folder",
            "oasst1_path": "a name on the hub or a local folder",
            "crime_kg_assitant_path": "",
            "law_reference_data_path": "",
            "moss_sft_no_plugins_path": "",
            "moss_sft_plugins_path": "",
            "data_root": "",
            "data_path": "where the rows are",
            "image_folder": "",
            **{
                f"{name}_{what}": ""
                for name in INTERNVL_SETS
                for what in ("data_path", "image_folder")
            },
            "data_config_name": "subset of the dataset",
            "data_files": "your data: one file or more",
            "dataset_folder": "all files of this kind below it are read",
            "max_pixels": "larger images are scaled down to this many pixels",
            "video_frames": "frames of each video at most, where rows have videos",
            "video_fps": "frames of each second of a video",
            "max_dataset_length": "rows at most, taken at random",
            "prompt_template": "chat template; use the same in `xtuner chat`",
            "max_length": "tokens of a row; longer samples are truncated",
            "pack_to_max_length": "pack several samples into a row, without padding",
            "max_packed_length": "tokens of a packed row of pairs",
        },
    ),
    ("Parallel", {"sequence_parallel_size": "GPUs that share each row (sequence parallelism)"}),
    (
        "Scheduler & Optimizer",
        {
            "batch_size": "rows of a micro-batch on each GPU",
            "accumulative_counts": "micro-batches of an optimizer step",
            "dataloader_num_workers": "worker processes of the data loader (0: none)",
            "max_epochs": "epochs over the data",
            "optim_type": "",
            "lr": "peak learning rate",
            "betas": "",
            "weight_decay": "",
            "max_norm": "gradients are clipped to this norm",
            "warmup_ratio": "share of training for the warm-up of lr",
        },
    ),
    (
        "Save",
        {
            "save_steps": "micro-batches between checkpoints",
            "save_total_limit": "checkpoints to keep (-1: all)",
        },
    ),
    (
        "Evaluate the generation performance during the training",
        {
            "evaluation_freq": "micro-batches between sample outputs",
            "SYSTEM": "system prompt of the questions",
            "evaluation_images": "images that the questions are about",
            "evaluation_videos": "videos that the questions are about",
            "evaluation_inputs": "prompts that are answered while training",
        },
    ),
)

WITH_IMAGES: Mapping[str, str] = {"max_length": "tokens of a row at most; images are never cut"}
"""What is said of settings of rows with images instead."""

DEFAULTS: Mapping[str, Any] = {
    "use_varlen_attn": True,
    "freeze_visual_encoder": True,
    "freeze_projector": True,
    "max_pixels": Code("1280 * 28 * 28"),
    "video_frames": 16,
    "video_fps": 2.0,
    "max_length": 2048,
    "pack_to_max_length": True,
    "sequence_parallel_size": 1,
    "batch_size": 1,
    "accumulative_counts": 16,
    "dataloader_num_workers": 0,
    "max_epochs": 3,
    "optim_type": Code("AdamW"),
    "lr": 2e-4,
    "betas": (0.9, 0.999),
    "weight_decay": 0,
    "max_norm": 1,
    "warmup_ratio": 0.03,
    "save_steps": 500,
    "save_total_limit": 2,
    "evaluation_freq": 500,
    "SYSTEM": Code("SYSTEM_TEMPLATE.alpaca"),
    "evaluation_inputs": [
        "请给我介绍五个上海的景点",
        "Please tell me five scenic spots in Shanghai",
    ],
    # Placeholders of the parts.
    "padding_side": "right",
    "shuffle_before_pack": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_targets": None,
    "lora_task": "CAUSAL_LM",
    "eta_min": 0.0,
    "log_interval": 10,
    "throughput": False,
    "save_optimizer": True,
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        title: what people call it.
        kind: ``sft``, ``dpo``, ``orpo`` or ``reward``: which ``parts/model_<kind>.py`` it uses.
        weights: ``full``, ``lora``, ``qlora`` or ``int8_lora``: which ``parts/llm_<weights>.py``.
        settings: its settings, weaker than the dataset's and the model's.
    """

    title: str
    kind: str
    weights: str
    settings: Mapping[str, Any]

    @property
    def adapters(self) -> bool:
        """Whether it trains adapters rather than the model itself."""
        return self.weights != "full"


_WEIGHTS = {
    "full": "full-parameter fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "int8_lora": "LoRA on 8-bit weights",
}
_QUESTIONS = [
    "Which English author of ghost stories shares his initials with medical research?",
    "Please tell me five scenic spots in Shanghai",
    "890729 - 425663? Answer with the number only.",
]
_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpo": (
        "DPO",
        {
            "dpo_loss_type": "sigmoid",
            "loss_beta": 0.1,
            "label_smoothing": 0.0,
            "lr": 5e-7,
            "evaluation_inputs": _QUESTIONS,
        },
    ),
    "orpo": ("ORPO", {"loss_beta": 0.1, "lr": 5e-6, "evaluation_inputs": _QUESTIONS}),
    "reward": (
        "reward model",
        {
            "loss_type": "focal",
            "penalty_type": "log_barrier",
            "max_epochs": 1,
            "lr": 2e-5,
            "lora_task": "FEATURE_EXTRACTION",
        },
    ),
}


def _methods() -> dict[str, Method]:
    methods = {
        weights: Method(title, "sft", weights, {"lr": 2e-5} if weights == "full" else {})
        for weights, title in _WEIGHTS.items()
    }
    for kind, (title, settings) in _KINDS.items():
        for weights in ("full", "lora", "qlora"):
            faster = {"lr": 1e-4} if kind == "reward" and weights != "full" else {}
            padded = {**settings, **faster, "use_varlen_attn": False}
            packed = {
                **settings,
                **faster,
                "use_varlen_attn": True,
                "max_packed_length": Code("max_length * 2"),
            }
            name = f"{title}, {_WEIGHTS[weights]}"
            methods[f"{kind}_{weights}"] = Method(name, kind, weights, padded)
            methods[f"{kind}_{weights}_varlenattn"] = Method(
                f"{name}, several pairs to a row", kind, weights, packed
            )
    return methods


METHODS: Mapping[str, Method] = _methods()

_IMAGE_LORA = {"lr": 1e-4, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "full": {"lr": 1e-5},
    "lora": _IMAGE_LORA,
    "qlora": _IMAGE_LORA,
}
"""Settings of the ways to train on rows with images, by ``Method.weights``."""

_STARCODER_QUESTION = [
    "def has_close_elements(numbers: list[float], threshold: float) -> bool:\n"
    '    """Whether any two of the numbers are nearer to each other than the threshold."""\n'
]

# Published settings that follow no rule: name pattern (fnmatch) -> settings. They take precedence
# over the cards, later ones over earlier ones.
EXCEPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("*_moss_sft_*_gpu8", {"batch_size": 8, "accumulative_counts": 1, "dataloader_num_workers": 2}),
    (
        "*_msagent_react_*_gpu8",
        {"batch_size": 8, "accumulative_counts": 1, "dataloader_num_workers": 2},
    ),
    ("internlm_7b_full_*", {"template": "internlm_chat"}),
    (
        "internlm_7b_full_intern_repo_*",
        {"max_length": 8192, "accumulative_counts": 4, "log_interval": 10},
    ),
    ("internlm2_[27]*_full_finetune_*", {"template": "internlm2_chat"}),
    ("internlm2_7b_w_*", {"template": "internlm2_chat"}),
    ("internlm2_chat_*_dpo_*", {"path_suffix": "-sft"}),
    ("internlm2_chat_*_reward_*", {"path_suffix": "-sft"}),
    ("internlm2_chat_1_8b_orpo_*", {"path_suffix": "-sft"}),
    ("*_orpo_qlora_varlenattn_ultrafeedback_e5", {"warmup_ratio": 0.01}),
    ("internlm2_chat_1_8b_reward_full_ultrafeedback", {"batch_size": 4}),
    ("internlm2_5_chat_7b_qlora_alpaca_e3", {"accumulative_counts": 1}),
    ("llama2_7b_qlora_msagent_react_*", {"template": "default"}),
    ("llama2_7b_full_wizardlm_e1", {"batch_size": 2, "evaluation_freq": 200}),
    ("llama2_70b_full_wizardlm_e1", {"accumulative_counts": 4}),
    (
        "llama3_70b_instruct_qlora_*",
        {"lr": 1e-4, "dataloader_num_workers": 4, "evaluation_freq": 50},
    ),
    ("minicpm_1b_full_custom_pretrain_e1", {"accumulative_counts": 1}),
    ("starcoder_*", {"evaluation_inputs": _STARCODER_QUESTION}),
    ("deepseekcoder_*", {"evaluation_freq": 100}),
    ("starcoder_qlora_*", {"lr": 1e-4, "weight_decay": 0.05, "evaluation_freq": 200}),
    ("qwen1_5_110b_*", {"accumulative_counts": 1}),
    ("qwen1_5_110b_*full_*", {"lr": 1e-5, "dataloader_num_workers": 4}),
    ("qwen1_5_110b_*qlora_*", {"lr": 1e-4}),
    ("qwen1_5_110b_qlora_*", {"dataloader_num_workers": 4}),
    ("qwen1_5_110b_*_16k_2gpus", {"sequence_parallel_size": 2, "evaluation_freq": 50}),
    ("mistral_7b_*_finetune_custom_*", {"template": "mistral"}),
    ("mistral_7b_w_*", {"dataloader_num_workers": 0}),
    (
        "mistral_7b_w_tokenized_*",
        {"template": "internlm2_chat", "tokenizer_path": "path/to/your/tokenizer"},
    ),
    ("mistral_7b_w_untokenized_*", {"template": "mistral"}),
    ("mistral_7b_qlora_skypile_*", {"lora_dropout": 0.05}),
)
