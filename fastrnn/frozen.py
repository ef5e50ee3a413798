"""Whole sequences, again and again, with weights that stay: for serving."""

from __future__ import annotations

from typing import Any

import numpy as np


class Frozen:
    """Runs a stack of layers without packing its weights at each call; made by `LSTM.freeze`.

    `output, state = run(x, state)` is `layer(x, state)`, with the same arguments and the same bits.
    Where a call has few rows, packing is much of its time: a tenth of 100 steps of one sequence.

    Weights are those of the moment it was made; `refresh` takes over later ones. It holds a copy of
    them, and a packed one for each way of running that occurs. Threads may share it.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights that the layer has now."""
        self._fixed = self._layer._fixed()

    def __call__(
        self,
        x: Any,
        state: Any = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
    ) -> tuple[np.ndarray, Any]:
        """Run over a sequence: see `LSTM.__call__` and its like."""
        return self._fixed(x, state, lengths, resets=resets, vectors=vectors)
