"""The datasets: one card each. To add one, add its card (and a map function, if its rows need one).

The questions are what ``EvaluateChatHook`` asks now and then, to show how training comes along.
"""

from __future__ import annotations

from typing import Any

from xtuner.configs.cards import Code, DatasetCard, Source

ALPACA_EN = Source("alpaca_en", "data_hub", ("alpaca_en_path", "tatsu-lab/alpaca"), "alpaca_map_fn")
ALPACA_ZH = Source(
    "alpaca_zh",
    "data_hub",
    ("alpaca_zh_path", "silk-road/alpaca-data-gpt4-chinese"),
    "alpaca_zh_map_fn",
)
OASST1 = Source(
    "oasst1", "data_hub", ("oasst1_path", "timdettmers/openassistant-guanaco"), "oasst1_map_fn"
)
CRIME = Source(
    "crime_kg_assitant",
    "data_json",
    ("crime_kg_assitant_path", "./data/CrimeKgAssitant清洗后_52k.json"),
    "crime_kg_assitant_map_fn",
)
LAW = Source(
    "law_reference_data",
    "data_json",
    ("law_reference_data_path", "./data/训练数据_带法律依据_92k.json"),
    "law_reference_map_fn",
)
MOSS_PLAIN = Source(
    "moss_sft_no_plugins",
    "data_moss",
    ("moss_sft_no_plugins_path", "./data/moss-003-sft-no-tools.jsonl"),
)
MOSS_TOOLS_PATH = (
    "moss_sft_plugins_path",
    "./data/conversations_with_tools_with_inner_instruction_no_text2image"
    "_train_all_random_meta0.5_0.1_0.01_moss_0709.jsonl",
)
CONVERSATION_ROW = 'A row: {"conversation": [{"system": ..., "input": ..., "output": ...}, ...]}'
MESSAGES_ROW = 'A row: {"messages": [{"role": "user", "content": ...}, ...]}'
MOSS_NOTE = "Its files are those of https://huggingface.co/datasets/fnlp/moss-003-sft-data."
FOLDER = "/path/to/sft/data/folder"
MY_FILES = ("data_files", ["/path/to/json/file.json"])

VISION: dict[str, Any] = {
    "SYSTEM": "",
    "max_length": 4096,
    "dataloader_num_workers": 4,
    "evaluation_images": ["https://llava-vl.github.io/static/images/view.jpg"],
    "evaluation_inputs": ["图片里有什么？", "What is in the picture?"],
}
MOSS = {
    "SYSTEM": Code("SYSTEM_TEMPLATE.moss_sft"),
    "evaluation_inputs": [
        "一个圆锥的底面半径是3，高是4，求它的体积。",
        "鸡和兔关在一个笼子里，一共有20个头、62只脚，鸡和兔各有多少只？",
        "谁是比尔盖茨？",
    ],
}
CODER: dict[str, Any] = {
    "SYSTEM": Code("SYSTEM_TEMPLATE.coder"),
    "evaluation_inputs": [
        "用Python写一个函数，把十六进制颜色（例如#0066ee）换算成红、绿、蓝三个数值。",
        "Write a Python function that turns a hexadecimal colour such as #0066ee into RGB values.",
    ],
}
LAWYER = {
    "SYSTEM": Code("SYSTEM_TEMPLATE.lawyer"),
    "evaluation_inputs": ["办理离婚要带哪些材料？", "在网上卖鳄鱼皮做的包犯法吗？"],
}
REACT_SYSTEM = """你可以调用外部工具来回答问题。可用的工具有：
- GoogleSearch：在谷歌上搜索，输入是要搜索的内容。
- PythonInterpreter：运行 Python 代码，代码是一个名为 solution 的函数，返回答案。
需要工具时，请这样回复：
```
Thought: 这一步要解决什么，是否需要工具
Action: 工具名称，必须是 GoogleSearch 或 PythonInterpreter
Action Input: 给工具的输入
```
工具会这样回复：
```
Response: 工具的结果
```
知道答案以后，请这样回复：
```
Thought: 得出答案的过程
Final Answer: 最终答案
```
"""


def _hub(
    name: str, title: str, path: str, map_fn: str, load: str = "", **settings: object
) -> DatasetCard:
    """A dataset of one source on the hub, kept in ``train_dataset``."""
    source = Source("train_dataset", "data_hub", ("data_path", path), map_fn, load)
    return DatasetCard(name, title, (source,), settings=settings)


# Long rows, large steps: how InternLM's own training code sets things.
INTERN = {
    "SYSTEM": "",
    "max_length": 32768,
    "max_epochs": 1,
    "accumulative_counts": 1,
    "dataloader_num_workers": 4,
    "lr": 4e-5,
    "betas": (0.9, 0.95),
    "weight_decay": 0.01,
    "warmup_ratio": 0.025,
    "eta_min": Code("lr * 0.15"),
    "log_interval": 1,
    "throughput": True,
}


def _intern(name: str, title: str, part: str, folder: str) -> DatasetCard:
    """A folder in the layout of InternLM's training code."""
    source = Source("train_dataset", part, ("dataset_folder", folder))
    return DatasetCard(name, title, (source,), settings=INTERN)


_CARDS = [
    DatasetCard("alpaca", "Alpaca (English)", (ALPACA_EN,)),
    DatasetCard("alpaca_zh", "Alpaca-GPT4 (Chinese)", (ALPACA_ZH,)),
    DatasetCard("alpaca_enzh", "Alpaca (English and Chinese)", (ALPACA_EN, ALPACA_ZH)),
    DatasetCard(
        "alpaca_enzh_oasst1",
        "Alpaca (English and Chinese) and OpenAssistant",
        (ALPACA_EN, ALPACA_ZH, OASST1),
    ),
    _hub(
        "oasst1", "OpenAssistant", "timdettmers/openassistant-guanaco", "oasst1_map_fn", SYSTEM=""
    ),
    _hub(
        "oasst1_512",
        "OpenAssistant, rows of at most 512 tokens, unpacked",
        "timdettmers/openassistant-guanaco",
        "oasst1_map_fn",
        SYSTEM="",
        max_length=512,
        pack_to_max_length=False,
    ),
    _hub("open_platypus", "Open-Platypus", "garage-bAInd/Open-Platypus", "alpaca_map_fn"),
    _hub(
        "openorca",
        "OpenOrca",
        "Open-Orca/OpenOrca",
        "openorca_map_fn",
        SYSTEM="",
        evaluation_freq=5000,
    ),
    _hub(
        "code_alpaca",
        "CodeAlpaca",
        "HuggingFaceH4/CodeAlpaca_20K",
        "code_alpaca_map_fn",
        evaluation_freq=100,
        **CODER,
    ),
    _hub("tiny_codes", "tiny-codes", "nampdn-ai/tiny-codes", "tiny_codes_map_fn", **CODER),
    _hub(
        "colorist",
        "Colors",
        "burkelibbey/colors",
        "colors_map_fn",
        SYSTEM=Code("SYSTEM_TEMPLATE.colorist"),
        evaluation_freq=200,
        evaluation_inputs=[
            "来一个像雨后天空那样的蓝色。",
            "A blue as clear as the sky after rain.",
        ],
    ),
    _hub(
        "sql",
        "SQL Create Context",
        "b-mc2/sql-create-context",
        "sql_map_fn",
        SYSTEM=Code("SYSTEM_TEMPLATE.sql"),
        evaluation_inputs=[
            "CREATE TABLE city (name VARCHAR, lat REAL)\nWhich cities lie north of 50 degrees?",
            "CREATE TABLE weather (zip_code VARCHAR, visibility INTEGER)\n能见度最高的邮编是哪个？",
        ],
    ),
    _hub(
        "medical",
        "Medical (Chinese)",
        "shibing624/medical",
        "medical_map_fn",
        "name=data_config_name",
        SYSTEM=Code("SYSTEM_TEMPLATE.medical"),
        data_config_name="finetune",
        evaluation_inputs=["过敏体质的人可以献血吗？", "有高血压的老人能不能喝咖啡？"],
    ),
    _hub(
        "wizardlm",
        "WizardLM",
        "WizardLM/WizardLM_evol_instruct_V2_196k",
        "wizardlm_map_fn",
        SYSTEM="",
    ),
    _hub(
        "stack_exchange_example",
        "Stack Exchange (questions and answers)",
        "ArmelR/stack-exchange-instruction",
        "stack_exchange_map_fn",
        'data_dir="data/finetune"',
        SYSTEM="",
        max_epochs=1,
        max_dataset_length=20000,
    ),
    DatasetCard(
        "arxiv_gentitle",
        "arXiv abstracts and titles",
        (
            Source(
                "train_dataset",
                "data_json",
                ("data_path", "./data/arxiv_data.json"),
                "arxiv_map_fn",
            ),
        ),
        settings={
            "SYSTEM": Code("SYSTEM_TEMPLATE.arxiv_gentile"),
            "evaluation_inputs": [
                "We train a small language model on carefully chosen text and find that the choice "
                "of data matters more than its amount. On twelve benchmarks it equals models four "
                "times its size. We release the data, the code and the model.",
                "Low-rank adapters make fine-tuning cheap, but nobody knows which rank a task "
                "needs. We propose a rule that finds it from the gradients of the first hundred "
                "steps, and show that it saves memory without a loss of quality.",
            ],
        },
        note="`xtuner preprocess arxiv` makes its file from arXiv's metadata (on Kaggle).",
    ),
    DatasetCard(
        "lawyer",
        "Chinese legal questions",
        (CRIME, LAW),
        settings=LAWYER,
        note="Its two files are those of https://github.com/LiuHC0428/LAW-GPT.",
    ),
    DatasetCard(
        "moss_sft_all",
        "MOSS-003-SFT, with and without plugins",
        (MOSS_PLAIN, Source("moss_sft_plugins", "data_moss", MOSS_TOOLS_PATH)),
        template="moss_sft",
        settings=MOSS,
        hook={"stop_words": ["<eoc>"]},
        note=MOSS_NOTE,
    ),
    DatasetCard(
        "moss_sft_plugins",
        "MOSS-003-SFT with plugins",
        (Source("train_dataset", "data_moss", MOSS_TOOLS_PATH),),
        template="moss_sft",
        settings=MOSS,
        hook={"stop_words": ["<eoc>"]},
        note=MOSS_NOTE,
    ),
    DatasetCard(
        "msagent_react",
        "MSAgent-Bench",
        (
            Source(
                "train_dataset",
                "data_ms",
                ("data_path", "damo/MSAgent-Bench"),
                "msagent_react_map_fn",
            ),
        ),
        settings={
            "SYSTEM": REACT_SYSTEM,
            "pack_to_max_length": False,
            "evaluation_inputs": ["明天上海会下雨吗？"],
        },
        note="It is on ModelScope: pip install modelscope.",
    ),
    DatasetCard(
        "json",
        "your own conversations (XTuner format)",
        (Source("train_dataset", "data_json", ("data_path", "path/to/your/json_data"), None),),
        settings={"SYSTEM": ""},
        note=CONVERSATION_ROW,
    ),
    DatasetCard(
        "custom_sft",
        "your own conversations (OpenAI messages)",
        (Source("train_dataset", "data_files", MY_FILES, "openai_map_fn"),),
        settings={"SYSTEM": ""},
        note=MESSAGES_ROW,
    ),
    DatasetCard(
        "finetune_custom_sft",
        "your own conversations (OpenAI messages), long",
        (Source("train_dataset", "data_files", MY_FILES, "openai_map_fn"),),
        settings={"SYSTEM": "", "max_length": 32768, "lr": 2e-4, "log_interval": 1},
        note=MESSAGES_ROW,
    ),
    DatasetCard(
        "finetune_custom_dataset",
        "your own conversations (XTuner format), long",
        (Source("train_dataset", "data_files", MY_FILES, None),),
        settings=INTERN,
        note=CONVERSATION_ROW,
    ),
    _intern("w_tokenized_dataset", "tokens in InternLM's layout", "intern_tokenized", FOLDER),
    _intern("w_internevo_dataset", "tokens in InternEvo's layout", "intern_tokenized", FOLDER),
    _intern("w_untokenized_dataset", "rows in InternLM's layout", "intern_untokenized", FOLDER),
    _intern(
        "intern_repo_dataset_template", "tokens in InternLM's layout", "intern_tokenized", FOLDER
    ),
    DatasetCard(
        "custom_pretrain",
        "your own text",
        (Source("train_dataset", "data_files", MY_FILES, "pretrain_map_fn"),),
        kind="pretrain",
        settings={
            "SYSTEM": "",
            "shuffle_before_pack": False,
            "evaluation_inputs": ["上海是", "Shanghai is"],
        },
        note='A row: {"text": ...}',
    ),
    DatasetCard(
        "skypile_pretrain",
        "SkyPile-150B",
        (
            Source(
                "train_dataset",
                "data_hub",
                ("data_path", "Skywork/SkyPile-150B"),
                "pretrain_map_fn",
            ),
        ),
        kind="pretrain",
        settings={"SYSTEM": "", "evaluation_inputs": ["上海的景点有"]},
        hook={"max_new_tokens": 100},
    ),
    DatasetCard(
        "orpo_dpo_mix_40k",
        "ORPO-DPO-mix-40k",
        (
            Source(
                "train_dataset",
                "preference_hub",
                ("data_path", "mlabonne/orpo-dpo-mix-40k"),
                "orpo_dpo_mix_40k_map_fn",
            ),
        ),
        kind="preference",
    ),
    DatasetCard(
        "ultrafeedback",
        "UltraFeedback (binarized)",
        (
            Source(
                "train_dataset",
                "preference_hub",
                ("data_path", "argilla/ultrafeedback-binarized-preferences-cleaned"),
                "orpo_dpo_mix_40k_map_fn",
            ),
        ),
        kind="preference",
    ),
    DatasetCard(
        "jsonl_dataset",
        "your own preferences (JSON lines)",
        (
            Source(
                "train_dataset",
                "preference_files",
                ("data_files", ["/path/to/preferences.jsonl"]),
                None,
            ),
        ),
        kind="preference",
        note='A row: {"prompt": [...], "chosen": [...], "rejected": [...]}, messages in each.',
    ),
    DatasetCard(
        "llava_instruct",
        "LLaVA-Instruct (665k rows with images)",
        (
            Source(
                "train_dataset",
                "data_vision",
                (
                    "data_files",
                    Code('data_root + "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"'),
                ),
            ),
        ),
        kind="vision",
        settings={
            **VISION,
            "data_root": "./data/llava_data/",
            "image_folder": Code('data_root + "llava_images"'),
        },
        note="docs/en/llava.md says where its rows and images come from.",
    ),
    DatasetCard(
        "custom_vision",
        "your own rows with images",
        (Source("train_dataset", "data_vision", ("data_files", ["/path/to/rows.jsonl"])),),
        kind="vision",
        settings={**VISION, "image_folder": "/path/to/images"},
        note='A row: {"messages": [{"role": "user", "content": "<image>What is it?"}, '
        '{"role": "assistant", "content": "A cat."}], "images": ["cat.jpg"]}; '
        "other layouts are recognised too.",
    ),
]

DATASETS = {card.name: card for card in _CARDS}
