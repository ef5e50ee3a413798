"""Long short-term memory: Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000.

i = sigmoid(s_i)    f = sigmoid(s_f)    g = tanh(s_g)    o = sigmoid(s_o)
c' = f c + i g      h' = o tanh(c')
"""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import fma, zero
from fastrnn.vmath import sigmoid, tanh


@helper
def gates(s, h, carry):
    i = sigmoid(s[0])
    f = sigmoid(s[1])
    g = tanh(s[2])
    o = sigmoid(s[3])
    return (i, f, g, o), (fma(f, carry[0], i * g),)


@helper
def output(tape, h, carry):
    return tape[3] * tanh(carry[0]), tape


@helper
def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    i, f, g, o = tape
    tanh_c = tanh(carry[0])
    d_c = fma(d_h * o, 1.0 - tanh_c * tanh_c, d_carry[0])
    d_i = d_c * g * (i * (1.0 - i))
    d_f = d_c * carry_prev[0] * (f * (1.0 - f))
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_h * tanh_c * (o * (1.0 - o))
    return (d_i, d_f, d_g, d_o), zero(d_h), (d_c * f,)


LSTM = Cell(
    name="lstm",
    gates=4,
    tape=4,
    tail=0,
    carries=1,
    order_x=(0, 1, 2, 3),
    order_h=(0, 1, 2, 3),
    gates_of=gates,
    output=output,
    backward=backward,
)
