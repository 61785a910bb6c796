"""Generation stops at a text, whatever its tokens are."""

import torch


def test_a_sequence_that_ends_with_the_word_is_done(tokenizer):
    from xtuner.utils import StopWordStoppingCriteria

    stop = StopWordStoppingCriteria(tokenizer, "Paris")
    ids = [tokenizer.encode(text)[-6:] for text in ("capital is Paris", "Paris is capital")]
    size = min(map(len, ids))
    batch = torch.tensor([row[-size:] for row in ids])
    assert stop(batch, None).tolist() == [True, False]
