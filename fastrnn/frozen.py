"""Whole sequences, again and again, with weights that stay: for serving."""

from __future__ import annotations

from typing import Any


class Frozen:
    """Runs a stack of layers whose weights are packed once; made by `LSTM.freeze` and its like.

    `output, state = run(x, state)` is `layer(x, state)`, with the same arguments and the same bits;
    the layer itself is left alone and trains on. A layer packs its weights at every call, which
    tells where a call has few rows (docs/decisions/0009).

    Weights are those of the moment it was made; `refresh` takes over later ones. It holds the layer
    and a copy of its weights, and packs them for each way of running (tokens or features, few
    sequences or many) when it first occurs: call it once before it serves. With `vectors` the first
    layer is packed at every call. Threads may share it.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.refresh()

    def __repr__(self) -> str:
        return f"Frozen({self._layer!r})"

    def refresh(self) -> None:
        """Take over the weights that the layer has now."""
        self._copy = self._layer._with_fixed_weights()

    def __call__(
        self,
        x: Any,
        state: Any = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
        return_gates: bool = False,
    ) -> Any:
        """Run over a sequence: see `LSTM.__call__` and its like."""
        options: dict[str, Any] = {"resets": resets, "vectors": vectors}
        return self._copy(x, state, lengths, return_gates=return_gates, **options)
