"""PyTorch, as it is.

`torch.compile` is no contestant: it leaves recurrent layers alone, and if told not to
(`torch._dynamo.config.allow_rnn`) it writes out every step: PyTorch 2.13 had not finished with 64
steps of an LSTM after two minutes.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case
from bench.problem import Answer, Problem, problem


def _layer(case: Case, cell: str, dtype: str, threads: int) -> tuple[Any, Problem]:
    torch.set_num_threads(threads)
    given = problem(case, cell, dtype)
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    layer = kind(case.I, case.H, dtype=getattr(torch, dtype))
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in given.params.items()})
    return layer, given


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward and autograd's backward."""
    layer, given = _layer(case, cell, dtype, threads)
    x, d_y = torch.from_numpy(given.x).requires_grad_(), torch.from_numpy(given.d_y)

    def step() -> Any:
        layer.zero_grad()
        x.grad = None
        y, _ = layer(x)
        y.backward(d_y)
        return y

    def read(y: Any) -> Answer:
        return Answer(y.detach(), x.grad, {key: p.grad for key, p in layer.named_parameters()})

    return step, read


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward under inference_mode."""
    layer, given = _layer(case, cell, dtype, threads)
    x = torch.from_numpy(given.x)
    layer.eval()

    def step() -> Any:
        with torch.inference_mode():
            return layer(x)[0]

    return step, Answer
