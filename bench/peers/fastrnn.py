"""fastrnn itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import fastrnn
from bench.cases import Case
from bench.language import NORM, RATE, STEPS, Lesson, seen, text
from bench.problem import Answer, Problem, problem
from fastrnn.clip import clip_grad_norm_
from fastrnn.generate import generate
from fastrnn.models import SEEDS


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
        return {"y": y, "d_x": d_x, **grads}

    return step, lambda answer: answer


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward without a tape; like a session, with weights that stay."""
    layer, given = _layer(case, cell, dtype, threads)
    run = layer.freeze()
    return lambda: run(given.x)[0], lambda y: {"y": y}


def calling(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """The same with weights that may change between calls."""
    layer, given = _layer(case, cell, dtype, threads)
    return lambda: layer(given.x)[0], lambda y: {"y": y}


def stepping(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """A stepper, which writes into an array that is there."""
    layer, given = _layer(case, cell, dtype, threads)
    one = case.B == 1
    stepper = layer.stepper(None if one else case.B)
    zero = stepper.state
    y = np.empty((case.T, case.B, case.H), dtype)
    x, rows = (list(array[:, 0] if one else array) for array in (given.x, y))

    def step() -> np.ndarray:
        stepper.state = zero
        for x_t, y_t in zip(x, rows, strict=True):
            stepper(x_t, out=y_t)
        return y

    return step, lambda y: {"y": y}


def _model(case: Case, cell: str, params: dict, threads: int, dropout: float = 0.0) -> Any:
    fastrnn.set_num_threads(threads)
    model = fastrnn.LanguageModel(
        case.I,
        case.H,
        cell=cell,
        num_layers=case.layers,
        embedding_size=case.H,
        dropout=dropout,
        dtype=params["head.bias"].dtype,
    )
    model.load_state_dict(params)
    return model


class Learner:
    """loss_and_grads, clipping, Adam; keeps the state."""

    def __init__(self, lesson: Lesson) -> None:
        case, cell, params, self.norm, threads, dropout, seed = lesson
        self.model = _model(case, cell, params, threads, dropout)
        self.adam = fastrnn.optim.Adam(self.model.params, lr=RATE)
        self.grads = {key: np.zeros_like(value) for key, value in self.model.params.items()}
        self.state = None
        self.seeds = itertools.count(seed << 32, SEEDS)

    def set_rate(self, rate: float) -> None:
        """Of Adam, from now on."""
        self.adam.lr = rate

    def learn(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
        """One step: loss, norm of the gradients."""
        for g in self.grads.values():
            g.fill(0)
        loss, _, self.state = self.model.loss_and_grads(
            tokens, targets, self.state, seed=next(self.seeds), grads=self.grads
        )
        norm = clip_grad_norm_(self.grads, self.norm)
        self.adam.step(self.grads)
        return loss, norm

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> float:
        """Of other tokens."""
        return float(self.model.token_losses(tokens, targets)[0].mean())


def language(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """`Learner`, from a state of zeros."""
    params, tokens, targets = text(case, cell, dtype)
    learner = Learner(Lesson(case, cell, params, NORM, threads))

    def step() -> tuple[float, float]:
        learner.state = None
        return learner.learn(tokens, targets)

    return step, lambda first: {"steps": [first, *(step() for _ in range(STEPS - 1))]}


def sampling(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """`generate`, at temperature 1; what is compared is greedy."""
    given = text(case, cell, dtype)
    model = _model(case, cell, given.params, threads)
    prompt = given.tokens[:1]
    seeds = itertools.count()

    def read(drawn: list) -> Answer:
        written = generate(model, prompt, case.T, greedy=True)
        return {"tokens": np.stack(written, axis=1), "drawn": seen(np.stack(drawn, axis=1), case)}

    return lambda: generate(model, prompt, case.T, seed=next(seeds)), read


def projection(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """`Linear`, forward and backward."""
    fastrnn.set_num_threads(threads)
    given = problem(case, cell, dtype, "projection")
    layer = fastrnn.Linear(case.I, case.H, dtype=dtype)
    layer.load_state_dict(given.params)

    def step() -> Answer:
        y, saved = layer.forward(given.x)
        d_x, grads = layer.backward(saved, given.d_y)
        return {"y": y, "d_x": d_x, **grads}

    return step, lambda answer: answer
