"""Who is timed: a name and a function that sets up one case and returns its step.

A step is one training step of one layer: forward, backward, d_x and every weight gradient. It
returns (output, d_x, gradients by PyTorch's keys) for the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.cases import Case

Step = Callable[[], tuple[Any, Any, dict[str, Any]]]


def problem(case: Case, cell: str, dtype: str) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Parameters, input and gradient of the output, the same for everyone."""
    random = np.random.default_rng(0)
    rows = {"rnn": 1, "gru": 3, "lstm": 4}[cell] * case.H
    bound = case.H**-0.5
    shapes = {
        "weight_ih_l0": (rows, case.I),
        "weight_hh_l0": (rows, case.H),
        "bias_ih_l0": (rows,),
        "bias_hh_l0": (rows,),
    }
    params = {
        key: random.uniform(-bound, bound, shape).astype(dtype) for key, shape in shapes.items()
    }
    x = random.standard_normal((case.T, case.B, case.I)).astype(dtype)
    d_y = random.standard_normal((case.T, case.B, case.H)).astype(dtype)
    return params, x, d_y


def reference(case: Case, cell: str) -> tuple[Any, Any, dict[str, Any]]:
    """What is right: the NumPy reference in float64."""
    from fastrnn.reference import CELLS

    params, x, d_y = problem(case, cell, "float32")
    module = CELLS[cell]
    double = {key.removesuffix("_l0"): value.astype("f8") for key, value in params.items()}
    zeros = tuple(np.zeros((case.B, case.H)) for _ in module.STATES)
    y, _, saved = module.forward(double, x.astype("f8"), zeros)
    d_x, _, grads = module.backward(double, saved, d_y.astype("f8"), zeros)
    return y, d_x, {f"{key}_l0": value for key, value in grads.items()}


def fastrnn(case: Case, cell: str, dtype: str, threads: int) -> Step:
    import fastrnn

    fastrnn.set_num_threads(threads)
    params, x, d_y = problem(case, cell, dtype)
    layer = {"rnn": fastrnn.RNN, "gru": fastrnn.GRU, "lstm": fastrnn.LSTM}[cell](
        case.I, case.H, dtype=dtype
    )
    layer.load_state_dict(params)

    def step() -> tuple[Any, Any, dict[str, Any]]:
        y, _, saved = layer.forward(x)
        d_x, _, grads = layer.backward(saved, d_y)
        return y, d_x, grads

    return step


def torch(case: Case, cell: str, dtype: str, threads: int) -> Step:
    import torch

    torch.set_num_threads(threads)
    params, x, d_y = problem(case, cell, dtype)
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    layer = kind(case.I, case.H, dtype=getattr(torch, dtype))
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()})
    x_in = torch.from_numpy(x).requires_grad_()
    gradient = torch.from_numpy(d_y)

    def step() -> tuple[Any, Any, dict[str, Any]]:
        layer.zero_grad()
        x_in.grad = None
        y, _ = layer(x_in)
        y.backward(gradient)
        return y.detach(), x_in.grad, {key: p.grad for key, p in layer.named_parameters()}

    return step


def jax(case: Case, cell: str, dtype: str, threads: int) -> Step:
    import os

    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads=" + str(threads)
    )
    import jax
    import jax.numpy as jnp

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    params, x, d_y = problem(case, cell, dtype)
    H = case.H

    def scan_lstm(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + (p["bias_ih_l0"] + p["bias_hh_l0"])

        def body(carry: Any, s: Any) -> Any:
            h, c = carry
            a = s + h @ p["weight_hh_l0"].T
            i, f, g, o = (a[:, k * H : (k + 1) * H] for k in range(4))
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((case.B, H), x.dtype)
        return jax.lax.scan(body, (zero, zero), pre)[1]

    def scan_gru(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + p["bias_ih_l0"]

        def body(h: Any, s: Any) -> Any:
            a = h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
            r = jax.nn.sigmoid(s[:, :H] + a[:, :H])
            z = jax.nn.sigmoid(s[:, H : 2 * H] + a[:, H : 2 * H])
            n = jnp.tanh(s[:, 2 * H :] + r * a[:, 2 * H :])
            h = (1 - z) * n + z * h
            return h, h

        return jax.lax.scan(body, jnp.zeros((case.B, H), x.dtype), pre)[1]

    def scan_rnn(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + (p["bias_ih_l0"] + p["bias_hh_l0"])

        def body(h: Any, s: Any) -> Any:
            h = jnp.tanh(s + h @ p["weight_hh_l0"].T)
            return h, h

        return jax.lax.scan(body, jnp.zeros((case.B, H), x.dtype), pre)[1]

    forward = {"lstm": scan_lstm, "gru": scan_gru, "rnn": scan_rnn}[cell]

    @jax.jit
    def compiled(p: dict, x: Any, g: Any) -> Any:
        y, pull = jax.vjp(forward, p, x)
        grads, d_x = pull(g)
        return y, d_x, grads

    arguments = jax.device_put(({k: jnp.asarray(v) for k, v in params.items()}, x, d_y))

    def step() -> tuple[Any, Any, dict[str, Any]]:
        return jax.block_until_ready(compiled(*arguments))

    return step


CONTESTANTS = {"fastrnn": fastrnn, "torch": torch, "jax": jax}
