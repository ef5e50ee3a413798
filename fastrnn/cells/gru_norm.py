"""Gated recurrent unit, reset after the product, with layer normalisation: Ba et al. 2016.

x_r, x_z, x_n = p N(W_ih x) + b_ih      a_r, a_z, a_n = q N(W_hh h) + b_hh
r = sigmoid(x_r + a_r)    z = sigmoid(x_z + a_z)    n = tanh(x_n + r a_n)    h' = (1 - z) n + z h

N is over all three gates of a row (arXiv:1607.06450). The tape is N(W_ih x), N(W_hh h), r, z, n,
and in backward the gradient of a_n; the vectors are p, q, and with biases b_ih, b_hh.
"""

from __future__ import annotations

import functools

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma, zero
from fastrnn.vmath import sigmoid, tanh


@functools.cache
def gru_norm(bias: bool) -> Cell:
    """The cell with or without biases, the same one every time."""

    @helper
    def product(s, v, k):
        # Of x for k below 3, else of h.
        return fma(v[k], s[k], v[6 + k]) if bias else v[k] * s[k]

    @helper
    def gates(s, h, carry, v):
        r = sigmoid(product(s, v, 0) + product(s, v, 3))
        z = sigmoid(product(s, v, 1) + product(s, v, 4))
        none = zero(r)
        return (*s[:6], r, z, none, none), carry

    @helper
    def output(tape, h, carry, v):
        r, z = tape[6], tape[7]
        n = tanh(fma(r, product(tape, v, 5), product(tape, v, 2)))
        return fma(z, h - n, n), (*tape[:8], n, tape[9])

    @helper
    def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry, v):
        r, z, n = tape[6], tape[7], tape[8]
        d_n = d_h * (1.0 - z) * (1.0 - n * n)
        d_r = d_n * product(tape, v, 5) * (r * (1.0 - r))
        d_z = d_h * (h_prev - n) * (z * (1.0 - z))
        return (*tape[:6], d_r, d_z, d_n, d_n * r), d_h * z, d_carry

    @helper
    def backward_vectors(d_v, d_tape, h_prev, h, carry_prev, carry):
        d_r, d_z, d_n, d_a = d_tape[6:]
        gains = (
            fma(d_r, d_tape[0], d_v[0]),
            fma(d_z, d_tape[1], d_v[1]),
            fma(d_n, d_tape[2], d_v[2]),
            fma(d_r, d_tape[3], d_v[3]),
            fma(d_z, d_tape[4], d_v[4]),
            fma(d_a, d_tape[5], d_v[5]),
        )
        if bias:
            d_b = (d_v[6] + d_r, d_v[7] + d_z, d_v[8] + d_n)
            return (*gains, *d_b, d_v[9] + d_r, d_v[10] + d_z, d_v[11] + d_a)
        return gains

    return Cell(
        name="gru_norm" if bias else "gru_norm_nobias",
        gates=3,
        tape=10,
        tail=3,
        carries=0,
        order_x=(0, 1, 2),
        order_h=(0, 1, 2),
        gates_of=gates,
        output=output,
        backward=backward,
        vectors=12 if bias else 6,
        trained=12 if bias else 6,
        backward_vectors=backward_vectors,
        normed=True,
        gate_names=(*[""] * 6, "r", "z", "n", ""),
    )
