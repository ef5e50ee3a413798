"""A stack of recurrent layers of any cell: parameters, checks, and the kernels around them.

Layers keep no memory between calls (but for `Frozen`): what backward needs is in the object that
forward returns. `backward` adds to `grads` if they are given; pieces of a sequence, last piece
first, then give the same bits as the whole. (With `vectors`, the gradients of vectors and weight_ih
of each call are summed up by token first, with `weight_dropout` those of weight_hh apart: there,
pieces agree with the whole to rounding. Masks go by the step in a call and the place in the
batch, or by `first_step` and `sequences`.)
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrnn.axes import Axes, read_input
from fastrnn.budget import Work, piece_within, step_numbers
from fastrnn.cells import Cell
from fastrnn.checks import (
    as_choice,
    as_dtype,
    as_floats,
    as_number,
    as_place,
    as_seed,
    as_size,
)
from fastrnn.counter import stream
from fastrnn.dropout import drop_weights, dropout
from fastrnn.frozen import Frozen
from fastrnn.init import INITS, initial
from fastrnn.layout import Drawing, Layout, Taking, cut, even, taking
from fastrnn.memory import zeros
from fastrnn.module import Module, Params, new_grads
from fastrnn.noise import Noise
from fastrnn.options import callers_level, checking_names
from fastrnn.parallel import get_num_threads
from fastrnn.saved import Saved
from fastrnn.single import Sums, Weights
from fastrnn.stack import Made, Parts, Rows, as_outside, backward_layer, forward_layer, rows_for
from fastrnn.stepper import Stepper

State = Any  # h (layers, B, H), or with further states a tuple, for the LSTM (h, c)
# Parameters that become vectors of a cell: peepholes; of one with normalisation these, and biases.
_VECTORS = ("weight_ch", "norm_ih", "norm_hh", "norm_c")


class Recurrent(Module):
    """A stack of recurrent layers with PyTorch's names, shapes and parameter keys.

    RNN, GRU and LSTM are this with their cells; it takes one of your own as well, see
    `fastrnn.cells`.

    cell            a `fastrnn.cells.Cell`
    input_size, hidden_size, num_layers   I, H, depth of the stack
    bias            whether there are biases
    batch_first     arrays are (B, T, ...) instead of (T, B, ...); states never are
    bidirectional   a second direction in each layer, from the end of a sequence
    merge           what becomes of both outputs: "concat" (PyTorch's), "sum" or "mean"
    init            how weights begin: "pytorch", "glorot" (Keras's: Glorot and orthogonal) or
                    "identity" (for a ReLU RNN); see `fastrnn.init`
    learned_state   the state that a sequence begins with where none is given is a parameter, `h_0`
                    (and `c_0`) of each layer; after a reset the state is still zero
    dtype, seed     float32 or float64; the seed draws the initial weights and seeds of dropout

    In training, that is in `forward`, each a probability, with masks that are drawn anew each time:

    dropout            of what goes from layer to layer (Zaremba et al. 2014, arXiv:1409.2329); with
                       one layer that is nothing, which is warned of, as PyTorch does
    input_dropout      of x
    locked_dropout     True: these two, one of which it needs, have one mask for all steps of a
                       sequence
    recurrent_dropout  of h wherever it enters a product, one mask for all steps (Gal and Ghahramani
                       2016, arXiv:1512.05287)
    weight_dropout     of weight_hh (Merity et al. 2018, arXiv:1708.02182)
    zoneout            of units of h that stay as they are, each step others (Krueger et al. 2017,
                       arXiv:1606.01305); without training h moves by what is expected

    Masks are functions of the seed, the layer (which adds its number to the seed), the step and the
    sequence: by default the step in a call and the place in the batch, see `forward`. They are not
    stored, but for recurrent dropout's (B, H), beside which h as products saw it is kept.

    proj_size       P, for cells with a projection: see `LSTM`
    """

    # Vectors of the cell that are no parameters: a number for all units.
    _settings: tuple[float, ...] = ()
    # The weights of layers, with what they were packed to, where `params` do not change any more.
    _fixed: dict[int, list[Weights]] | None = None
    # Whether it is made for its shapes only: see `_plan`.
    _planned = False
    # Whether it is part of a model that drops its output, too: see `_before_dropout`.
    _followed = False

    @checking_names
    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        merge: str = "concat",
        input_dropout: float = 0.0,
        locked_dropout: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        learned_state: bool = False,
        init: str = "pytorch",
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"cell: expected a fastrnn.cells.Cell, got {type(cell).__name__}")
        self.cell = cell
        self.bidirectional = bool(bidirectional)
        self.merge = as_choice("merge", merge, ("concat", "sum", "mean"))
        if merge != "concat" and not bidirectional:
            raise ValueError(f"merge: expected bidirectional=True beside it, got merge={merge!r}")
        self.input_size = as_size("input_size", input_size)
        self.hidden_size = as_size("hidden_size", hidden_size)
        self.num_layers = as_size("num_layers", num_layers)
        self.proj_size = as_size("proj_size", proj_size, 0)
        if bool(self.proj_size) != cell.projected:
            wanted = "0, since this cell has no projection"
            if cell.projected:
                wanted = "a size, since this cell has a projection"
            raise ValueError(f"proj_size: expected {wanted}, got {proj_size}")
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                f"proj_size: expected less than hidden_size = {hidden_size}, got {proj_size}; "
                "0 means no projection"
            )
        self.bias = bool(bias)
        given = cell.trained + len(self._settings)
        if cell.normed:
            given = 2 * cell.gates * (1 + self.bias) + 2 * cell.normed_carry
        if cell.vectors != given:
            raise ValueError(
                f"cell: expected one with {given} vectors, all trained, beside bias={self.bias}, "
                f"got {cell.name} with {cell.vectors}, {cell.trained} of them trained"
            )
        self.batch_first = bool(batch_first)
        self.dropout = as_number("dropout", dropout, 0, 1)
        self.input_dropout = as_number("input_dropout", input_dropout, 0, 1)
        self.locked_dropout = bool(locked_dropout)
        if self.locked_dropout and not (self.dropout or self.input_dropout):
            raise ValueError(
                "locked_dropout: expected dropout or input_dropout beside it, to lock their masks, "
                f"got locked_dropout={locked_dropout!r} with neither"
            )
        self.recurrent_dropout = as_number("recurrent_dropout", recurrent_dropout, 0, 1)
        self.weight_dropout = as_number("weight_dropout", weight_dropout, 0, 1)
        self.zoneout = as_number("zoneout", zoneout, 0, 1)
        self.learned_state = bool(learned_state)
        self.init = as_choice("init", init, INITS)
        if init == "identity" and cell.name != "rnn_relu":
            raise ValueError(
                'init: expected "pytorch" or "glorot", got "identity", which is for '
                f'RNN(..., nonlinearity="relu"), with the cell {cell.name}'
            )
        self.dtype = as_dtype(dtype)
        seed = as_seed(seed)
        if self._planned:
            return
        if self.dropout and self.num_layers == 1 and not self._followed:
            warnings.warn(
                f"dropout: acts between layers only, got dropout={dropout} with num_layers=1, "
                "where it changes nothing",
                stacklevel=callers_level(),
            )
        self._begin(np.random.default_rng(seed))

    def _begin(self, random: np.random.Generator) -> None:
        """Draw the initial weights."""
        params = {}
        for key, (name, shape) in self._all_shapes().items():
            value = initial(name, shape, self.hidden_size, self.init, random)
            params[key] = value.astype(self.dtype)
        self._own(params)
        self._seeds = np.random.default_rng(random.integers(2**63))

    @classmethod
    def _plan(cls, *arguments: Any, **options: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of the `params` that a layer of these arguments would have.

        Arguments are checked as the class checks them; no memory is taken.
        """
        layer = cls.__new__(cls)
        layer._planned = True
        cls.__init__(layer, *arguments, **options)
        return {key: shape for key, (_, shape) in layer._all_shapes().items()}

    @classmethod
    def _before_dropout(cls, *arguments: Any, **options: Any) -> Recurrent:
        """A layer of a model that drops its output, too: there, `dropout` acts with one layer."""
        layer = cls.__new__(cls)
        layer._followed = True
        cls.__init__(layer, *arguments, **options)
        return layer

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """All that may be chosen but what has no default, and the seed: names and defaults."""
        found = {}
        for kind in reversed(cls.__mro__):
            if issubclass(kind, Recurrent):
                for name, parameter in inspect.signature(kind.__init__).parameters.items():
                    if parameter.default is not parameter.empty and name != "seed":
                        found[name] = parameter.default
        return found

    def _all_shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of all parameters by their keys, beside the names that they have in one layer."""
        return {
            f"{name}_l{layer}{end}": (name, shape)
            for layer, end in itertools.product(range(self.num_layers), self._ends)
            for name, shape in self._layer_shapes(layer).items()
        }

    def _layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters of one direction, in the order of their keys."""
        cell, size = self.cell, self.hidden_size
        rows, width = cell.gates * size, self.state_sizes[0]
        columns = self.input_size if layer == 0 else self.output_size
        shapes: dict[str, tuple] = {"weight_ih": (rows, columns), "weight_hh": (rows, width)}
        if self.bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if cell.trained and not cell.normed:
            shapes["weight_ch"] = (cell.trained, size)
        if self.proj_size:
            shapes["weight_hr"] = (width, size)
        if cell.normed:
            shapes |= {"norm_ih": (rows,), "norm_hh": (rows,)}
        if cell.normed_carry:
            shapes["norm_c"] = (2, size)
        if self.learned_state:
            for name, units in zip(self.state_names, self.state_sizes, strict=True):
                shapes[f"{name}_0"] = (units,)
        return shapes

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """What a state consists of."""
        return ("h", *self.cell.carry_names)

    @functools.cached_property
    def state_sizes(self) -> tuple[int, ...]:
        """Units of its parts: all H, with a projection that of h is less."""
        return (self.proj_size or self.hidden_size, *[self.hidden_size] * self.cell.carries)

    def initial_state(self, batch: int) -> State:
        """What sequences begin with where no state is given: zeros, or what was learned."""
        axes = Axes(1, as_size("batch", batch), False, False)
        self.check_params()
        return self._state_out(self._initial(None, axes), False)

    @functools.cached_property
    def _ends(self) -> tuple[str, ...]:
        """What keys of a layer's directions end in."""
        return ("", "_reverse") if self.bidirectional else ("",)

    @functools.cached_property
    def output_size(self) -> int:
        """Units of the output: those of h, or of both directions' side by side twice as many."""
        joined = self.bidirectional and self.merge == "concat"
        return self.state_sizes[0] * (2 if joined else 1)

    def _kind(self) -> tuple:
        """What two layers share if one can work on what the other has saved."""
        sizes = self.input_size, self.hidden_size, self.num_layers, self.proj_size
        chances = self.dropout, self.input_dropout, self.locked_dropout, self.weight_dropout
        ways = self.bidirectional, self.merge, self.learned_state
        # Of two cells with one name the functions may differ.
        own = self.cell._numba_type_.fingerprint
        return self.cell.name, *self._settings, *sizes, *chances, *ways, self.dtype, own

    def _weights(
        self, layer: int, arrays: Mapping[str, np.ndarray], seed: int | None = None
    ) -> list[Weights]:
        """Of a layer's directions, from `params` or from gradients like them.

        seed  draws which of weight_hh are dropped; None: none are
        """
        fixed = self._fixed if arrays is self.params else None
        if fixed is not None and layer in fixed:
            return fixed[layer]
        found = [self._side(arrays, f"_l{layer}{end}") for end in self._ends]
        if arrays is self.params and self._settings:
            rows = [np.full((1, self.hidden_size), n, self.dtype) for n in self._settings]
            found = [of._replace(v=[*(of.v or ()), *rows]) for of in found]
        if fixed is not None:
            # Of two threads, one comes first.
            return fixed.setdefault(layer, [of._replace(packed={}) for of in found])
        if self.weight_dropout and seed is not None:
            found = [
                of._replace(h=drop_weights(of.h, self.weight_dropout, stream(seed, side)))
                for side, of in enumerate(found)
            ]
        return found

    def _side(self, arrays: Mapping[str, np.ndarray], end: str) -> Weights:
        """Of the direction whose keys have this end."""
        x, h = arrays[f"weight_ih{end}"], arrays[f"weight_hh{end}"]
        b_x, b_h = arrays.get(f"bias_ih{end}"), arrays.get(f"bias_hh{end}")
        rows = None
        if self.cell.trained or self.cell.normed:
            vectors = [arrays.get(name + end) for name in _VECTORS]
            if self.cell.normed:
                # Biases come after gains.
                vectors += b_x, b_h
                b_x = b_h = None
            rows = [value.reshape(-1, self.hidden_size) for value in vectors if value is not None]
        return Weights(x, h, b_x, b_h, rows, arrays.get(f"weight_hr{end}"))

    def _noises(self, seed: int | None, drawing: Drawing) -> list[Noise | None]:
        """What acts on the states of a layer's directions; seed None: not in training."""
        if not (self.zoneout or (self.recurrent_dropout and seed is not None)):
            return [None] * len(self._ends)
        return [
            Noise(
                self.recurrent_dropout,
                self.zoneout,
                None if seed is None else stream(seed, side),
                drawing,
            )
            for side in range(len(self._ends))
        ]

    def _states(self, layer: int, states: list[np.ndarray]) -> list[list[np.ndarray]]:
        """The states of a layer's directions, from parts (layers * directions, B, H)."""
        count = len(self._ends)
        return [[part[layer * count + side] for part in states] for side in range(count)]

    def _put_states(self, layer: int, states: list[np.ndarray], sides: list[Parts]) -> None:
        """The opposite: those of a layer's directions into all layers'."""
        for side, parts in enumerate(sides, layer * len(sides)):
            for state, part in zip(states, parts, strict=True):
                state[side] = part

    def __repr__(self) -> str:
        own = self.defaults()
        for name in ("num_layers", "dtype"):
            own.pop(name)
        # A subclass may keep an argument to itself.
        chosen = {name: getattr(self, name, default) for name, default in own.items()}
        told = [
            *([self.cell.name] if type(self) is Recurrent else []),
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}",
            *(f"{name}={value!r}" for name, value in chosen.items() if value != own[name]),
            f"dtype={self.dtype}",
        ]
        return f"{type(self).__name__}({', '.join(told)})"

    def __call__(
        self,
        x: Any,
        state: State = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
        return_gates: bool = False,
    ) -> Any:
        """Run over a sequence and keep nothing: `(output, state)`; see `forward`.

        return_gates  a third result: the gates and the further states of all steps, a dict of
                      arrays by their names and layer, "i_l0", "c_l1_reverse", (T, B, H) or as the
                      output lies; and the outputs of the directions of all layers, "h_l0". They may
                      be views of one memory: copy what you keep for long
        """
        done = self._forward(
            x, state, lengths, resets, vectors, training=False, seed=None, look=bool(return_gates)
        )
        output, state, _, gates = done
        return (output, state, gates) if return_gates else (output, state)

    def forward(
        self,
        x: Any,
        state: State = None,
        lengths: Any = None,
        *,
        resets: Any = None,
        vectors: Any = None,
        seed: int | None = None,
        first_step: int = 0,
        sequences: Any = None,
        checkpoint_every: int | None = None,
        budget_mb: float | None = None,
        return_gates: bool = False,
    ) -> Any:
        """Run over a sequence for training.

        x       (T, B, input_size), or (B, T, input_size) with batch_first; or integers (T, B):
                tokens below input_size, as if one-hot. Without the B axis: one sequence.
        state   initial state, (num_layers, B, H), for the LSTM a pair (h, c); zeros by default.
                Of a bidirectional layer (2 * num_layers, B, H), both directions of each layer.
                With proj_size h has that many units
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
        seed    of all that is drawn; drawn by the layer if it is not given
        first_step, sequences   whose masks are drawn: how many steps of the same sequences earlier
                calls took, and the number of each sequence, (B,) integers from 0 (0 to B-1 by
                default). They need a seed; a sequence is then drawn alike in any batch and at any
                place in it, and in pieces, a call each, as in one
        checkpoint_every   keep what comes into each layer and the states of every so many steps,
                and no tape: backward takes pieces of that length forward again. Less memory (see
                `training_bytes`), 0.3 to 0.6 more time (docs/decisions/0010, 0011); same bits
        budget_mb      the same with the longest pieces, of halves of halves of all steps, for which
                `training_bytes` stays within so many millions of bytes (`return_flow` of backward
                is not counted)
        return_gates   see `__call__`; not with pieces
        Returns output (T, B, output_size), the final state, what `backward` needs, and the gates if
        they are wanted. The output is read-only, x and vectors must not change until then: backward
        reads them.
        """
        every = None
        if checkpoint_every is not None:
            every = as_size("checkpoint_every", checkpoint_every)
        if budget_mb is not None:
            budget_mb = as_number("budget_mb", budget_mb, 0, np.inf, open_low=True)
            if every is not None:
                raise ValueError("budget_mb: expected None beside checkpoint_every, got both")
        if return_gates and (every is not None or budget_mb is not None):
            raise ValueError(
                "return_gates: expected False beside checkpoint_every or budget_mb, which keep no "
                "gates; call the layer itself for them"
            )
        done = self._forward(
            x,
            state,
            lengths,
            resets,
            vectors,
            training=True,
            seed=seed,
            first_step=first_step,
            sequences=sequences,
            every=every,
            budget_mb=budget_mb,
            look=bool(return_gates),
        )
        return done if return_gates else done[:3]

    def _forward(
        self,
        x: Any,
        state: State,
        lengths: Any,
        resets: Any,
        vectors: Any,
        *,
        training: bool,
        seed: int | None,
        first_step: int = 0,
        sequences: Any = None,
        every: int | None = None,
        budget_mb: float | None = None,
        look: bool = False,
    ) -> tuple[np.ndarray, State, Any, dict[str, np.ndarray]]:
        if self._fixed is None:
            self.check_params()
        if vectors is not None:
            names = "(V, input_size)"
            vectors = as_floats("vectors", vectors, self.dtype, (None, self.input_size), names)
        x, axes = read_input(x, self.batch_first, self.input_size, self.dtype, vectors)
        tokens = x.dtype == np.int32
        if training and tokens:
            # Backward writes where the tokens say: they must still be the ones that were checked.
            x = x.copy()
        if lengths is None and resets is None and every is None and budget_mb is None:
            pieces = [even(axes.steps, axes.batch, 0)]
        else:
            given = axes.lengths(lengths), axes.resets(resets)
            if budget_mb is not None:
                every = self._piece_within(budget_mb, taking(axes.steps, *given), tokens)
            pieces = cut(axes.steps, *given, every or axes.steps)
        rows = x.reshape(axes.steps * axes.batch, *x.shape[2:])
        xs = Rows([piece.gather(rows) for piece in pieces], None)
        states = self._initial(state, axes)
        drawing = Drawing(as_place("first_step", first_step), axes.sequences(sequences))
        seed = as_seed(seed)
        if training and seed is None and self._draws:
            if drawing.first_step or drawing.sequences is not None:
                raise ValueError(
                    "seed: expected an integer beside first_step and sequences, the same in each "
                    "call that their masks are to agree with, got None"
                )
            seed = int(self._seeds.integers(2**63))
        seeds = range(seed or 0, (seed or 0) + self.num_layers)
        if training and self.input_dropout:
            if tokens:
                raise ValueError(
                    "x: expected features beside input_dropout, got tokens; give their vectors, "
                    "embedding(x)"
                )
            xs = self._dropped(xs, pieces, seeds[0], drawing, self.input_dropout)
        saved: list[Made] = []
        final = [np.empty(part.shape, self.dtype) for part in states]
        gates: dict[str, np.ndarray] = {}
        for layer in range(self.num_layers):
            own = seeds[layer] if training else None
            if layer and training and self.dropout:
                xs = self._dropped(xs, pieces, seeds[layer], drawing, self.dropout)
            xs, last, made = forward_layer(
                self.cell,
                self._weights(layer, self.params, own),
                pieces,
                xs,
                vectors if layer == 0 else None,
                self._states(layer, states),
                self._noises(own, drawing),
                merge=self.merge,
                keep=training or look,
                last=layer == self.num_layers - 1,
            )
            if look:
                gates |= self._inside(layer, made, axes, copied=training)
            if training:
                saved.append(made)
            self._put_states(layer, final, last)
        result = None
        if training:
            learned = self.learned_state and state is None
            kind = self._kind()
            result = Saved(kind, saved, pieces, vectors, seeds, drawing, axes, learned)
        output = as_outside(pieces, xs, axes.steps)
        output = axes.outward(output.reshape(axes.steps, axes.batch, self.output_size))
        if training:
            # Backward reads the same memory.
            output.flags.writeable = False
        return output, self._state_out(final, axes.unbatched), result, gates

    @property
    def _draws(self) -> bool:
        """Whether training draws anything."""
        between = self.dropout if self.num_layers > 1 else 0.0
        others = self.input_dropout, self.recurrent_dropout, self.weight_dropout, self.zoneout
        return any((between, *others))

    def _dropped(
        self, xs: Rows, pieces: list[Layout], seed: int, drawing: Drawing, p: float
    ) -> Rows:
        """What dropout lets through."""
        dropped = rows_for(pieces, xs.parts[0].shape[1], self.dtype)
        for x, y, piece in zip(xs.parts, dropped.parts, pieces, strict=True):
            dropout(x, p, seed, y, piece, locked=self.locked_dropout, drawing=drawing)
        return dropped

    def _inside(self, layer: int, made: Made, axes: Axes, *, copied: bool) -> dict[str, np.ndarray]:
        """Gates and states of all steps of a layer, by name.

        copied  although they lie as they should: backward works in that memory
        """
        found, total = {}, axes.steps * axes.batch
        for end, side in zip(self._ends, made.kept or (), strict=True):
            own = side.inside(self.cell, self.hidden_size) | {"h": side.output}
            for name, rows in own.items():
                # The output is the caller's to change.
                array = rows
                if copied or name == "h" or not side.layout.plain or len(rows) < total:
                    array = np.zeros((total, rows.shape[1]), self.dtype)
                    side.layout.scatter(rows, array)
                array = array.reshape(axes.steps, axes.batch, rows.shape[1])
                found[f"{name}_l{layer}{end}"] = axes.outward(array)
        return found

    def training_bytes(
        self,
        steps: int,
        batch: int,
        *,
        checkpoint_every: int | None = None,
        tokens: bool = False,
        lengths: Any = None,
        resets: Any = None,
        return_flow: bool = False,
    ) -> int:
        """Bytes that `forward` and `backward` take, about, for features of (steps, batch, I).

        Or, with `tokens`, for tokens. Other arguments are those of `forward` and `backward`.

        To a few per cent where there are many steps, with `checkpoint_every` to a tenth, with
        `lengths`, too, up to a fifth too much: arrays of the size of a state are not all counted.

        Beside x, d_output and `params`: what the layers save (see `Saved.nbytes`), what goes from
        one to the next, the gradients of all parameters, packed weights, and what the process
        keeps for the next step.
        """
        steps, batch = as_size("steps", steps), as_size("batch", batch)
        every = None
        if checkpoint_every is not None:
            every = as_size("checkpoint_every", checkpoint_every)
        axes = Axes(steps, batch, self.batch_first, False)
        took = taking(steps, axes.lengths(lengths), axes.resets(resets))
        return self._bytes(took, every, bool(tokens), flow=bool(return_flow))

    def _piece_within(self, budget_mb: float, took: Taking, tokens: bool) -> int | None:
        """Steps of a piece, see `forward`; None: all."""
        steps = len(took.steps)
        return piece_within(budget_mb, steps, took.batch, lambda n: self._bytes(took, n, tokens))

    def _bytes(self, took: Taking, every: int | None, tokens: bool, *, flow: bool = False) -> int:
        """See `training_bytes`."""
        steps, batch = len(took.steps), took.batch
        pieces = took.cut(every or steps)
        work = Work(
            self.cell,
            self.hidden_size,
            self.state_sizes[0],
            [self.input_size, *[self.output_size] * (self.num_layers - 1)],
            self.output_size,
            len(self._ends),
            (self.input_dropout > 0, self.dropout > 0),
            self.recurrent_dropout > 0,
            self.weight_dropout > 0,
            tokens,
            sum(value.size for value in self.params.values()),
            self.dtype,
            batch,
            steps * batch,
            pieces,
            every or steps,
            bool((took.steps == batch).all()) and all(columns == batch for _, columns in pieces),
            took.anew is not None and len(pieces) > 1,
            flow,
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
        return_flow: bool = False,
    ) -> Any:
        """Gradients of a scalar loss, from its gradients in the output and the final state.

        d_output   like the output of forward, or None: the loss sees only the final state
        d_state    like the final state; zeros by default
        grads      gradients to add to, with the keys of `params`; zeros by default
        need_d_x   False saves the work for a first layer whose input is data
        retain     keep `saved` usable, at the cost of a copy
        return_flow  a fourth result: how much of the loss comes back to each step, the norms of
                   its gradients in h, float64 (num_layers, T, B), also with batch_first; of a
                   bidirectional layer (2 * num_layers, T, B), both directions of each layer. They
                   vanish or explode towards the beginning; see `fastrnn.plot`
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
        pieces, axes = saved.pieces, saved.axes
        steps, batch = axes.steps, axes.batch
        d_states = self._initial(d_state, axes, name="d_state")
        if d_output is None:
            d_ys = Rows([np.zeros((1, self.output_size), self.dtype)] * len(pieces), None)
        else:
            letter = "P" if self.proj_size else "H"
            letter = f"2 {letter}" if self.output_size > self.state_sizes[0] else letter
            d_y = axes.gradient("d_output", d_output, self.output_size, letter, self.dtype)
            d_y = d_y.reshape(steps * batch, self.output_size)
            d_ys = Rows([d_y] * len(pieces), None, outside=True)
        layers = saved.take(retain)
        d_initial = [np.empty(part.shape, self.dtype) for part in d_states]
        d_table: np.ndarray | None = None
        count = len(self._ends)
        flow = None
        if return_flow:
            flow = np.zeros((count * self.num_layers, steps * batch))
        for layer in reversed(range(self.num_layers)):
            made, table = layers.pop(), None if layer else saved.table
            tokens = made.xs.parts[0].dtype == np.int32
            seed = saved.seeds[layer]
            weights = self._weights(layer, self.params, seed)
            # Gradients of weights of which some were dropped are summed up apart.
            out = self._weights(layer, grads)
            apart = out
            if self.weight_dropout:
                apart = [of._replace(h=zeros(of.h.shape, of.h.dtype)) for of in out]
            sums = [
                Sums(self.cell, of, into, tokens=tokens, table=table)
                for of, into in zip(weights, apart, strict=True)
            ]
            own = slice(layer * count, (layer + 1) * count)
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
                norms=None if flow is None else flow[own],
            )
            for side, summed in enumerate(sums):
                found = summed.close(need_d_x)
                d_table = found if d_table is None else d_table + found
                if self.weight_dropout:
                    out[side].h[...] += drop_weights(
                        apart[side].h, self.weight_dropout, stream(seed, side)
                    )
            self._put_states(layer, d_initial, firsts)
            p = self.dropout if layer else self.input_dropout
            if p and d_ys.parts:
                locked, drawing = self.locked_dropout, saved.drawing
                for d_x, piece in zip(d_ys.parts, pieces, strict=True):
                    dropout(d_x, p, seed, d_x, piece, locked=locked, drawing=drawing)
        if saved.learned:
            self._add_to_learned(d_initial, grads)
        d_first: np.ndarray | None = d_table if need_d_x else None
        if need_d_x and not tokens:
            d_x = as_outside(pieces, d_ys, steps).reshape(steps, batch, self.input_size)
            d_first = axes.outward(d_x)
        result = d_first, self._state_out(d_initial, axes.unbatched), grads
        if flow is None:
            return result
        norms = flow.reshape(-1, steps, batch)
        return *result, norms[:, :, 0] if axes.unbatched else norms

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

    def _with_fixed_weights(self) -> Recurrent:
        """A copy whose weights stay what they are now."""
        fixed = copy.copy(self)
        fixed.params, fixed._fixed = self.state_dict(), {}
        fixed.check_params()
        return fixed

    def __getstate__(self) -> dict[str, Any]:
        # How weights are packed depends on the machine, which a copy may leave.
        return {**vars(self), "_fixed": None if self._fixed is None else {}}

    def _initial(self, state: State, axes: Axes, name: str = "state") -> list[np.ndarray]:
        """The parts of a state as arrays (layers, B, H), what it is by default for None."""
        count, batch, dtype = self.num_layers * len(self._ends), axes.batch, self.dtype
        letters = "(layers * directions" if self.bidirectional else "(layers"
        names, sizes = self.state_names, self.state_sizes
        if state is None:
            parts = [np.zeros((count, batch, size), dtype) for size in sizes]
            if self.learned_state and name == "state":
                for part, values in zip(parts, self._learned(self.params), strict=True):
                    part[...] = np.stack(values)[:, None]
            return parts
        if len(names) == 1:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(names):
            raise TypeError(f"{name}: expected {_tuple_of(names)}, got {type(state).__name__}")
        found = []
        for letter, size, value in zip(names, sizes, state, strict=True):
            label = name if len(names) == 1 else f"{name} {letter}"
            units = "P" if self.proj_size and letter == "h" else "H"
            if axes.unbatched:
                array = as_floats(label, value, dtype, (count, size), f"{letters}, {units})")[
                    :, None
                ]
            else:
                array = as_floats(
                    label, value, dtype, (count, batch, size), f"{letters}, B, {units})"
                )
            found.append(array)
        return found

    def _learned(self, arrays: Mapping[str, np.ndarray]) -> list[list[np.ndarray]]:
        """Of each part of the state the learned initial ones, or their gradients."""
        ends = [f"_l{i}{end}" for i in range(self.num_layers) for end in self._ends]
        return [[arrays[f"{name}_0{end}"] for end in ends] for name in self.state_names]

    def _add_to_learned(self, d_initial: list[np.ndarray], grads: Params) -> None:
        for part, totals in zip(d_initial, self._learned(grads), strict=True):
            for total, d_states in zip(totals, part, strict=True):
                for d_state in d_states:
                    total += d_state

    def _state_out(self, parts: list[np.ndarray], unbatched: bool) -> State:
        if unbatched:
            parts = [part[:, 0] for part in parts]
        return parts[0] if len(parts) == 1 else tuple(parts)


def _tuple_of(names: tuple[str, ...]) -> str:
    return f"{'a pair' if len(names) == 2 else 'a tuple'} ({', '.join(names)})"
