"""The maths: one file a cell, and the registry that layers and tests iterate over."""

from __future__ import annotations

from fastrnn.cells.cell import Cell
from fastrnn.cells.gru import GRU
from fastrnn.cells.gru_before import GRU_BEFORE
from fastrnn.cells.gru_simple import GRU_SIMPLE
from fastrnn.cells.lstm import lstm
from fastrnn.cells.rnn import RNN_RELU, RNN_TANH

# Of the LSTM's options each alone, and all together.
CELLS = {
    cell.name: cell
    for cell in (
        RNN_TANH,
        RNN_RELU,
        GRU,
        GRU_BEFORE,
        GRU_SIMPLE,
        lstm(),
        lstm(peephole=True),
        lstm(coupled=True),
        lstm(clip=True),
        lstm(peephole=True, coupled=True, clip=True),
    )
}

__all__ = ["CELLS", "Cell", "lstm"]
