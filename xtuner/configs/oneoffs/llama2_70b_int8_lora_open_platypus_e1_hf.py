# ruff: noqa: C408
# Llama-2-70b-hf: LoRA on 8-bit weights, on Open-Platypus, 1 epoch.
# It is trained by the Trainer of transformers.
#
#     xtuner train llama2_70b_int8_lora_open_platypus_e1_hf_copy.py
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.map_fns import alpaca_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

framework = "huggingface"
#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# a name on the Hugging Face hub or a local folder
pretrained_model_name_or_path = "meta-llama/Llama-2-70b-hf"
dataset_name_or_path = "garage-bAInd/Open-Platypus"
max_length = 2048  # tokens of a row; longer samples are truncated
pack_to_max_length = True  # pack several samples into a row, without padding
# chat template; use the same in `xtuner chat`
prompt_template = PROMPT_TEMPLATE.llama2_chat

#######################################################################
#                      PART 2  Model & Tokenizer                      #
#######################################################################
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    padding_side="right",
)

model = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    dtype=torch.bfloat16,
    quantization_config=dict(type=BitsAndBytesConfig, load_in_8bit=True),
)

lora = dict(
    type=LoraConfig,
    r=16,
    lora_alpha=16,
    lora_dropout=0.05,
    target_modules=["gate_proj", "down_proj", "up_proj"],
    bias="none",
    task_type="CAUSAL_LM",
)

#######################################################################
#                    PART 3  Dataset & Dataloader                     #
#######################################################################
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=dataset_name_or_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack_to_max_length,
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
trainer = Trainer

training_args = dict(
    type=TrainingArguments,
    do_train=True,
    learning_rate=3e-4,
    weight_decay=0,
    lr_scheduler_type="cosine",
    warmup_steps=100,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    num_train_epochs=1,
    bf16=True,
    optim="adamw_torch",
    ddp_find_unused_parameters=False,
    logging_steps=1,
    save_strategy="steps",
    save_steps=1000,
    save_total_limit=2,
)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
# The Trainer keeps the log and the checkpoints: see training_args above.
