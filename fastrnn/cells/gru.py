"""Gated recurrent unit, reset after the product: Cho et al. 2014, arXiv:1406.1078v1; PyTorch's.

r = sigmoid(s_r)    z = sigmoid(s_z)    n = tanh(x_n + r a_n)    h' = (1 - z) n + z h

s is x_n, s_r, s_z, a_n: its first three registers have the part of x, its last three that of the
state. The tape is n, r, z, a_n, between the halves of forward x_n, r, z, a_n.
"""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma
from fastrnn.vmath import sigmoid, tanh


@helper
def gates(s, h, carry):
    x_n, s_r, s_z, a_n = s
    return (x_n, sigmoid(s_r), sigmoid(s_z), a_n), carry


@helper
def output(tape, h, carry):
    x_n, r, z, a_n = tape
    n = tanh(fma(r, a_n, x_n))
    return fma(z, h - n, n), (n, r, z, a_n)


@helper
def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    n, r, z, a_n = tape
    d_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_r = d_n * a_n * (r * (1.0 - r))
    d_z = d_h * (h_prev - n) * (z * (1.0 - z))
    return (d_n, d_r, d_z, d_n * r), d_h * z, d_carry


GRU = Cell(
    name="gru",
    gates=3,
    tape=4,
    tail=1,
    carries=0,
    order_x=(2, 0, 1),
    order_h=(0, 1, 2),
    gates_of=gates,
    output=output,
    backward=backward,
    gate_names=("n", "r", "z", ""),
)
