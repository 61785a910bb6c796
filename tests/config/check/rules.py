"""One rule of check-cfg on the text of a config."""

from __future__ import annotations

from xtuner.config.check.problem import Context, Finding, RuleFunction
from xtuner.config.document import ConfigDocument
from xtuner.config.load import load_source
from xtuner.config.source import ConfigSource


def findings(rule: RuleFunction, text: str) -> list[Finding]:
    """What a rule finds in a config."""
    source = ConfigSource(IMPORTS + text, "config.py")
    config = load_source(source)
    return list(rule(Context(ConfigDocument(source, config, source, config))))


def keys(rule: RuleFunction, text: str) -> list[str]:
    """The keys at fault."""
    return [finding.key for finding in findings(rule, text)]


IMPORTS = """
import torch
from datasets import load_dataset
from mmengine.optim import LinearLR, CosineAnnealingLR
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import VisionLanguageDataset, process_hf_dataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.dataset.map_fns import alpaca_map_fn, pretrain_map_fn, template_map_fn_factory
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import DPO, RewardModel, SupervisedFinetune, VisionLanguageFinetune
from xtuner.tokenization.processor import load_processor
from xtuner.utils import PROMPT_TEMPLATE
"""
