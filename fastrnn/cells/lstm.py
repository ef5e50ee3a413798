"""Long short-term memory: Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000.

i = sigmoid(s_i)    f = sigmoid(s_f)    g = tanh(s_g)    o = sigmoid(s_o)
c' = f c + i g      h' = o tanh(c')

Variants, in any combination:

peephole  gates see c: s_i + p_i c, s_f + p_f c, s_o + p_o c' (Gers and Schmidhuber 2000)
coupled   f = 1 - i, and no products for it (Greff et al. 2015, CIFG)
clip      c' stays within a bound (Sak et al. 2014); beyond it no gradient passes
projected h' = W_hr (o tanh(c')), which is smaller (Sak et al. 2014)

The tape is i, f, g, o, or i, g, o, then what is projected; the vectors are p_i, p_f, p_o or
p_i, p_o, then the bound.
"""

from __future__ import annotations

import functools

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma, select_greater, zero
from fastrnn.vmath import sigmoid, tanh


def lstm(
    *, peephole: bool = False, coupled: bool = False, clip: bool = False, projected: bool = False
) -> Cell:
    """The cell of these options, the same one every time."""
    return _lstm(peephole, coupled, clip, projected)


@functools.cache
def _lstm(peephole: bool, coupled: bool, clip: bool, projected: bool) -> Cell:
    # Known when a function is compiled: what is not asked for leaves no trace.
    count = 3 if coupled else 4
    peepholes = count - 1 if peephole else 0
    last = peepholes - 1

    @helper
    def gates(s, h, carry, v=()):
        c = carry[0]
        i = sigmoid(fma(v[0], c, s[0]) if peephole else s[0])
        g = tanh(s[count - 2])
        if coupled:
            c_new = fma(i, g - c, c)
        else:
            f = sigmoid(fma(v[1], c, s[1]) if peephole else s[1])
            c_new = fma(f, c, i * g)
        if clip:
            bound = v[peepholes]
            c_new = select_greater(c_new, bound, bound, c_new)
            c_new = select_greater(-bound, c_new, -bound, c_new)
        o = sigmoid(fma(v[last], c_new, s[count - 1]) if peephole else s[count - 1])
        tape = (i, g, o) if coupled else (i, f, g, o)
        return ((*tape, s[count]) if projected else tape), (c_new,)

    @helper
    def output(tape, h, carry, v=()):
        m = tape[count - 1] * tanh(carry[0])
        return m, ((*tape[:count], m) if projected else tape)

    @helper
    def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry, v=()):
        c_prev, c = carry_prev[0], carry[0]
        i, g, o = tape[0], tape[count - 2], tape[count - 1]
        tanh_c = tanh(c)
        d_o = d_h * tanh_c * (o * (1.0 - o))
        d_c = fma(d_h * o, 1.0 - tanh_c * tanh_c, d_carry[0])
        if peephole:
            d_c = fma(d_o, v[last], d_c)
        if clip:
            bound = v[peepholes]
            d_c = select_greater(bound, c, select_greater(c, -bound, d_c, 0.0), 0.0)
        d_g = d_c * i * (1.0 - g * g)
        if coupled:
            d_i = d_c * (g - c_prev) * (i * (1.0 - i))
            d_c_prev = d_c * (1.0 - i)
        else:
            f = tape[1]
            d_i = d_c * g * (i * (1.0 - i))
            d_f = d_c * c_prev * (f * (1.0 - f))
            d_c_prev = d_c * f
            if peephole:
                d_c_prev = fma(d_f, v[1], d_c_prev)
        if peephole:
            d_c_prev = fma(d_i, v[0], d_c_prev)
        d_tape = (d_i, d_g, d_o) if coupled else (d_i, d_f, d_g, d_o)
        return ((*d_tape, tape[count]) if projected else d_tape), zero(d_h), (d_c_prev,)

    @helper
    def backward_vectors(d_v, d_tape, h_prev, h, carry_prev, carry):
        d_i = fma(d_tape[0], carry_prev[0], d_v[0])
        d_o = fma(d_tape[count - 1], carry[0], d_v[last])
        if coupled:
            return d_i, d_o
        return d_i, fma(d_tape[1], carry_prev[0], d_v[1]), d_o

    options = {"coupled": coupled, "peephole": peephole, "clip": clip, "projected": projected}
    names = ("i", "g", "o") if coupled else ("i", "f", "g", "o")
    return Cell(
        name="_".join(["lstm", *(name for name, chosen in options.items() if chosen)]),
        gates=count,
        tape=count + projected,
        tail=0,
        carries=1,
        order_x=tuple(range(count)),
        order_h=tuple(range(count)),
        gates_of=gates,
        output=output,
        backward=backward,
        vectors=peepholes + clip,
        trained=peepholes,
        backward_vectors=backward_vectors,
        projected=projected,
        gate_names=(*names, "") if projected else names,
        carry_names=("c",),
    )
