"""Recurrent networks trained and run on CPUs at the speed of hand-written C.

Layers: RNN, GRU, LSTM, Linear, Embedding. Modules: models, train, generate, score, text, loss,
optim, clip, checkpoint; reference is the same in NumPy, a line per equation.
"""

from fastrnn import checkpoint, clip, generate, loss, models, optim, score, text, train
from fastrnn.layers import GRU, LSTM, RNN, Embedding, Linear
from fastrnn.parallel import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "Linear",
    "checkpoint",
    "clip",
    "generate",
    "get_num_threads",
    "loss",
    "models",
    "optim",
    "score",
    "set_num_threads",
    "text",
    "train",
]
