"""Recurrent networks trained and run on CPUs at the speed of hand-written C."""

from fastrnn.layers import GRU, LSTM, RNN, Embedding, Linear
from fastrnn.parallel import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "Linear",
    "get_num_threads",
    "set_num_threads",
]
