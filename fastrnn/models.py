"""Whole models: a stack of recurrent layers with what comes before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from fastrnn.cells import Cell
from fastrnn.checks import (
    as_choice,
    as_dtype,
    as_number,
    as_seed,
    as_size,
    as_tokens,
)
from fastrnn.dense import Embedding, Linear
from fastrnn.dropout import dropout, rows_mask
from fastrnn.layers import GRU, LSTM, RNN
from fastrnn.loss import softmax_cross_entropy, token_losses
from fastrnn.memory import empty
from fastrnn.module import Module, Params, new_grads
from fastrnn.options import check_options
from fastrnn.recurrent import Recurrent, State

_KINDS: dict[str, type[Recurrent]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
CELL_NAMES = tuple(_KINDS)
# Options of layers that a model has itself, or cannot have, since it reads from left to right.
_NOT_PASSED_ON = ("num_layers", "dropout", "dtype", "batch_first", "bidirectional", "merge")
# How much larger than those of a Linear the head's weights start: it learns faster so.
_HEAD = 4
# Seeds of one step: one for each layer, the last two for the embedding and before the head.
SEEDS = 256
# Numbers of logits that are worked on at a time where no gradient is wanted.
_LOGITS = 1 << 22
# Up to this vocabulary, training takes an embedding and the weights after it in one product for
# each token of the vocabulary, not of the text.
_FEW = 1024


class LanguageModel(Module):
    """Predicts the next token: tokens -> (embedding) -> recurrent layers -> linear -> logits.

    vocab_size      V, how many tokens there are
    hidden_size     H of every layer
    cell            "lstm", "gru", "rnn", or a `fastrnn.cells.Cell` of your own
    num_layers      depth of the stack
    embedding_size  E, width of an embedding before the first layer; 0: the first layer takes tokens
    dropout         probability between layers and before the logits, in training (Zaremba et al.
                    2014, arXiv:1409.2329v5)
    embedding_dropout   of whole vectors (Gal and Ghahramani 2016, arXiv:1512.05287)
    dtype           float32 or float64
    seed            draws the initial weights: the layers' as by their `init`, the head's up to
                    +-4/sqrt(H), with a projection +-4/sqrt(P)
    options         of the layers: those of `Recurrent` and of `LSTM`, `GRU` or `RNN`, but for
                    batch_first, bidirectional and merge. input_dropout needs an embedding;
                    locked_dropout is also that before the logits, and needs one or the other

    `params` has the keys of the parts after "embedding.", "rnn." and "head.".
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        *,
        cell: str | Cell = "lstm",
        num_layers: int = 1,
        embedding_size: int = 0,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        dtype: Any = np.float32,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.vocab_size = as_size("vocab_size", vocab_size)
        self.hidden_size = as_size("hidden_size", hidden_size)
        self.cell = cell if isinstance(cell, Cell) else as_choice("cell", cell, CELL_NAMES)
        self.num_layers = _as_depth(num_layers)
        self.embedding_size = as_size("embedding_size", embedding_size, 0)
        self.dropout = as_number("dropout", dropout, 0, 1)
        self.embedding_dropout = as_number("embedding_dropout", embedding_dropout, 0, 1)
        self.dtype = as_dtype(dtype)
        seeds = [int(s) for s in np.random.default_rng(as_seed(seed)).integers(2**63, size=3)]
        check_options(options, _options(self.cell), f"cell={_name(self.cell)!r}")
        self.embedding = None
        if self.embedding_size:
            self.embedding = Embedding(
                vocab_size, self.embedding_size, dtype=self.dtype, seed=seeds[0]
            )
        own = (cell,) if isinstance(cell, Cell) else ()
        self.rnn = _kind(cell)._before_dropout(
            *own,
            self.embedding_size or vocab_size,
            hidden_size,
            num_layers,
            dropout=self.dropout,
            dtype=self.dtype,
            seed=seeds[1],
            **options,
        )
        need = {"input": self.rnn.input_dropout, "embedding": self.embedding_dropout}
        for name, p in need.items():
            if p and not self.embedding_size:
                raise ValueError(
                    f"{name}_dropout: expected 0 without an embedding, got {p}; give "
                    "embedding_size, too"
                )
        self.head = Linear(self.rnn.output_size, vocab_size, dtype=self.dtype, seed=seeds[2])
        self.head.params["weight"] *= _HEAD
        parts = {"embedding": self.embedding, "rnn": self.rnn, "head": self.head}
        self._parts: dict[str, Any] = {name: part for name, part in parts.items() if part}
        # The parts own their arrays; to change one, write into it.
        self.params = MappingProxyType(
            {
                f"{name}.{key}": value
                for name, part in self._parts.items()
                for key, value in part.params.items()
            }
        )

    def _arguments(self) -> dict[str, Any]:
        """Those that make this model again."""
        own = ("vocab_size", "hidden_size", "cell", "num_layers", "embedding_size", "dropout")
        arguments = {name: getattr(self, name) for name in (*own, "embedding_dropout")}
        arguments |= {name: getattr(self.rnn, name) for name in _options(self.cell)}
        return arguments | {"dtype": str(self.dtype)}

    def config(self) -> dict[str, Any]:
        """The arguments that make this model again, for JSON; not with a cell of your own."""
        if isinstance(self.cell, Cell):
            raise ValueError(
                f'cell: expected "lstm", "gru" or "rnn" in a model that is described or saved, got '
                f"the cell {self.cell.name}, whose code no file can hold; save the arrays of "
                "state_dict() and load them into a model that is made by the same call"
            )
        return self._arguments()

    def copy(self) -> LanguageModel:
        """The same model with arrays of its own."""
        model = LanguageModel(**self._arguments())
        model.load_state_dict(self.params)
        return model

    def __repr__(self) -> str:
        defaults = _options(self.cell)
        arguments = self._arguments() | {"cell": _name(self.cell)}
        told = {k: v for k, v in arguments.items() if k not in defaults or v != defaults[k]}
        return f"LanguageModel({', '.join(f'{k}={v!r}' for k, v in told.items())})"

    def initial_state(self, batch: int) -> State:
        """The state before a text begins: zeros, or with `learned_state` the one learned."""
        return self.rnn.initial_state(batch)

    def __call__(self, tokens: Any, state: State = None) -> tuple[np.ndarray, State]:
        """Logits (T, B, V) for the token after each of `tokens` (T, B), and the final state."""
        ids = self._tokens("tokens", tokens)
        # Either way gives the same bits.
        x, vectors = self._embed(ids, self.vocab_size <= ids.size)
        y, state = self.rnn(x, state, vectors=vectors)
        return self.head(y), state

    def token_losses(
        self, tokens: Any, targets: Any, state: State = None
    ) -> tuple[np.ndarray, State]:
        """-log p(target) in nats, float64 (T, B), and the final state; a piece at a time."""
        tokens = self._tokens("tokens", tokens)
        targets = self._tokens("targets", targets, tokens.shape)
        steps = max(1, _LOGITS // (self.vocab_size * tokens.shape[1]))
        losses = np.empty(tokens.shape)
        for start in range(0, len(tokens), steps):
            piece = slice(start, start + steps)
            logits, state = self(tokens[piece], state)
            losses[piece] = token_losses(logits, targets[piece])
        return losses, state

    def loss_and_grads(
        self,
        tokens: Any,
        targets: Any,
        state: State = None,
        *,
        seed: int = 0,
        grads: Params | None = None,
        checkpoint_every: int | None = None,
        budget_mb: float | None = None,
    ) -> tuple[float, Params, State]:
        """One piece of truncated backpropagation through time.

        tokens, targets  integers (T, B); target t is the token after t
        state            carried from the piece before; no gradient flows into it. By default the
                         one before a text begins; with `learned_state` that has gradients
        seed             of all that is drawn: layer l uses seed + l, the embedding seed + 254, the
                         head seed + 255
        grads            gradients to add to; zeros by default
        checkpoint_every, budget_mb   less memory for more time, see `Recurrent.forward`; the budget
                         is that of the recurrent layers alone. Same bits
        Returns the mean loss in nats, the gradients by the keys of `params`, the state after.
        """
        grads = new_grads(self.params, grads)
        seed = as_size("seed", seed, 0)
        parts = {
            name: {key: grads[f"{name}.{key}"] for key in part.params}
            for name, part in self._parts.items()
        }
        ids = self._tokens("tokens", tokens)
        x, vectors = self._embed(ids, self.vocab_size <= _FEW and not self.rnn.input_dropout)
        kept = None
        if self.embedding_dropout:
            kept = rows_mask(self.vocab_size, self.embedding_dropout, seed + SEEDS - 2, self.dtype)
            if vectors is None:
                x = x * kept[ids]
            else:
                vectors = vectors * kept
        y, state, saved = self.rnn.forward(
            x,
            state,
            seed=seed,
            vectors=vectors,
            checkpoint_every=checkpoint_every,
            budget_mb=budget_mb,
        )
        if self.dropout:
            dropped = empty(y.shape, self.dtype)
            locked = self.rnn.locked_dropout
            dropout(y, self.dropout, seed + SEEDS - 1, dropped, locked=locked)
            y = dropped
        logits, y = self.head.forward(y)
        targets = self._tokens("targets", targets, ids.shape)
        loss, d_logits = softmax_cross_entropy(logits, targets, inplace=True)
        d_y: Any = self.head.backward(y, d_logits, parts["head"])[0]
        if self.dropout:
            dropout(d_y, self.dropout, seed + SEEDS - 1, d_y, locked=locked)
        d_x, _, _ = self.rnn.backward(saved, d_y, grads=parts["rnn"])
        if kept is not None:
            d_x *= kept if vectors is not None else kept[ids]
        if vectors is not None:
            parts["embedding"]["weight"] += d_x
        elif self.embedding is not None:
            self.embedding.backward(ids, d_x, parts["embedding"])
        return loss, grads, state

    def _tokens(self, name: str, tokens: Any, shape: tuple | None = None) -> np.ndarray:
        return as_tokens(name, tokens, self.vocab_size, shape or (None, None), "(T, B)")

    def _embed(self, ids: np.ndarray, few: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """What the first layer takes, and the vectors that its tokens stand for, or None."""
        if self.embedding is None:
            return ids, None
        self.embedding.check_params()
        return (ids, self.embedding.params["weight"]) if few else (self.embedding(ids), None)


def _as_depth(num_layers: Any) -> int:
    depth = as_size("num_layers", num_layers)
    if depth > SEEDS - 2:
        raise ValueError(f"num_layers: expected at most {SEEDS - 2}, got {num_layers}")
    return depth


def _name(cell: str | Cell) -> str:
    return cell.name if isinstance(cell, Cell) else cell


def _kind(cell: str | Cell) -> type[Recurrent]:
    return Recurrent if isinstance(cell, Cell) else _KINDS[cell]


def _options(cell: str | Cell) -> dict[str, Any]:
    """The options of a model that its layers take, and their defaults."""
    return {name: v for name, v in _kind(cell).defaults().items() if name not in _NOT_PASSED_ON}


def _shapes(
    vocab_size: int,
    hidden_size: int,
    cell: str,
    num_layers: int,
    embedding_size: int,
    embedding_dropout: float,
    **options: Any,
) -> dict[str, tuple[int, ...]]:
    """The shapes of the `params` of a model that need not exist."""
    kind = _KINDS[as_choice("cell", cell, CELL_NAMES)]
    inputs = embedding_size or vocab_size
    layers = kind._plan(inputs, hidden_size, _as_depth(num_layers), **options)
    shapes = {f"rnn.{key}": shape for key, shape in layers.items()}
    # h has as many units as it has weights.
    shapes["head.weight"] = (vocab_size, layers["weight_hh_l0"][1])
    shapes["head.bias"] = (vocab_size,)
    if embedding_size:
        shapes["embedding.weight"] = (vocab_size, embedding_size)
    return shapes


def model_from_config(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> LanguageModel:
    """The model of `LanguageModel.config` with these weights; both are checked strictly."""
    cell = config.get("cell") if isinstance(config, Mapping) else None
    known = cell if isinstance(cell, str) and cell in CELL_NAMES else "lstm"
    wanted = LanguageModel(1, 1, cell=known).config()
    if isinstance(config, Mapping):
        # Files that are older than these say nothing of them.
        config = _options(known) | {"embedding_dropout": 0.0} | dict(config)
    if not isinstance(config, Mapping) or set(config) != set(wanted):
        raise ValueError(f"model: expected the keys {sorted(wanted)}, got {config!r:.200}")
    for key, example in wanted.items():
        value = config[key]
        # What is None unless it is chosen is a number.
        kind = float if example is None and value is not None else type(example)
        if type(value) is not kind:
            raise ValueError(f"model: expected {key} of type {kind.__name__}, got {value!r:.100}")
    dtype = as_choice("dtype", config["dtype"], ("float32", "float64"))
    # Sizes that the arrays do not bear out must not be allocated.
    shapes = _shapes(**config)
    for key in sorted(shapes.keys() | weights.keys()):
        found = (str(weights[key].dtype), weights[key].shape) if key in weights else None
        wanted_array = (dtype, shapes[key]) if key in shapes else None
        if found != wanted_array:
            raise ValueError(f"model: expected {key:.100} to be {wanted_array}, got {found}")
    model = LanguageModel(**config)
    model.load_state_dict(weights)
    return model
