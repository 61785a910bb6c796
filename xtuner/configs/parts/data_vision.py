"""Conversations with images; the layout of the rows is recognised."""

from datasets import load_dataset

from xtuner.dataset import VisionLanguageDataset

VARIABLE_HERE = dict(
    type=VisionLanguageDataset,
    dataset=dict(type=load_dataset, **LOCAL_FILES_HERE),
    processor=processor,
    image_folder=image_folder,
    max_length=max_length,
    max_pixels=max_pixels,
    video_frames=video_frames,
    video_fps=video_fps,
    pack_to_max_length=pack_to_max_length,
    long_samples="drop",  # or "shrink" their images, or stop with an "error"
    bad_rows="drop",  # name rows that cannot be read; or stop with an "error"
)
