"""The plain recurrent network of Elman 1990: h' = tanh(s), or max(0, s)."""

from fastrnn.cells.cell import Cell
from fastrnn.jit import helper
from fastrnn.simd import select_greater, zero
from fastrnn.vmath import tanh


@helper
def gates(s, h, carry):
    return s, carry


@helper
def output_tanh(tape, h, carry):
    return tanh(tape[0]), tape


@helper
def backward_tanh(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    return (d_h * (1.0 - h * h),), zero(d_h), d_carry


@helper
def output_relu(tape, h, carry):
    return select_greater(0.0, tape[0], 0.0, tape[0]), tape


@helper
def backward_relu(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    return (select_greater(h, 0.0, d_h, 0.0),), zero(d_h), d_carry


def _rnn(name, output, backward):
    return Cell(
        name=name,
        gates=1,
        tape=1,
        tail=0,
        carries=0,
        order_x=(0,),
        order_h=(0,),
        gates_of=gates,
        output=output,
        backward=backward,
    )


RNN_TANH = _rnn("rnn_tanh", output_tanh, backward_tanh)
RNN_RELU = _rnn("rnn_relu", output_relu, backward_relu)
