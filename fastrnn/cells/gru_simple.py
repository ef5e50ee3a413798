"""Gated recurrent unit without a reset gate.

z = sigmoid(s_z)    n = tanh(x_n + a_n)    h' = (1 - z) n + z h

s is x_n, s_z, a_n: its first two registers have the part of x, its last two that of the state. The
tape is n, z, a_n.
"""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma
from fastrnn.vmath import sigmoid, tanh


@helper
def gates(s, h, carry):
    x_n, s_z, a_n = s
    return (x_n, sigmoid(s_z), a_n), carry


@helper
def output(tape, h, carry):
    x_n, z, a_n = tape
    n = tanh(x_n + a_n)
    return fma(z, h - n, n), (n, z, a_n)


@helper
def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    n, z, _ = tape
    d_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_z = d_h * (h_prev - n) * (z * (1.0 - z))
    return (d_n, d_z, d_n), d_h * z, d_carry


GRU_SIMPLE = Cell(
    name="gru_simple",
    gates=2,
    tape=3,
    tail=1,
    carries=0,
    order_x=(1, 0),
    order_h=(0, 1),
    gates_of=gates,
    output=output,
    backward=backward,
    gate_names=("n", "z", ""),
)
