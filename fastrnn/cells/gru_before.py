"""Gated recurrent unit, reset before the product: Cho et al. 2014, arXiv:1406.1078v3.

r = sigmoid(s_r)    z = sigmoid(s_z)    m = r h    n = tanh(x_n + a_n)    h' = (1 - z) n + z h

s is x_n, s_r, s_z, a_n, m: its first three registers have the part of x, the next to them that of
the state, and a_n the product of W_hn with m. The tape is n, r, z, a_n, m.
"""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma
from fastrnn.vmath import sigmoid, tanh


@helper
def gates(s, h, carry):
    x_n, s_r, s_z, a_n, _ = s
    r = sigmoid(s_r)
    return (x_n, r, sigmoid(s_z), a_n, r * h), carry


@helper
def output(tape, h, carry):
    x_n, r, z, a_n, m = tape
    n = tanh(x_n + a_n)
    return fma(z, h - n, n), (n, r, z, a_n, m)


@helper
def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    n, r, z, _, m = tape
    d_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_z = d_h * (h_prev - n) * (z * (1.0 - z))
    return (d_n, r, d_z, d_n, m), d_h * z, d_carry


@helper
def backward_operand(tape, h_prev, d_m):
    d_n, r, d_z, d_a_n, m = tape
    return (d_n, d_m * h_prev * (r * (1.0 - r)), d_z, d_a_n, m), d_m * r


GRU_BEFORE = Cell(
    name="gru_before",
    gates=3,
    tape=5,
    tail=1,
    carries=0,
    order_x=(2, 0, 1),
    order_h=(0, 1),
    order_late=(2,),
    into=3,
    operand=4,
    gates_of=gates,
    output=output,
    backward=backward,
    backward_operand=backward_operand,
    gate_names=("n", "r", "z", "", ""),
)
