"""A deep readout: a feed-forward network at each step, without connections from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastrnn.checks import as_choice, as_dtype, as_floats, as_seed, as_size
from fastrnn.crew import divided
from fastrnn.dense import Linear
from fastrnn.jit import kernel
from fastrnn.module import Module, Params, new_grads
from fastrnn.options import checking_names
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import (
    flush_denormals,
    load_n,
    restore_denormals,
    select_greater,
    store_n,
    width_of,
)
from fastrnn.vmath import tanh

ACTIVATIONS = ("relu", "tanh")


@kernel
def _activate(part, parts, relu, y):
    """y = activation(y), for the part'th slice of the rows."""
    if divided(part, parts):
        return
    mode = flush_denormals()
    rows, size = y.shape
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        for u in range(0, size, width_of(y)):
            value = load_n(y, row * size + u, size - u)
            # So that NaN stays.
            value = select_greater(0.0, value, 0.0, value) if relu else tanh(value)
            store_n(y, row * size + u, value, size - u)
    restore_denormals(mode)


@kernel
def _activate_back(part, parts, relu, y, d_y):
    """d_y becomes the gradient before the activation that gave y."""
    if divided(part, parts):
        return
    mode = flush_denormals()
    rows, size = y.shape
    for row in range(rows * part // parts, rows * (part + 1) // parts):
        for u in range(0, size, width_of(y)):
            value = load_n(y, row * size + u, size - u)
            d = load_n(d_y, row * size + u, size - u)
            d = select_greater(value, 0.0, d, 0.0) if relu else d * (1.0 - value * value)
            store_n(d_y, row * size + u, d, size - u)
    restore_denormals(mode)


class Readout(Module):
    """Linear layers with an activation between them, at each step: y (..., out_features).

    in_features      of x (..., in_features), for example the output of an LSTM
    hidden_features  units of the layers in between: a number, or one for each
    activation       "relu" or "tanh", after all layers but the last

    `params` has the keys of `Linear` after "0.", "1.", ...
    """

    @checking_names
    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        try:
            hidden: list[int] = list(hidden_features)  # type: ignore[arg-type]
        except TypeError:
            hidden = [hidden_features]  # type: ignore[list-item]
        hidden = [as_size("hidden_features", units) for units in hidden]
        self.activation = as_choice("activation", activation, ACTIVATIONS)
        self.dtype = as_dtype(dtype)
        sizes = [as_size("in_features", in_features), *hidden]
        sizes.append(as_size("out_features", out_features))
        random = np.random.default_rng(as_seed(seed))
        self._layers = [
            Linear(n, m, dtype=self.dtype, seed=int(random.integers(2**63)))
            for n, m in pairwise(sizes)
        ]
        self._own(
            {
                f"{i}.{key}": value
                for i, layer in enumerate(self._layers)
                for key, value in layer.params.items()
            }
        )

    def _bind(self) -> None:
        """Take over arrays that were put into `params`."""
        self.check_params()
        for i, layer in enumerate(self._layers):
            layer.params = {key: self.params[f"{i}.{key}"] for key in layer.params}

    def __call__(self, x: Any) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        return self.forward(x)[0]

    def forward(self, x: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """y, and what backward needs: what comes into each layer."""
        self._bind()
        saved = []
        for i, layer in enumerate(self._layers):
            if i:
                rows = x.reshape(-1, x.shape[-1])
                parts = parts_for(rows.size * ELEMENT, len(rows))
                run(_activate, parts, self.activation == "relu", rows)
            x, kept = layer.forward(x)
            saved.append(kept)
        return x, saved

    def backward(
        self,
        saved: list[np.ndarray],
        d_y: Any,
        grads: Params | None = None,
        *,
        need_d_x: bool = True,
    ) -> tuple[np.ndarray | None, Params]:
        """d_x like x (None if not needed) and the gradients of the parameters."""
        self._bind()
        grads = new_grads(self.params, grads)
        if not isinstance(saved, list) or len(saved) != len(self._layers):
            raise TypeError(
                f"saved: expected the second result of forward, {len(self._layers)} arrays in a "
                f"list, got {type(saved).__name__}"
            )
        for i in reversed(range(len(self._layers))):
            own = {key: grads[f"{i}.{key}"] for key in self._layers[i].params}
            wanted = i > 0 or need_d_x
            d_y, _ = self._layers[i].backward(saved[i], d_y, own, need_d_x=wanted)
            if i:
                rows = d_y.reshape(-1, d_y.shape[-1])
                parts = parts_for(rows.size * ELEMENT, len(rows))
                y = as_floats("saved", saved[i], self.dtype, saved[i].shape, "(...)")
                arrays = y.reshape(rows.shape), rows
                run(_activate_back, parts, self.activation == "relu", *arrays)
        return d_y, grads
