"""Pairs of answers about images; the layout of the rows is recognised."""

from datasets import load_dataset

from xtuner.dataset import VisionLanguagePreferenceDataset

VARIABLE_HERE = dict(
    type=VisionLanguagePreferenceDataset,
    dataset=dict(type=load_dataset, **LOCAL_FILES_HERE),
    processor=processor,
    image_folder=image_folder,
    **REWARD_HERE,
    max_length=max_length,
    max_pixels=max_pixels,
    video_frames=video_frames,
    video_fps=video_fps,
    long_samples="drop",  # or stop with an "error"
    bad_rows="drop",  # name rows that cannot be read; or stop with an "error"
)
