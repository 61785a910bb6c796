"""The known datasets, each as a function that returns tokenised rows for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from xtuner.utils.types import Tokenizer

Template: TypeAlias = "Mapping[str, Any] | None"
Builder = Callable[..., Any]

CRIME_FILE = "./data/CrimeKgAssitant清洗后_52k.json"
REFERENCE_FILE = "./data/训练数据_带法律依据_92k.json"
MOSS_FILE = "./data/moss-003-sft-no-tools.jsonl"
MOSS_PLUGINS_FILE = (
    "./data/conversations_with_tools_with_inner_instruction_no_text2image"
    "_train_all_random_meta0.5_0.1_0.01_moss_0709.jsonl"
)


def _from_rows(
    rows: Dataset | DatasetDict,
    tokenizer: Tokenizer,
    map_fn: str,
    max_length: int,
    template: Template,
    **settings: object,
) -> Any:
    from xtuner.dataset import map_fns, process_hf_dataset
    from xtuner.utils.templates import PROMPT_TEMPLATE

    return process_hf_dataset(
        dataset=rows,
        tokenizer=tokenizer,
        max_length=max_length,
        dataset_map_fn=getattr(map_fns, map_fn),
        template_map_fn=map_fns.template_map_fn_factory(
            template=PROMPT_TEMPLATE.default if template is None else template
        ),
        **settings,
    )


def _builder(name: str, place: str, map_fn: str, subset: str | None = None) -> Builder:
    """Create the function of a dataset with one source.

    Args:
        name: the function's name without ``_dataset``.
        place: a hub name, or a JSON file as a path that begins with ``./``.
        map_fn: the name of the function that reads a row.
        subset: which of the hub dataset's configurations.
    """

    def build(
        tokenizer: Tokenizer,
        path: str = place,
        max_length: int = 2048,
        prompt_template: Template = None,
        remove_unused_columns: bool = True,
        pack_to_max_length: bool = True,
        **settings: object,
    ) -> Any:
        from datasets import load_dataset

        if path.endswith((".json", ".jsonl")):
            rows = load_dataset("json", data_files={"train": path})
        else:
            rows = load_dataset(path, subset)
        return _from_rows(
            rows,
            tokenizer,
            map_fn,
            max_length,
            prompt_template,
            remove_unused_columns=remove_unused_columns,
            pack_to_max_length=pack_to_max_length,
            **settings,
        )

    build.__name__ = build.__qualname__ = f"{name}_dataset"
    build.__doc__ = f"""Rows of ``{place}``, read by ``{map_fn}``, as tokens.

    Args:
        tokenizer: of the model.
        path: the hub name, a folder, or a JSON file with rows of the same layout.
        max_length: tokens of a row.
        prompt_template: an entry of ``PROMPT_TEMPLATE``; ``default`` when None.
        remove_unused_columns: keep only the columns of tokens.
        pack_to_max_length: put several samples into one row.
        settings: further keyword arguments of ``process_hf_dataset``.
    """
    return build


def _joined(name: str, places: dict[str, Builder]) -> Builder:
    """Create the function of two concatenated datasets, whose arguments are the sources."""

    def build(tokenizer: Tokenizer, *paths: str, **settings: object) -> Any:
        from xtuner.dataset import ConcatDataset

        given = dict(zip(places, paths, strict=False))
        given |= {key: str(settings.pop(key)) for key in places if key in settings}
        parts = [
            part(tokenizer, **({"path": given[key]} if key in given else {}), **settings)
            for key, part in places.items()
        ]
        return ConcatDataset(datasets=parts)

    build.__name__ = build.__qualname__ = f"{name}_dataset"
    build.__doc__ = f"""Two datasets in one; ``{"`` and ``".join(places)}`` name their places.

    Args:
        tokenizer: of the model.
        settings: as for each of the two.
    """
    return build


def _moss(name: str, place: str) -> Builder:
    def build(
        tokenizer: Tokenizer, data_file: str = place, max_length: int = 2048, **settings: object
    ) -> Any:
        from xtuner.dataset import MOSSSFTDataset

        return MOSSSFTDataset(
            data_file=settings.pop("path", data_file),
            tokenizer=tokenizer,
            max_length=max_length,
            **settings,
        )

    build.__name__ = build.__qualname__ = f"{name}_dataset"
    build.__doc__ = f"""Rows of MOSS-003-SFT, by default of ``{place}``, as tokens.

    Args:
        tokenizer: of the model.
        data_file: the JSON-lines file.
        max_length: tokens of a row.
        settings: further keyword arguments of ``MOSSSFTDataset``.
    """
    return build


alpaca_dataset = _builder("alpaca", "tatsu-lab/alpaca", "alpaca_map_fn")
alpaca_zh_dataset = _builder("alpaca_zh", "silk-road/alpaca-data-gpt4-chinese", "alpaca_zh_map_fn")
alpaca_enzh_dataset = _joined(
    "alpaca_enzh", {"path_en": alpaca_dataset, "path_zh": alpaca_zh_dataset}
)
arxiv_dataset = _builder("arxiv", "./data/arxiv_data.json", "arxiv_map_fn")
code_alpaca_dataset = _builder("code_alpaca", "HuggingFaceH4/CodeAlpaca_20K", "code_alpaca_map_fn")
colorist_dataset = _builder("colorist", "burkelibbey/colors", "colors_map_fn")
lawyer_crime_dataset = _builder("lawyer_crime", CRIME_FILE, "crime_kg_assitant_map_fn")
lawyer_reference_dataset = _builder("lawyer_reference", REFERENCE_FILE, "law_reference_map_fn")
lawyer_dataset = _joined(
    "lawyer",
    {"crime_data_file": lawyer_crime_dataset, "reference_data_file": lawyer_reference_dataset},
)
medical_dataset = _builder("medical", "shibing624/medical", "medical_map_fn", subset="finetune")
moss_003_sft_no_plugins_dataset = _moss("moss_003_sft_no_plugins", MOSS_FILE)
moss_003_sft_plugins_dataset = _moss("moss_003_sft_plugins", MOSS_PLUGINS_FILE)
moss_003_sft_dataset = _joined(
    "moss_003_sft",
    {
        "no_plugins_data_file": moss_003_sft_no_plugins_dataset,
        "plugins_data_file": moss_003_sft_plugins_dataset,
    },
)
oasst1_dataset = _builder("oasst1", "timdettmers/openassistant-guanaco", "oasst1_map_fn")
openorca_dataset = _builder("openorca", "Open-Orca/OpenOrca", "openorca_map_fn")
sql_dataset = _builder("sql", "b-mc2/sql-create-context", "sql_map_fn")
tiny_codes_dataset = _builder("tiny_codes", "nampdn-ai/tiny-codes", "tiny_codes_map_fn")
wizardlm_dataset = _builder(
    "wizardlm", "WizardLM/WizardLM_evol_instruct_V2_196k", "wizardlm_map_fn"
)
