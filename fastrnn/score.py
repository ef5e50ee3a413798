"""How likely a language model finds a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrnn.checks import as_array, as_token, as_tokens
from fastrnn.models import LanguageModel

_BATCH = 64


def score(model: LanguageModel, sequences: Sequence[Any], start: int) -> list[np.ndarray]:
    """log p of every token of each sequence given those before it, in nats.

    sequences  each a sequence of tokens, of any length
    start      the token that stands before the first one
    Returns a float64 array for each sequence; its sum is the log-probability of the whole.
    """
    start = as_token("start", start, model.vocab_size)
    ids = []
    for i, sequence in enumerate(sequences):
        array = as_array(f"sequences[{i}]", sequence)
        if array.size == 0:
            ids.append(np.empty(0, np.int32))
        else:
            ids.append(as_tokens(f"sequences[{i}]", array, model.vocab_size, (None,), "(T)"))
    results = [np.empty(0)] * len(ids)
    order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: len(ids[i]))
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        longest = len(ids[batch[-1]])
        # Padding comes after the tokens that count, so it changes nothing before it.
        tokens = np.full((longest + 1, len(batch)), start, np.int32)
        for column, i in enumerate(batch):
            tokens[1 : len(ids[i]) + 1, column] = ids[i]
        losses, _ = model.token_losses(tokens[:-1], tokens[1:])
        if not np.isfinite(losses).all():
            raise ValueError(
                "model: expected finite logits, got NaN or infinity; its weights are bad"
            )
        for column, i in enumerate(batch):
            results[i] = -losses[: len(ids[i]), column]
    return results
