"""JAX: `lax.scan` over a step written by hand, the product with x in front of it, all jitted."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from bench.cases import Case
from bench.problem import Answer, problem


def _set_up(threads: int, dtype: str) -> Any:
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={threads}"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")
    return jax


def _forward(jax: Any, case: Case, cell: str) -> Callable:
    jnp, H = jax.numpy, case.H
    sigmoid = jax.nn.sigmoid

    def lstm(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + (p["bias_ih_l0"] + p["bias_hh_l0"])

        def body(carry: Any, s: Any) -> Any:
            h, c = carry
            a = s + h @ p["weight_hh_l0"].T
            i, f, g, o = (a[:, k * H : (k + 1) * H] for k in range(4))
            c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
            h = sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((case.B, H), x.dtype)
        return jax.lax.scan(body, (zero, zero), pre)[1]

    def gru(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + p["bias_ih_l0"]

        def body(h: Any, s: Any) -> Any:
            a = h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
            r = sigmoid(s[:, :H] + a[:, :H])
            z = sigmoid(s[:, H : 2 * H] + a[:, H : 2 * H])
            n = jnp.tanh(s[:, 2 * H :] + r * a[:, 2 * H :])
            h = (1 - z) * n + z * h
            return h, h

        return jax.lax.scan(body, jnp.zeros((case.B, H), x.dtype), pre)[1]

    def rnn(p: dict, x: Any) -> Any:
        pre = x @ p["weight_ih_l0"].T + (p["bias_ih_l0"] + p["bias_hh_l0"])

        def body(h: Any, s: Any) -> Any:
            h = jnp.tanh(s + h @ p["weight_hh_l0"].T)
            return h, h

        return jax.lax.scan(body, jnp.zeros((case.B, H), x.dtype), pre)[1]

    return {"lstm": lstm, "gru": gru, "rnn": rnn}[cell]


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """The vector-Jacobian product."""
    jax = _set_up(threads, dtype)
    given = problem(case, cell, dtype)
    forward = _forward(jax, case, cell)

    @jax.jit
    def compiled(p: dict, x: Any, d_y: Any) -> Any:
        y, pull = jax.vjp(forward, p, x)
        grads, d_x = pull(d_y)
        return y, d_x, grads

    arguments = jax.device_put(tuple(given))

    def read(found: Any) -> Answer:
        y, d_x, grads = found
        return {"y": y, "d_x": d_x, **grads}

    return lambda: jax.block_until_ready(compiled(*arguments)), read


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward, compiled with its weights."""
    jax = _set_up(threads, dtype)
    given = problem(case, cell, dtype)
    compiled = jax.jit(functools.partial(_forward(jax, case, cell), given.params))
    x = jax.device_put(given.x)
    return lambda: jax.block_until_ready(compiled(x)), lambda y: {"y": y}
