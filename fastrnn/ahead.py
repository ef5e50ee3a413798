"""Compiling before it is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastrnn import crew
from fastrnn.checks import as_choice, as_dtype
from fastrnn.clip import clip_grad_norm_
from fastrnn.generate import generate
from fastrnn.layers import GRU, LSTM, RNN
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.optim import Adam, blend_
from fastrnn.recurrent import Recurrent


def warmup(
    cells: str | Recurrent | Iterable[str | Recurrent] = CELL_NAMES,
    *,
    dtype: Any = np.float32,
    models: bool = True,
) -> None:
    """Compile what training and running these cells needs, if the cache does not have it yet.

    cells   "lstm", "gru", "rnn" (tanh), "rnn_relu", a layer with any options, or several of these
    dtype   float32 or float64; a layer has its own
    models  also language models: tokens, Adam, sampling

    Takes ten to twenty seconds a cell on a cold cache, next to nothing on a warm one. In an image
    for a server, or before many processes start at once, it moves that time to where it does not
    matter.
    """
    dtype = as_dtype(dtype)
    try:
        chosen = (cells,) if isinstance(cells, (str, Recurrent)) else tuple(cells)
    except TypeError:
        raise TypeError(f"cells: expected a name or several, got {cells!r:.100}") from None
    for cell in chosen:
        if not isinstance(cell, Recurrent):
            as_choice("cells", cell, (*CELL_NAMES, "rnn_relu"))
    crew.ready()
    for cell in chosen:
        if isinstance(cell, Recurrent):
            _use(cell)
            continue
        kind: Any = {"lstm": LSTM, "gru": GRU}.get(cell, RNN)
        options: dict[str, Any] = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
        _use(kind(2, 2, dtype=dtype, seed=0, **options))
        if models and cell in CELL_NAMES:
            sizes: dict[str, Any] = {"embedding_size": 2, "dropout": 0.5, "dtype": dtype}
            model: Any = LanguageModel(3, 2, cell=cell, seed=0, **sizes)
            tokens = np.zeros((2, 1), np.int32)
            _, grads, _ = model.loss_and_grads(tokens, tokens)
            clip_grad_norm_(grads, 1.0)
            Adam(dict(model.params), 1e-3).step(grads)
            blend_({k: v.copy() for k, v in grads.items()}, grads, 0.5)
            model.embedding.backward(tokens, np.zeros((2, 1, 2), dtype))
            model.token_losses(tokens, tokens)
            generate(model, tokens[:, 0], 2, seed=0)


def _use(layer: Recurrent) -> None:
    """All that a layer does, for two steps of one sequence."""
    x = np.zeros((2, 1, layer.input_size), layer.dtype)
    if layer.batch_first:
        x = x.swapaxes(0, 1)
    layer(x)
    # Nothing that is drawn later is used up.
    y, _, saved = layer.forward(x, seed=0)
    layer.backward(saved, np.zeros_like(y))
    if not layer.bidirectional:
        layer.stepper()(np.zeros(layer.input_size, layer.dtype))
