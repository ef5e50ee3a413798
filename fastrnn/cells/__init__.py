"""The maths: one file a cell, and the registry that layers and tests iterate over."""

from __future__ import annotations

from fastrnn.cells.cell import Cell
from fastrnn.cells.gru import GRU
from fastrnn.cells.lstm import LSTM
from fastrnn.cells.rnn import RNN_RELU, RNN_TANH

CELLS = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM)}

__all__ = ["CELLS", "GRU", "LSTM", "RNN_RELU", "RNN_TANH", "Cell"]
