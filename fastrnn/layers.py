"""RNN, GRU and LSTM: parameters, checks, and the kernels around them.

Layers keep no memory between calls (but for `Frozen`): what backward needs is in the object that
forward returns. `backward` adds to `grads` if they are given; pieces of a sequence, last piece
first, then give the same bits as the whole. (With `vectors`, the gradients of vectors and weight_ih
of each call are summed up by token first: there, pieces agree with the whole to rounding.)
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrnn.budget import Work, step_numbers
from fastrnn.cells import CELLS, Cell, lstm
from fastrnn.checks import (
    as_array,
    as_choice,
    as_dtype,
    as_flags,
    as_floats,
    as_lengths,
    as_number,
    as_seed,
    as_size,
    as_tokens,
    check_shape,
    mask_lengths,
)
from fastrnn.dropout import dropout
from fastrnn.frozen import Frozen
from fastrnn.layout import Layout, cut, even
from fastrnn.memory import empty, zeros
from fastrnn.module import Module, Params, new_grads
from fastrnn.parallel import get_num_threads
from fastrnn.single import Sums, Weights
from fastrnn.stack import Made, Parts, Rows, backward_layer, forward_layer, rows_for
from fastrnn.stepper import Stepper

State = Any  # h (layers, B, H), or for the LSTM (h, c)


class Saved:
    """What backward needs from forward. Backward works in this memory: it can be used once."""

    def __init__(
        self,
        kind: tuple,
        layers: list[Made],
        pieces: list[Layout],
        table: np.ndarray | None,
        seeds: range,
        steps: int,
        unbatched: bool,
    ) -> None:
        self.kind = kind
        self._layers: list[Made] | None = layers
        self.pieces = pieces
        # A view, since backward relies on the shape.
        self.table = None if table is None else table.view()
        self.seeds = seeds
        self.steps = steps
        self.unbatched = unbatched

    @property
    def nbytes(self) -> int:
        """Bytes held: B*(T*tape*Hp + (T+1)*(H + carries*Hp)) numbers for each layer and direction.

        Hp: see recurrence. T*B is the sum of `lengths` if they are given, and each reset counts as
        a sequence more. With `checkpoint_every`: the states in between. Beside them what comes into
        each layer is kept: x itself, or a copy in another order, and what dropout made.
        """
        return sum(made.nbytes for made in self._layers or ())

    def take(self, retain: bool) -> list[Made]:
        if self._layers is None:
            raise ValueError(
                "saved: expected the result of a new forward, got one that backward has used; "
                "call forward again, or backward(..., retain=True) the first time"
            )
        layers = self._layers
        if retain:
            return [made.copy() for made in layers]
        self._layers = None
        return layers


class _Recurrent(Module):
    """A stack of recurrent layers with PyTorch's names, shapes and parameter keys.

    merge  what becomes of a bidirectional layer's two outputs: "concat" (PyTorch's), "sum", "mean"
    """

    cell: Cell
    state_names: tuple[str, ...] = ("h",)
    # Vectors of the cell that are no parameters: a number for all units.
    _settings: tuple[float, ...] = ()
    # What weights were packed to, by layer and side, where `params` do not change any more.
    _packed: dict[tuple, dict] | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        merge: str = "concat",
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        self.bidirectional = bool(bidirectional)
        self.merge = as_choice("merge", merge, ("concat", "sum", "mean"))
        if merge != "concat" and not bidirectional:
            raise ValueError(f"merge: expected bidirectional=True beside it, got merge={merge!r}")
        self.input_size = as_size("input_size", input_size)
        self.hidden_size = as_size("hidden_size", hidden_size)
        self.num_layers = as_size("num_layers", num_layers)
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dropout = as_number("dropout", dropout, 0, 1)
        self.dtype = as_dtype(dtype)
        random = np.random.default_rng(as_seed(seed))
        bound = 1 / math.sqrt(self.hidden_size)
        rows = self.cell.gates * self.hidden_size
        params = {}
        for layer, end in itertools.product(range(self.num_layers), self._ends):
            columns = self.input_size if layer == 0 else self.output_size
            shapes: dict[str, tuple] = {
                "weight_ih": (rows, columns),
                "weight_hh": (rows, self.hidden_size),
            }
            if self.bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            if self.cell.trained:
                shapes["weight_ch"] = (self.cell.trained, self.hidden_size)
            for key, shape in shapes.items():
                values = random.uniform(-bound, bound, shape)
                params[f"{key}_l{layer}{end}"] = values.astype(self.dtype)
        self._own(params)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch")
        self._keys = [
            [tuple(f"{name}_l{layer}{end}" for name in names) for end in self._ends]
            for layer in range(self.num_layers)
        ]
        self._seeds = np.random.default_rng(random.integers(2**63))

    @property
    def _ends(self) -> tuple[str, ...]:
        """What keys of a layer's directions end in."""
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def output_size(self) -> int:
        """Units of the output: H, or of both directions' side by side 2 H."""
        joined = self.bidirectional and self.merge == "concat"
        return self.hidden_size * (2 if joined else 1)

    def _kind(self) -> tuple:
        """What two layers share if one can work on what the other has saved."""
        sizes = self.input_size, self.hidden_size, self.num_layers
        return self.cell.name, *self._settings, *sizes, self.bidirectional, self.merge, self.dtype

    def _weights(self, layer: int, arrays: Mapping[str, np.ndarray]) -> list[Weights]:
        """Of a layer's directions, from `params` or from gradients like them."""
        found = [Weights(*map(arrays.get, keys)) for keys in self._keys[layer]]  # type: ignore
        if arrays is self.params:
            if self._settings:
                rows = [np.full((1, self.hidden_size), n, self.dtype) for n in self._settings]
                whole = ([*([] if of.v is None else [of.v]), *rows] for of in found)
                found = [
                    of._replace(v=np.concatenate(v)) for of, v in zip(found, whole, strict=True)
                ]
            if self._packed is not None:
                kept = (self._packed.setdefault((layer, side), {}) for side in range(len(found)))
                found = [of._replace(packed=own) for of, own in zip(found, kept, strict=True)]
        return found

    def _states(self, layer: int, states: list[np.ndarray]) -> list[list[np.ndarray]]:
        """The states of a layer's directions, from parts (layers * directions, B, H)."""
        count = len(self._ends)
        return [[part[layer * count + side] for part in states] for side in range(count)]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.input_size}, {self.hidden_size}, "
            f"num_layers={self.num_layers}, dtype={self.dtype})"
        )

    def __call__(
        self,
        x: Any,
        state: State = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
    ) -> tuple[np.ndarray, State]:
        """Run over a sequence and keep nothing: `(output, state)`; see `forward`."""
        done = self._forward(x, state, lengths, resets, vectors, keep=False, seed=None)
        output, state, _ = done
        return output, state

    def forward(
        self,
        x: Any,
        state: State = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
        seed: int | None = None,
        checkpoint_every: int | None = None,
    ) -> tuple[np.ndarray, State, Saved]:
        """Run over a sequence for training.

        x       (T, B, input_size), or (B, T, input_size) with batch_first; or integers (T, B):
                tokens below input_size, as if one-hot. Without the B axis: one sequence.
        state   initial state, (num_layers, B, H), for the LSTM a pair (h, c); zeros by default.
                Of a bidirectional layer (2 * num_layers, B, H), both directions of each layer
        lengths (B,) integers from 0 to T in any order, how many steps of each sequence count; or a
                boolean mask (T, B), True up to each sequence's end. After its end the output is 0
                and gradients that come in are ignored; the final state is that at the end, of an
                empty sequence the initial one. Time follows the sum of the lengths
        resets  (T, B), True where the state is to be zero before the step: where another document
                or episode begins (so what comes back past it in the reverse direction is zero,
                too). Its parts run side by side. Like a mask (B, T) with batch_first
        vectors (V, input_size): x are tokens below V, and the input is vectors[x], which is never
                made: V products instead of T*B. The same bits as with vectors[x]; d_x is then the
                gradient of vectors, which like that of weight_ih is summed up by token first
        seed    of the dropout masks; drawn by the layer if it is not given
        checkpoint_every   keep what comes into each layer and the states of every so many steps,
                and no tape: backward takes pieces of that length forward again. Less memory (see
                `training_bytes`), a fifth to a half more time (docs/decisions/0010), the same bits
        Returns output (T, B, output_size), the final state, and what `backward` needs. The output
        is read-only, x and vectors must not change until then: backward reads them.
        """
        every = None
        if checkpoint_every is not None:
            every = as_size("checkpoint_every", checkpoint_every)
        arguments = x, state, lengths, resets, vectors
        return self._forward(*arguments, keep=True, seed=seed, every=every)

    def _forward(
        self,
        x: Any,
        state: State,
        lengths: Any,
        resets: Any,
        vectors: Any,
        *,
        keep: bool,
        seed: int | None,
        every: int | None = None,
    ) -> tuple[np.ndarray, State, Any]:
        self.check_params()
        if vectors is not None:
            names = "(V, input_size)"
            vectors = as_floats("vectors", vectors, self.dtype, (None, self.input_size), names)
        x, unbatched = self._input(x, vectors)
        if keep and x.dtype == np.int32:
            # Backward writes where the tokens say: they must still be the ones that were checked.
            x = x.copy()
        steps, batch = x.shape[:2]
        pieces = self._pieces(lengths, resets, steps, batch, unbatched, every)
        rows = x.reshape(steps * batch, *x.shape[2:])
        xs = Rows([piece.gather(rows) for piece in pieces], None)
        states = self._initial(state, batch, unbatched)
        seed = as_seed(seed)
        if keep and self.dropout and self.num_layers > 1 and seed is None:
            seed = int(self._seeds.integers(2**63))
        seeds = range(seed or 0, (seed or 0) + self.num_layers)
        saved: list[Made] = []
        finals: list[Parts] = []
        for layer in range(self.num_layers):
            if layer and keep and self.dropout:
                xs = self._dropped(xs, pieces, seeds[layer])
            xs, last, made = forward_layer(
                self.cell,
                self._weights(layer, self.params),
                pieces,
                xs,
                vectors if layer == 0 else None,
                self._states(layer, states),
                merge=self.merge,
                keep=keep,
            )
            if keep:
                saved.append(made)
            finals += last
        final = [np.array(parts) for parts in zip(*finals, strict=True)]
        result = None
        if keep:
            result = Saved(self._kind(), saved, pieces, vectors, seeds, steps, unbatched)
        output = _outside(pieces, xs, steps).reshape(steps, batch, self.output_size)
        output = self._outward(output, unbatched)
        # Backward reads the same memory.
        output.flags.writeable = not keep
        return output, self._state_out(final, unbatched), result

    def _dropped(self, xs: Rows, pieces: list[Layout], seed: int) -> Rows:
        """What dropout lets through."""
        dropped = rows_for(pieces, self.output_size, self.dtype)
        for x, y, piece in zip(xs.parts, dropped.parts, pieces, strict=True):
            dropout(x, self.dropout, seed, y, piece)
        return dropped

    def _pieces(
        self,
        lengths: Any,
        resets: Any,
        steps: int,
        batch: int,
        unbatched: bool,
        every: int | None,
    ) -> list[Layout]:
        """Where the steps are that count, in pieces of `every` steps."""

        def time_major(name: str, array: np.ndarray) -> np.ndarray:
            shape: tuple = (steps, batch)
            names = "(T, B)"
            if unbatched:
                shape, names = (steps,), "(T)"
            elif self.batch_first:
                shape, names = (batch, steps), "(B, T)"
            check_shape(name, array, shape, names)
            return array.reshape(batch, steps).T if unbatched or self.batch_first else array

        if every is None:
            every = steps
        if lengths is None and resets is None and every >= steps:
            return [even(steps, batch, 0)]
        counts = np.full(batch, steps)
        if lengths is not None:
            array = as_array("lengths", lengths)
            if array.dtype == bool:
                counts = mask_lengths(time_major("lengths", array))
            else:
                counts = as_lengths(array.reshape(-1) if unbatched else array, steps, batch)
        if resets is not None:
            resets = time_major("resets", as_flags("resets", resets))
        return cut(steps, counts, resets, every)

    def training_bytes(self, steps: int, batch: int, *, checkpoint_every: int | None = None) -> int:
        """Bytes that `forward` and `backward` take, about, for features of (steps, batch, I).

        To a few per cent where there are many steps, with `checkpoint_every` to a tenth: arrays of
        the size of a state are not counted.

        Beside x, d_output and `params`: what the layers save (see `Saved.nbytes`), what goes from
        one to the next, the gradients of all parameters, packed weights, and what the process
        keeps for the next step.
        """
        steps, batch = as_size("steps", steps), as_size("batch", batch)
        every = steps
        if checkpoint_every is not None:
            every = min(steps, as_size("checkpoint_every", checkpoint_every))
        work = Work(
            self.cell,
            self.hidden_size,
            [self.input_size, *[self.output_size] * (self.num_layers - 1)],
            self.output_size,
            len(self._ends),
            self.dropout > 0,
            sum(value.size for value in self.params.values()),
            self.dtype,
            steps,
            batch,
            every,
        )
        return self.dtype.itemsize * step_numbers(work, get_num_threads())

    def backward(
        self,
        saved: Saved,
        d_output: Any,
        d_state: State = None,
        grads: Params | None = None,
        *,
        need_d_x: bool = True,
        retain: bool = False,
    ) -> tuple[np.ndarray | None, State, Params]:
        """Gradients of a scalar loss, from its gradients in the output and the final state.

        d_output   like the output of forward, or None: the loss sees only the final state
        d_state    like the final state; zeros by default
        grads      gradients to add to, with the keys of `params`; zeros by default
        need_d_x   False saves the work for a first layer whose input is data
        retain     keep `saved` usable, at the cost of a copy
        Returns d_x (None for tokens or if not needed, the gradient of `vectors` if forward had
        them), d_state of the initial state, grads.
        """
        if not isinstance(saved, Saved):
            raise TypeError(
                f"saved: expected the third result of forward, got {type(saved).__name__}"
            )
        if saved.kind != self._kind():
            raise ValueError(
                f"saved: expected the result of forward of a layer {self._kind()}, "
                f"got that of {saved.kind}"
            )
        self.check_params()
        grads = new_grads(self.params, grads)
        pieces, steps = saved.pieces, saved.steps
        batch = pieces[0].batch
        d_states = self._initial(d_state, batch, saved.unbatched, name="d_state")
        if d_output is None:
            d_ys = Rows([np.zeros((1, self.output_size), self.dtype)] * len(pieces), None)
        else:
            d_y = self._gradient_in(d_output, steps, batch, saved.unbatched)
            d_y = d_y.reshape(steps * batch, self.output_size)
            d_ys = Rows([piece.gather(d_y) for piece in pieces], None)
        layers = saved.take(retain)
        d_initial = [np.empty_like(s) for s in d_states]
        d_first: np.ndarray | None = None
        for layer in reversed(range(self.num_layers)):
            made, table = layers.pop(), None if layer else saved.table
            tokens = made.xs.parts[0].dtype == np.int32
            weights, out = self._weights(layer, self.params), self._weights(layer, grads)
            sums = [
                Sums(self.cell, of, into, tokens=tokens, table=table)
                for of, into in zip(weights, out, strict=True)
            ]
            d_ys, firsts = backward_layer(
                self.cell,
                weights,
                sums,
                pieces,
                made,
                table,
                d_ys,
                self._states(layer, d_states),
                merge=self.merge,
                want_d_x=layer > 0 or (need_d_x and not tokens),
            )
            for side in sums:
                found = side.close(need_d_x)
                d_first = found if d_first is None else d_first + found
            for totals, parts in zip(self._states(layer, d_initial), firsts, strict=True):
                for total, part in zip(totals, parts, strict=True):
                    total[...] = part
            if layer and self.dropout:
                for d_x, piece in zip(d_ys.parts, pieces, strict=True):
                    dropout(d_x, self.dropout, saved.seeds[layer], d_x, piece)
        if need_d_x and not tokens:
            d_x = _outside(pieces, d_ys, steps).reshape(steps, batch, self.input_size)
            d_first = self._outward(d_x, saved.unbatched)
        return d_first if need_d_x else None, self._state_out(d_initial, saved.unbatched), grads

    def stepper(self, batch: int | None = None, *, tokens: bool = False) -> Stepper:
        """The layers one step at a time, with the state kept: `y = stepper(x)`; see `Stepper`.

        batch   how many sequences; None: one, without the B axis
        tokens  inputs are integer tokens instead of features
        """
        if self.bidirectional:
            raise ValueError(
                "stepper: expected a layer of one direction, got bidirectional=True, which has to "
                "see a sequence's end first; call the layer with whole sequences"
            )
        if batch is not None:
            batch = as_size("batch", batch)
        return Stepper(self, batch, bool(tokens))

    def freeze(self) -> Frozen:
        """For serving: `run = layer.freeze(); y, state = run(x)`; see `Frozen`."""
        return Frozen(self)

    def _with_fixed_weights(self) -> _Recurrent:
        """A copy whose weights stay what they are now."""
        fixed = copy.copy(self)
        fixed.params, fixed._packed = self.state_dict(), {}
        fixed.check_params()
        return fixed

    def __getstate__(self) -> dict[str, Any]:
        # How weights are packed depends on the machine, which a copy may leave.
        return {**vars(self), "_packed": None if self._packed is None else {}}

    def _input(self, x: Any, vectors: np.ndarray | None) -> tuple[np.ndarray, bool]:
        """x time-major, floats (T, B, I) or int32 (T, B), and whether it came without B."""
        array = as_array("x", x)
        tokens = array.dtype.kind in "iu"
        if vectors is not None and not tokens:
            raise TypeError(f"x: expected integer tokens beside vectors, got {array.dtype}")
        if tokens and array.ndim == 3:
            raise TypeError(
                f"x: expected features of {self.dtype}, got {array.dtype}; convert them with "
                f".astype(np.{self.dtype}) (integers are tokens, without the I axis)"
            )
        unbatched = array.ndim == (1 if tokens else 2)
        names = "(B, T, I)" if self.batch_first else "(T, B, I)"
        if unbatched:
            names = "(T, I)"
        if tokens:
            names = names.replace(", I", "")
            shape: tuple = (None,) if unbatched else (None, None)
            kinds = self.input_size if vectors is None else len(vectors)
            array = as_tokens("x", array, kinds, shape, names)
        else:
            shape = (None, self.input_size) if unbatched else (None, None, self.input_size)
            array = as_floats("x", array, self.dtype, shape, names)
        if unbatched:
            array = array[:, None]
        elif self.batch_first:
            array = np.ascontiguousarray(array.swapaxes(0, 1))
        return array, unbatched

    def _gradient_in(self, d_output: Any, steps: int, batch: int, unbatched: bool) -> np.ndarray:
        shape: tuple = (steps, batch, self.output_size)
        names = "(T, B, H)"
        if unbatched:
            shape, names = (steps, self.output_size), "(T, H)"
        elif self.batch_first:
            shape, names = (batch, steps, self.output_size), "(B, T, H)"
        if self.output_size > self.hidden_size:
            names = names.replace("H", "2 H")
        array = as_floats("d_output", d_output, self.dtype, shape, names)
        if unbatched:
            return array[:, None]
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_first else array

    def _outward(self, y: np.ndarray, unbatched: bool) -> np.ndarray:
        if unbatched:
            return y[:, 0]
        return y.swapaxes(0, 1) if self.batch_first else y

    def _initial(self, state: State, batch: int, unbatched: bool, name: str = "state") -> list:
        """The parts of a state as arrays (layers, B, H), zeros for None."""
        count = self.num_layers * len(self._ends)
        letters = "(layers * directions" if self.bidirectional else "(layers"
        shape = (count, batch, self.hidden_size)
        if state is None:
            return [np.zeros(shape, self.dtype) for _ in self.state_names]
        if len(self.state_names) == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(self.state_names):
            raise TypeError(
                f"{name}: expected a pair ({', '.join(self.state_names)}), "
                f"got {type(state).__name__}"
            )
        found = []
        for part, value in zip(self.state_names, state, strict=True):
            label = name if len(self.state_names) == 1 else f"{name} {part}"
            if unbatched:
                wanted = (count, self.hidden_size)
                array = as_floats(label, value, self.dtype, wanted, f"{letters}, H)")[:, None]
            else:
                array = as_floats(label, value, self.dtype, shape, f"{letters}, B, H)")
            found.append(array)
        return found

    def _state_out(self, parts: list[np.ndarray], unbatched: bool) -> State:
        if unbatched:
            parts = [part[:, 0] for part in parts]
        return parts[0] if len(parts) == 1 else tuple(parts)


def _outside(pieces: list[Layout], rows: Rows, steps: int) -> np.ndarray:
    """The rows of all pieces where the caller has them, (T*B, ...); zeros where no step is."""
    total, count = steps * pieces[0].batch, sum(piece.count for piece in pieces)
    if count == total and rows.whole is not None:
        return rows.whole
    one = rows.parts[0]
    array = (empty if count == total else zeros)((total, one.shape[1]), one.dtype)
    for piece, values in zip(pieces, rows.parts, strict=True):
        piece.scatter(values, array)
    return array


class RNN(_Recurrent):
    """The plain recurrent network of Elman (1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Arguments, shapes and parameter keys are those of `torch.nn.RNN`; `nonlinearity` is "tanh" or
    "relu". dtype is float32 or float64; `seed` draws the initial weights, U(-1/sqrt(H), 1/sqrt(H)).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.nonlinearity = as_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        self.cell = CELLS[f"rnn_{nonlinearity}"]
        super().__init__(input_size, hidden_size, num_layers, *args, **kwargs)


class GRU(_Recurrent):
    """Gated recurrent unit, Cho et al. (2014, arXiv:1406.1078v1).

    Arguments, shapes, gate order r, z, n and parameter keys are those of `torch.nn.GRU`. dtype is
    float32 or float64; `seed` draws the initial weights, U(-1/sqrt(H), 1/sqrt(H)).

    reset_after  False: the reset gate acts on h before the product, W_hn (r h), as in version 3 of
                 the paper, Keras with reset_after=False and ONNX by default; another network
    reset_gate   False: none, r is 1, wherever it would act; the weights have the gates z, n
    """

    def __init__(
        self, *args: Any, reset_after: bool = True, reset_gate: bool = True, **kwargs: Any
    ) -> None:
        self.reset_after, self.reset_gate = bool(reset_after), bool(reset_gate)
        form = "gru" if reset_after else "gru_before"
        self.cell = CELLS[form if reset_gate else "gru_simple"]
        super().__init__(*args, **kwargs)


class LSTM(_Recurrent):
    """Long short-term memory, Hochreiter and Schmidhuber (1997) with Gers' forget gate (2000).

    Arguments, shapes, gate order i, f, g, o and parameter keys are those of `torch.nn.LSTM`. dtype
    is float32 or float64; `seed` draws the initial weights, U(-1/sqrt(H), 1/sqrt(H)).

    peephole   gates see the cell state (Gers and Schmidhuber 2000): `weight_ch` (3, H), what it is
               multiplied by in the gates i, f (before the step), o (after it)
    coupled    the forget gate is 1 - i (Greff et al. 2015): the weights have the gates i, g, o,
               weight_ch i, o
    cell_clip  the cell state stays within +-cell_clip; where it would not, no gradient passes
    """

    state_names = ("h", "c")

    def __init__(
        self,
        *args: Any,
        peephole: bool = False,
        coupled: bool = False,
        cell_clip: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.peephole, self.coupled, self.cell_clip = bool(peephole), bool(coupled), cell_clip
        if cell_clip is not None:
            dtype = np.finfo(as_dtype(kwargs.get("dtype", np.float32)))
            low, high = float(dtype.tiny), float(dtype.max)
            self.cell_clip = as_number("cell_clip", cell_clip, low, high)
            self._settings = (self.cell_clip,)
        self.cell = lstm(peephole=self.peephole, coupled=self.coupled, clip=cell_clip is not None)
        super().__init__(*args, **kwargs)
