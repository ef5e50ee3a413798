"""The plain recurrent network of Elman 1990: h' = tanh(x + a), or max(0, x + a)."""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import select_greater, zero
from fastrnn.vmath import tanh


@helper
def forward_tanh(x, a, h, carry):
    h = tanh(x[0] + a[0])
    return h, carry, (h,)


@helper
def backward_tanh(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    return (d_h * (1.0 - h * h),), zero(d_h), d_carry


@helper
def forward_relu(x, a, h, carry):
    s = x[0] + a[0]
    h = select_greater(0.0, s, 0.0, s)
    return h, carry, (h,)


@helper
def backward_relu(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    return (select_greater(h, 0.0, d_h, 0.0),), zero(d_h), d_carry


def _rnn(name, forward, backward):
    return Cell(
        name=name,
        gates=1,
        tape=1,
        tail=0,
        carries=0,
        order_x=(0,),
        order_h=(0,),
        forward=forward,
        backward=backward,
    )


RNN_TANH = _rnn("rnn_tanh", forward_tanh, backward_tanh)
RNN_RELU = _rnn("rnn_relu", forward_relu, backward_relu)
