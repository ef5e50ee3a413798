"""Recurrent networks trained and run on CPUs at the speed of hand-written C.

Layers: RNN, GRU, LSTM, Recurrent (of any cell), Linear, Embedding, Readout; LanguageModel; warmup.
Modules: models, train, generate, score, text, loss, optim, clip, checkpoint, cells, plot; reference
is the same in NumPy, a line per equation.

Names are looked up when they are first used: importing Numba takes most of a short program's time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrnn import (
        cells,
        checkpoint,
        clip,
        generate,
        loss,
        models,
        optim,
        plot,
        score,
        text,
        train,
    )
    from fastrnn.ahead import warmup
    from fastrnn.dense import Embedding, Linear
    from fastrnn.layers import GRU, LSTM, RNN
    from fastrnn.models import LanguageModel
    from fastrnn.parallel import get_num_threads, set_num_threads
    from fastrnn.readout import Readout
    from fastrnn.recurrent import Recurrent

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Embedding",
    "LanguageModel",
    "Linear",
    "Readout",
    "Recurrent",
    "cells",
    "checkpoint",
    "clip",
    "generate",
    "get_num_threads",
    "loss",
    "models",
    "optim",
    "plot",
    "score",
    "set_num_threads",
    "text",
    "train",
    "warmup",
]

_PLACES = dict.fromkeys(("GRU", "LSTM", "RNN"), "layers")
_PLACES |= dict.fromkeys(("Embedding", "Linear"), "dense")
_PLACES |= {"LanguageModel": "models", "Readout": "readout", "Recurrent": "recurrent"}
_PLACES |= {"warmup": "ahead"}
_PLACES |= dict.fromkeys(("get_num_threads", "set_num_threads"), "parallel")


def __getattr__(name: str) -> Any:
    place = f"fastrnn.{_PLACES.get(name, name)}"
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place:
            raise
        raise AttributeError(f"module 'fastrnn' has no attribute {name!r}") from None
    value = getattr(module, name) if name in _PLACES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
