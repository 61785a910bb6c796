"""MOSS conversations; a dataset of their own reads them."""

from xtuner.dataset import MOSSSFTDataset

VARIABLE_HERE = dict(
    type=MOSSSFTDataset,
    data_file=PATH_HERE,
    bot_name=bot_name,
    tokenizer=tokenizer,
    max_length=max_length,
)
