"""Long short-term memory with layer normalisation: Ba, Kiros and Hinton 2016, arXiv:1607.06450.

a = p N(W_ih x) + b_ih + q N(W_hh h) + b_hh      i, f, o = sigmoid(a_i), ...    g = tanh(a_g)
c' = f c + i g      h' = o tanh(p_c N(c') + b_c)

N is over all four gates of a row, and over c'. The tape is N(W_ih x), N(W_hh h), i, f, g, o, N(c'),
and in backward the gradient of what tanh is of; the vectors are p, q, p_c, b_c, and with biases
b_ih, b_hh.
"""

from __future__ import annotations

import functools

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma, zero
from fastrnn.vmath import sigmoid, tanh


@functools.cache
def lstm_norm(bias: bool) -> Cell:
    """The cell with or without biases, the same one every time."""

    @helper
    def gate(s, v, k):
        a = fma(v[k], s[k], v[4 + k] * s[4 + k])
        return a + (v[10 + k] + v[14 + k]) if bias else a

    @helper
    def gates(s, h, carry, v):
        i, f, o = sigmoid(gate(s, v, 0)), sigmoid(gate(s, v, 1)), sigmoid(gate(s, v, 3))
        g = tanh(gate(s, v, 2))
        none = zero(i)
        return (*s[:8], i, f, g, o, none, none), (fma(f, carry[0], i * g),)

    @helper
    def output(tape, h, carry, v):
        return tape[11] * tanh(fma(v[8], tape[12], v[9])), tape

    @helper
    def backward_normed(tape, d_h, v):
        tanh_c = tanh(fma(v[8], tape[12], v[9]))
        d = d_h * tape[11] * (1.0 - tanh_c * tanh_c)
        return (*tape[:13], d), d * v[8]

    @helper
    def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry, v):
        i, f, g, o = tape[8:12]
        d_c = d_carry[0]
        d_o = d_h * tanh(fma(v[8], tape[12], v[9])) * (o * (1.0 - o))
        d_i = d_c * g * (i * (1.0 - i))
        d_f = d_c * carry_prev[0] * (f * (1.0 - f))
        d_g = d_c * i * (1.0 - g * g)
        return (*tape[:8], d_i, d_f, d_g, d_o, *tape[12:]), zero(d_h), (d_c * f,)

    @helper
    def backward_vectors(d_v, d_tape, h_prev, h, carry_prev, carry):
        d_i, d_f, d_g, d_o, c, d = d_tape[8:]
        gains = (
            fma(d_i, d_tape[0], d_v[0]),
            fma(d_f, d_tape[1], d_v[1]),
            fma(d_g, d_tape[2], d_v[2]),
            fma(d_o, d_tape[3], d_v[3]),
            fma(d_i, d_tape[4], d_v[4]),
            fma(d_f, d_tape[5], d_v[5]),
            fma(d_g, d_tape[6], d_v[6]),
            fma(d_o, d_tape[7], d_v[7]),
            fma(d, c, d_v[8]),
            d + d_v[9],
        )
        if bias:
            d_b = (d_v[10] + d_i, d_v[11] + d_f, d_v[12] + d_g, d_v[13] + d_o)
            d_r = (d_v[14] + d_i, d_v[15] + d_f, d_v[16] + d_g, d_v[17] + d_o)
            return (*gains, *d_b, *d_r)
        return gains

    return Cell(
        name="lstm_norm" if bias else "lstm_norm_nobias",
        gates=4,
        tape=14,
        tail=4,
        carries=1,
        order_x=(0, 1, 2, 3),
        order_h=(0, 1, 2, 3),
        gates_of=gates,
        output=output,
        backward=backward,
        vectors=18 if bias else 10,
        trained=18 if bias else 10,
        backward_vectors=backward_vectors,
        normed=True,
        normed_carry=True,
        backward_normed=backward_normed,
        gate_names=(*[""] * 8, "i", "f", "g", "o", "", ""),
        carry_names=("c",),
    )
