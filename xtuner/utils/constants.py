"""Numbers and texts with a meaning that several parts of the package share."""

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""

DEFAULT_PAD_TOKEN_INDEX = 0
"""Id that padding gets when the tokenizer has no pad token."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id in ``input_ids`` that image features replace."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""What stands for an image in a text."""

DEFAULT_VIDEO_TOKEN = "<video>"
"""What stands for a video in a text."""

RUN_RECORD = "run.json"
"""In a work dir: what the run trains, with which implementations, and its config's name."""

REWARD_FILE = "xtuner_reward.json"
"""Beside a reward model: which token ends the texts that it judges."""

# Preferences: the label of a reward token is the place of its answer in here, 0 or 1.
PREFERENCE_SIDES = ("chosen", "rejected")
CHOSEN, REJECTED = 0, 1
# Columns with the answers' log-probabilities under the reference of DPO, by TRL's names.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
