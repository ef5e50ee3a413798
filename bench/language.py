"""A language model in NumPy, from the reference's parts: what those of the contestants must do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bench.cases import Case
from bench.problem import draw, layer_shapes
from fastrnn.reference import CELLS
from fastrnn.reference.linear import (
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
)
from fastrnn.reference.loss import softmax_cross_entropy
from fastrnn.reference.optim import adam

# Steps whose losses and norms are compared, the rate of Adam, and what norms are clipped to.
STEPS, RATE, NORM = 3, 0.002, 0.25


class Text(NamedTuple):
    """Parameters by the keys of `fastrnn.LanguageModel`, tokens and targets (T, B)."""

    params: dict[str, np.ndarray]
    tokens: np.ndarray
    targets: np.ndarray


class Lesson(NamedTuple):
    """What a contestant's `Learner` is given: a model, its first weights, how it is trained."""

    case: Case
    cell: str
    params: dict[str, np.ndarray]
    norm: float
    threads: int
    dropout: float = 0.0
    seed: int = 0


def weights(
    case: Case, cell: str, dtype: str, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """Uniform as PyTorch's layers start, the embedding with a variance of 1."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (case.I, case.H)}
    for layer in range(case.layers):
        found = layer_shapes(case, cell, layer, case.H)
        shapes |= {f"rnn.{key}": shape for key, shape in found.items()}
    shapes |= {"head.weight": (case.I, case.H), "head.bias": (case.I,)}
    params = draw(random, shapes, case.H**-0.5, dtype)
    params["embedding.weight"] *= (3 * case.H) ** 0.5
    return params


def text(case: Case, cell: str, dtype: str) -> Text:
    """The same numbers for everyone."""
    random = np.random.default_rng(0)
    params = weights(case, cell, dtype, random)
    # A head that tells its tokens apart.
    params["head.weight"] *= 4
    tokens = random.integers(0, case.I, (case.T + 1, case.B)).astype(np.int32)
    return Text(params, tokens[:-1], tokens[1:])


def seen(drawn: np.ndarray, case: Case) -> np.ndarray:
    """What can be said of tokens that were drawn: (rows, columns, how many are none)."""
    wrong = int(((drawn < 0) | (drawn >= case.I)).sum())
    return np.array([*drawn.shape, wrong])


class Model:
    """The reference's parts, one after the other."""

    def __init__(self, case: Case, cell: str, dtype: str) -> None:
        self.case, self.module = case, CELLS[cell]
        self.params, self.tokens, self.targets = text(case, cell, dtype)

    def _part(self, name: str, layer: int | None = None) -> dict[str, np.ndarray]:
        end = "" if layer is None else f"_l{layer}"
        return {
            key.removeprefix(f"{name}.").removesuffix(end): value
            for key, value in self.params.items()
            if key.startswith(f"{name}.") and key.endswith(end)
        }

    def zero_state(self, batch: int) -> list[tuple[np.ndarray, ...]]:
        """For each layer."""
        zero = np.zeros((batch, self.case.H), self.params["head.bias"].dtype)
        return [tuple(zero for _ in self.module.STATES) for _ in range(self.case.layers)]

    def forward(self, tokens: np.ndarray, states: list) -> tuple[np.ndarray, list, list]:
        """Logits (T, B, V), the states after, what backward needs."""
        y, kept = embedding_forward(self._part("embedding"), tokens)
        saved, after = [kept], []
        for layer, state in enumerate(states):
            y, last, kept = self.module.forward(self._part("rnn", layer), y, state)
            saved.append(kept)
            after.append(last)
        logits, kept = linear_forward(self._part("head"), y)
        return logits, after, [*saved, kept]

    def gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss in nats and its gradients."""
        states = self.zero_state(self.case.B)
        logits, _, saved = self.forward(self.tokens, states)
        rows = logits.reshape(-1, self.case.I)
        losses, d_rows = softmax_cross_entropy(rows, self.targets.reshape(-1))
        d_logits = (d_rows / len(rows)).reshape(logits.shape)
        grads = {}
        d_y, found = linear_backward(self._part("head"), saved.pop(), d_logits)
        grads |= {f"head.{key}": value for key, value in found.items()}
        for layer in reversed(range(self.case.layers)):
            part = self._part("rnn", layer)
            d_x, _, found = self.module.backward(part, saved.pop(), d_y, states[layer])
            grads |= {f"rnn.{key}_l{layer}": value for key, value in found.items()}
            d_y = d_x
        found = embedding_backward(self._part("embedding"), saved.pop(), d_y)
        return float(losses.mean()), grads | {"embedding.weight": found["weight"]}

    def learn(self) -> Iterator[tuple[float, float]]:
        """Training: loss and norm of the gradients of each step."""
        memory: dict[str, dict[str, Any]] = {key: {} for key in self.params}
        while True:
            loss, grads = self.gradients()
            norm = sum(float((g.astype("f8") ** 2).sum()) for g in grads.values()) ** 0.5
            # With PyTorch's guard against a norm of zero.
            scale = min(1.0, NORM / (norm + 1e-6))
            for key, g in grads.items():
                self.params[key], memory[key] = adam(self.params[key], g * scale, memory[key], RATE)
            yield loss, norm

    def write(self) -> np.ndarray:
        """T tokens (T, B), each the likeliest, after the first row of the text."""
        states, tokens, written = self.zero_state(self.case.B), self.tokens[:1], []
        for _ in range(self.case.T):
            logits, states, _ = self.forward(tokens, states)
            tokens = logits.argmax(axis=2)
            written.append(tokens[0])
        return np.array(written)
