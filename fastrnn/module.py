"""What layers and models share: parameters by name, and gradients like them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from fastrnn.checks import check_in_place, load_params
from fastrnn.memory import zeros

Params = dict[str, np.ndarray]


def new_grads(params: Mapping[str, np.ndarray], grads: Params | None) -> Params:
    """`grads`, checked against `params`, or zeros."""
    if grads is None:
        return _zeros_like(params)
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads: expected a mapping of arrays, got {type(grads).__name__}")
    for key, value in params.items():
        check_in_place(f"grads[{key!r}]", grads.get(key), value.dtype, value.shape)
    return grads


def _zeros_like(params: Mapping[str, np.ndarray]) -> Params:
    """Zeros, in one piece of memory."""
    ends = list(accumulate(-(-value.size // 16) * 16 for value in params.values()))
    memory = zeros(ends[-1], next(iter(params.values())).dtype)
    grads = {}
    for (key, value), start in zip(params.items(), (0, *ends), strict=False):
        grads[key] = memory[start : start + value.size].reshape(value.shape)
    return grads


class Module:
    """Parameters by name."""

    params: Mapping[str, np.ndarray]
    dtype: np.dtype
    _shapes: dict[str, tuple[int, ...]]

    def _own(self, params: Params) -> None:
        self.params = params
        self._shapes = {key: value.shape for key, value in params.items()}

    def check_params(self) -> None:
        """Raise if an array was put into `params` that kernels cannot read by address."""
        for key, shape in self._shapes.items():
            p = self.params.get(key)
            if not (
                isinstance(p, np.ndarray)
                and p.shape == shape
                and p.dtype == self.dtype
                and p.flags.c_contiguous
            ):
                check_in_place(f"params[{key!r}]", p, self.dtype, shape)

    def state_dict(self) -> Params:
        """A copy of the parameters."""
        return {key: value.copy() for key, value in self.params.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy `mapping` into the parameters: the same keys and shapes, else ValueError."""
        load_params(self.params, mapping)
