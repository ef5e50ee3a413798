"""The maths: one file a cell, and the registry that layers and tests iterate over.

For a cell of your own: write its functions for one register of hidden units as in
`fastrnn.cells.cell`, each a `helper`, with `+ - * /` and what is imported here; make a `Cell` of
them with its counts; `fastrnn.Recurrent(cell, ...)` trains and runs it as it does ours.
`examples/minimal_gated_unit.py` is one.
"""

from __future__ import annotations

from fastrnn.cells.cell import Cell
from fastrnn.cells.gru import GRU
from fastrnn.cells.gru_before import GRU_BEFORE
from fastrnn.cells.gru_norm import gru_norm
from fastrnn.cells.gru_simple import GRU_SIMPLE
from fastrnn.cells.lstm import lstm
from fastrnn.cells.lstm_norm import lstm_norm
from fastrnn.cells.rnn import RNN_RELU, RNN_TANH
from fastrnn.jit import helper
from fastrnn.simd import fma, select_greater, sqrt, zero
from fastrnn.vmath import exp, sigmoid, tanh

# Of the LSTM's options each alone, and all together; of two forms the one with biases.
CELLS = {
    cell.name: cell
    for cell in (
        RNN_TANH,
        RNN_RELU,
        GRU,
        GRU_BEFORE,
        GRU_SIMPLE,
        gru_norm(True),
        lstm_norm(True),
        lstm(),
        lstm(peephole=True),
        lstm(coupled=True),
        lstm(clip=True),
        lstm(projected=True),
        lstm(peephole=True, coupled=True, clip=True, projected=True),
    )
}

__all__ = [
    "CELLS",
    "Cell",
    "exp",
    "fma",
    "gru_norm",
    "helper",
    "lstm",
    "lstm_norm",
    "select_greater",
    "sigmoid",
    "sqrt",
    "tanh",
    "zero",
]
