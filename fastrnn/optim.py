"""Optimisers and learning-rate schedules. Updates and defaults are PyTorch's.

An optimiser changes the arrays of `params` in place. Its own arrays are in `state`, by
"<slot>.<parameter>", its count of steps in `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrnn.checks import (
    as_array,
    as_dtype,
    as_number,
    as_size,
    check_in_place,
    for_kernel,
    load_params,
)
from fastrnn.crew import divided
from fastrnn.jit import kernel
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import flush_denormals, load_n, restore_denormals, sqrt, store_n, width_of

Arrays = dict[str, np.ndarray]


@kernel
def _sgd(part, parts, p, g, v, lr, momentum, decay, fresh):
    if divided(part, parts):
        return
    mode = flush_denormals()
    for i in range(p.size * part // parts, p.size * (part + 1) // parts):
        d = g[i] + decay * p[i]
        # Without momentum an infinity that is left in v must not come back as NaN.
        v[i] = d if fresh or momentum == 0 else momentum * v[i] + d
        p[i] -= lr * v[i]
    restore_denormals(mode)


@kernel
def _rmsprop(part, parts, p, g, v, lr, alpha, rest, eps):
    if divided(part, parts):
        return
    mode = flush_denormals()
    for i in range(p.size * part // parts, p.size * (part + 1) // parts):
        v[i] = alpha * v[i] + rest * g[i] * g[i]
        p[i] -= lr * g[i] / (math.sqrt(v[i]) + eps)
    restore_denormals(mode)


@kernel
def _adagrad(part, parts, p, g, v, lr, eps):
    if divided(part, parts):
        return
    mode = flush_denormals()
    for i in range(p.size * part // parts, p.size * (part + 1) // parts):
        v[i] += g[i] * g[i]
        p[i] -= lr * g[i] / (math.sqrt(v[i]) + eps)
    restore_denormals(mode)


@kernel
def _adam(part, parts, p, g, m, v, step, beta1, rest1, beta2, rest2, root, eps, coupled, kept):
    if divided(part, parts):
        return
    mode = flush_denormals()
    end = p.size * (part + 1) // parts
    for i in range(p.size * part // parts, end, width_of(p)):
        left = end - i
        old = load_n(p, i, left)
        d = load_n(g, i, left) + coupled * old
        mean = beta1 * load_n(m, i, left) + rest1 * d
        square = beta2 * load_n(v, i, left) + rest2 * d * d
        store_n(m, i, mean, left)
        store_n(v, i, square, left)
        store_n(p, i, kept * old - step * mean / (sqrt(square) / root + eps), left)
    restore_denormals(mode)


@kernel
def _blend(part, parts, mean, p, share):
    if divided(part, parts):
        return
    mode = flush_denormals()
    for i in range(p.size * part // parts, p.size * (part + 1) // parts):
        mean[i] += share * (p[i] - mean[i])
    restore_denormals(mode)


def blend_(means: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray], share: float) -> None:
    """Move every array of `means` by `share` of the way to that of `params`."""
    for key, p in params.items():
        mean = check_in_place(f"means[{key!r}]", means.get(key), p.dtype, p.shape).reshape(-1)
        flat = p.reshape(-1)
        run(_blend, parts_for(p.size * ELEMENT, p.size), mean, flat, p.dtype.type(share))


class Optimizer:
    """What all have: the learning rate `lr`, which may be set between steps, and their state."""

    slots: tuple[str, ...] = ()

    def __init__(self, params: Arrays, lr: float) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params: expected a mapping of arrays, such as layer.params, "
                f"got {type(params).__name__}"
            )
        for key, value in params.items():
            name = f"params[{key!r}]"
            dtype = as_dtype(getattr(value, "dtype", type(value)), name)
            check_in_place(name, value, dtype, np.shape(value))
        self._kinds = {key: (value.dtype, value.shape) for key, value in params.items()}
        self.params = params
        self.lr = as_number("lr", lr, 0, math.inf)
        self.steps = 0
        self.state: Arrays = {
            f"{slot}.{key}": np.zeros_like(value)
            for slot in self.slots
            for key, value in params.items()
        }

    def step(self, grads: Mapping[str, np.ndarray]) -> None:
        """Change every parameter by its gradient."""
        for key, kind in self._kinds.items():
            check_in_place(f"params[{key!r}]", self.params.get(key), *kind)
            for slot in self.slots:
                name = f"{slot}.{key}"
                check_in_place(f"state[{name!r}]", self.state.get(name), *kind)
        for key, p in self.params.items():
            if key not in self._kinds:
                raise ValueError(f"params: expected keys {sorted(self._kinds)}, got also {key!r}")
            if key not in grads:
                raise ValueError(
                    f"grads: expected keys {sorted(self.params)}, got none for {key!r}"
                )
            g = as_array(f"grads[{key!r}]", grads[key])
            if g.shape != p.shape or g.dtype != p.dtype:
                raise ValueError(
                    f"grads[{key!r}]: expected {p.dtype} of shape {p.shape}, "
                    f"got {g.dtype} of shape {g.shape}"
                )
        self.steps += 1
        for key, p in self.params.items():
            slots = [self.state[f"{slot}.{key}"].reshape(-1) for slot in self.slots]
            g = for_kernel(grads[key]).reshape(-1)
            function, arguments = self._update()
            numbers = [p.dtype.type(n) if isinstance(n, float) else n for n in arguments]
            run(function, parts_for(p.size * ELEMENT, p.size), p.reshape(-1), g, *slots, *numbers)

    def _update(self) -> tuple[Any, tuple]:
        """The kernel of this step and its numbers."""
        raise TypeError("Optimizer: expected a subclass such as Adam")

    def load_state(self, state: Mapping[str, Any], steps: int) -> None:
        """Continue from the `state` and `steps` of another optimiser of this kind."""
        load_params(self.state, state, "optimiser state")
        self.steps = as_size("steps", steps, 0)


class SGD(Optimizer):
    """v = momentum v + g; p -= lr v. `weight_decay` adds its multiple of p to g."""

    slots = ("velocity",)

    def __init__(
        self, params: Arrays, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr)
        self.momentum = as_number("momentum", momentum, 0, 1)
        self.weight_decay = as_number("weight_decay", weight_decay, 0, math.inf)

    def _update(self) -> tuple[Any, tuple]:
        return _sgd, (self.lr, self.momentum, self.weight_decay, self.steps == 1)


class RMSProp(Optimizer):
    """Tieleman and Hinton 2012: v = alpha v + (1 - alpha) g**2; p -= lr g / (sqrt(v) + eps)."""

    slots = ("square",)

    def __init__(
        self, params: Arrays, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr)
        self.alpha = as_number("alpha", alpha, 0, 1)
        self.eps = as_number("eps", eps, 0, math.inf)

    def _update(self) -> tuple[Any, tuple]:
        return _rmsprop, (self.lr, self.alpha, 1 - self.alpha, self.eps)


class Adagrad(Optimizer):
    """Duchi et al. 2011: v += g**2; p -= lr g / (sqrt(v) + eps)."""

    slots = ("square",)

    def __init__(self, params: Arrays, lr: float = 1e-2, eps: float = 1e-10) -> None:
        super().__init__(params, lr)
        self.eps = as_number("eps", eps, 0, math.inf)

    def _update(self) -> tuple[Any, tuple]:
        return _adagrad, (self.lr, self.eps)


class Adam(Optimizer):
    """Kingma and Ba 2014, arXiv:1412.6980v9. `weight_decay` adds its multiple of p to g."""

    slots = ("mean", "square")

    def __init__(
        self,
        params: Arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr)
        self.betas = (as_number("betas[0]", betas[0], 0, 1), as_number("betas[1]", betas[1], 0, 1))
        self.eps = as_number("eps", eps, 0, math.inf)
        self.weight_decay = as_number("weight_decay", weight_decay, 0, math.inf)

    def _decays(self) -> tuple[float, float]:
        """What is added to the gradient, and what is kept of the parameter."""
        return self.weight_decay, 1.0

    def _update(self) -> tuple[Any, tuple]:
        beta1, beta2 = self.betas
        step = self.lr / (1 - beta1**self.steps)
        root = math.sqrt(1 - beta2**self.steps)
        moments = (step, beta1, 1 - beta1, beta2, 1 - beta2, root, self.eps)
        return _adam, (*moments, *self._decays())


class AdamW(Adam):
    """Loshchilov and Hutter 2017, arXiv:1711.05101v3: p loses lr * weight_decay of itself."""

    def __init__(
        self,
        params: Arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _decays(self) -> tuple[float, float]:
        return 0.0, 1 - self.lr * self.weight_decay


OPTIMIZERS = {"sgd": SGD, "rmsprop": RMSProp, "adagrad": Adagrad, "adam": Adam, "adamw": AdamW}


class Constant:
    """The same rate at every step."""

    def rate(self, lr: float, step: int, total: int | None) -> float:
        """The rate for the step'th step (from 0) of `total`, which may be unknown."""
        return lr

    def observe(self, val_loss: float) -> None:
        """Hear of a validation loss."""


class WarmupCosine(Constant):
    """A linear rise over `warmup` steps, then half a cosine down to `floor` times the rate."""

    def __init__(self, warmup: int = 0, floor: float = 0.0) -> None:
        self.warmup = as_size("warmup", warmup, 0)
        self.floor = as_number("floor", floor, 0, 1)

    def rate(self, lr: float, step: int, total: int | None) -> float:
        if step < self.warmup:
            return lr * (step + 1) / self.warmup
        if total is None:
            raise ValueError("schedule: expected a number of steps for the cosine, got none")
        done = (step - self.warmup) / max(1, total - self.warmup)
        return lr * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1, done))) / 2)


class Plateau(Constant):
    """Multiply the rate by `factor` when validation has not improved for `patience` looks."""

    def __init__(self, factor: float = 0.5, patience: int = 2) -> None:
        self.factor = as_number("factor", factor, 0, 1, open_low=True)
        self.patience = as_size("patience", patience)
        self.best, self.waited, self.scale = math.inf, 0, 1.0

    def rate(self, lr: float, step: int, total: int | None) -> float:
        return lr * self.scale

    def observe(self, val_loss: float) -> None:
        if val_loss < self.best:
            self.best, self.waited = val_loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.scale, self.waited = self.scale * self.factor, 0


SCHEDULES = {"constant": Constant, "cosine": WarmupCosine, "plateau": Plateau}
