"""fastrnn itself."""

from __future__ import annotations

from typing import Any

import fastrnn
from bench.cases import Case
from bench.problem import Answer, Problem, problem


def _layer(case: Case, cell: str, dtype: str, threads: int) -> tuple[Any, Problem]:
    fastrnn.set_num_threads(threads)
    given = problem(case, cell, dtype)
    kind = {"rnn": fastrnn.RNN, "gru": fastrnn.GRU, "lstm": fastrnn.LSTM}[cell]
    layer = kind(case.I, case.H, dtype=dtype)
    layer.load_state_dict(given.params)
    return layer, given


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward with a tape, backward."""
    layer, given = _layer(case, cell, dtype, threads)

    def step() -> Answer:
        y, _, saved = layer.forward(given.x)
        d_x, _, grads = layer.backward(saved, given.d_y)
        return Answer(y, d_x, grads)

    return step, lambda answer: answer


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward without a tape."""
    layer, given = _layer(case, cell, dtype, threads)
    return lambda: layer(given.x)[0], Answer
