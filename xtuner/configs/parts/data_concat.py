"""Several datasets as one."""

from xtuner.dataset import ConcatDataset

train_dataset = dict(
    type=ConcatDataset,
    datasets=DATASETS_HERE,
)
