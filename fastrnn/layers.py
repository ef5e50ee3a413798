"""RNN, GRU and LSTM: parameters, checks, and the kernels around them.

Layers keep no memory between calls (but for `Frozen`): what backward needs is in the object that
forward returns. `backward` adds to `grads` if they are given; pieces of a sequence, last piece
first, then give the same bits as the whole. (With `vectors`, the gradients of vectors and weight_ih
of each call are summed up by token first: there, pieces agree with the whole to rounding.)
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastrnn import gemm, recurrence
from fastrnn.cells import CELLS, Cell
from fastrnn.checks import (
    as_array,
    as_choice,
    as_dtype,
    as_floats,
    as_number,
    as_seed,
    as_size,
    as_tokens,
)
from fastrnn.dropout import dropout
from fastrnn.frozen import Frozen
from fastrnn.meeting import NOBODY, together
from fastrnn.memory import empty, zeros
from fastrnn.module import Module, Params, new_grads
from fastrnn.pack import indices, pack, pack_bias, pack_transposed, pack_vectors
from fastrnn.parallel import get_num_threads, parts_for, run
from fastrnn.simd import lanes, padded
from fastrnn.stepper import Stepper
from fastrnn.units import parts_of_units

State = Any  # h (layers, B, H), or for the LSTM (h, c)

# A chunk of pre-activations of one slice of the batch stays within the second-level cache, unless
# too few rows would then share a pass over the weights.
_CHUNK_BYTES = 1 << 18


@dataclass
class _Saved:
    """What one layer of a stack keeps for backward."""

    x: np.ndarray
    h: np.ndarray
    carry: np.ndarray
    tape: np.ndarray
    vectors: np.ndarray | None
    seed: int


class Saved:
    """What backward needs from forward. Backward works in this memory: it can be used once."""

    def __init__(
        self, kind: tuple, layers: list[_Saved], token_input: bool, unbatched: bool
    ) -> None:
        self.kind = kind
        self._layers: list[_Saved] | None = layers
        self.token_input = token_input
        self.unbatched = unbatched
        self.shape = layers[-1].h.shape

    @property
    def nbytes(self) -> int:
        """Bytes held: B*(T*tape*Hp + (T+1)*(H + carries*Hp)) numbers a layer; Hp: see recurrence.

        Beside them x is kept by reference, and for each layer after dropout what it let through.
        """
        return sum(s.h.nbytes + s.carry.nbytes + s.tape.nbytes for s in self._layers or ())

    def take(self, retain: bool) -> list[_Saved]:
        if self._layers is None:
            raise ValueError(
                "saved: expected the result of a new forward, got one that backward has used; "
                "call forward again, or backward(..., retain=True) the first time"
            )
        layers = self._layers
        if retain:
            return [replace(s, tape=s.tape.copy()) for s in layers]
        self._layers = None
        return layers


class _Recurrent(Module):
    """A stack of recurrent layers with PyTorch's names, shapes and parameter keys."""

    cell: Cell
    state_names: tuple[str, ...] = ("h",)
    # Packed weights by what they were packed for, where `params` do not change any more.
    _packed: dict[tuple, tuple] | None = None

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
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        if bidirectional:
            raise ValueError(
                "bidirectional: expected False, got True; not there yet: run a second layer over "
                "x[::-1] and join its output[::-1]"
            )
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
        for layer in range(self.num_layers):
            columns = self.input_size if layer == 0 else self.hidden_size
            shapes: dict[str, tuple] = {
                "weight_ih": (rows, columns),
                "weight_hh": (rows, self.hidden_size),
            }
            if self.bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for key, shape in shapes.items():
                values = random.uniform(-bound, bound, shape)
                params[f"{key}_l{layer}"] = values.astype(self.dtype)
        self._own(params)
        self._seeds = np.random.default_rng(random.integers(2**63))

    def _kind(self) -> tuple:
        """What two layers share if one can work on what the other has saved."""
        return self.cell.name, self.input_size, self.hidden_size, self.num_layers, self.dtype

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.input_size}, {self.hidden_size}, "
            f"num_layers={self.num_layers}, dtype={self.dtype})"
        )

    def __call__(
        self, x: Any, state: State = None, lengths: Any = None, *, vectors: Any = None
    ) -> tuple[np.ndarray, State]:
        """Run over a sequence and keep nothing: `(output, state)`; see `forward`."""
        output, state, _ = self._forward(x, state, lengths, vectors, keep=False, seed=None)
        return output, state

    def forward(
        self,
        x: Any,
        state: State = None,
        lengths: Any = None,
        *,
        vectors: Any = None,
        seed: int | None = None,
    ) -> tuple[np.ndarray, State, Saved]:
        """Run over a sequence for training.

        x       (T, B, input_size), or (B, T, input_size) with batch_first; or integers (T, B):
                tokens below input_size, as if one-hot. Without the B axis: one sequence.
        state   initial state, (num_layers, B, H), for the LSTM a pair (h, c); zeros by default
        vectors (V, input_size): x are tokens below V, and the input is vectors[x], which is never
                made: V products instead of T*B. The same bits as with vectors[x]; d_x is then the
                gradient of vectors, which like that of weight_ih is summed up by token first
        seed    of the dropout masks; drawn by the layer if it is not given
        Returns output (T, B, H), the final state, and what `backward` needs. The output is
        read-only, x and vectors must not change until then: backward reads them.
        """
        return self._forward(x, state, lengths, vectors, keep=True, seed=seed)

    def _forward(
        self, x: Any, state: State, lengths: Any, vectors: Any, *, keep: bool, seed: int | None
    ) -> tuple[np.ndarray, State, Any]:
        if lengths is not None:
            raise ValueError(
                "lengths: expected None; not there yet: call once for each group of equal length"
            )
        self.check_params()
        if vectors is not None:
            names = "(V, input_size)"
            vectors = as_floats("vectors", vectors, self.dtype, (None, self.input_size), names)
        x, unbatched = self._input(x, vectors)
        if keep and x.dtype == np.int32:
            # Backward writes where the tokens say: they must still be the ones that were checked.
            x = x.copy()
        steps, batch = x.shape[:2]
        states = self._initial(state, batch, unbatched)
        seed = as_seed(seed)
        if keep and self.dropout and self.num_layers > 1 and seed is None:
            seed = int(self._seeds.integers(2**63))
        saved = []
        for layer in range(self.num_layers):
            if layer and keep and self.dropout:
                dropped = empty(x.shape, self.dtype)
                dropout(x, self.dropout, (seed or 0) + layer, dropped)
                x = dropped
            done = self._run_layer(layer, x, vectors, [s[layer] for s in states], keep)
            done.seed = (seed or 0) + layer
            saved.append(done)
            x, vectors = done.h[1:], None
        run_length = padded(self.hidden_size, self.dtype)
        last = [np.array([s.h[steps] for s in saved])]
        for i in range(self.cell.carries):
            at = slice(i * run_length, i * run_length + self.hidden_size)
            last.append(np.array([s.carry[-1, :, at] for s in saved]))
        tokens = saved[0].x.dtype == np.int32
        result = Saved(self._kind(), saved, tokens, unbatched) if keep else None
        output = self._outward(x, unbatched)
        # Backward reads the same memory.
        output.flags.writeable = not keep
        return output, self._state_out(last, unbatched), result

    def _run_layer(
        self, layer: int, x: np.ndarray, vectors: np.ndarray | None, states: list, keep: bool
    ) -> _Saved:
        cell, size, dtype = self.cell, self.hidden_size, self.dtype
        steps, batch = x.shape[:2]
        hidden = padded(size, dtype)
        tokens = x.dtype == np.int32
        inputs = 0 if tokens else self.params[f"weight_ih_l{layer}"].shape[1]
        work = steps * batch * cell.gates * hidden * (size + inputs)
        row = cell.tape * hidden
        meet = parts_of_units(cell, steps, batch, size, dtype)
        if meet > 1:
            rows, columns = batch, row // meet
        else:
            parts = parts_for(work, batch)
            rows, columns = -(-batch // parts), row
        chunk = max(_CHUNK_BYTES // (rows * columns * dtype.itemsize), gemm.HEIGHT // rows)
        chunk = max(1, min(steps, chunk))
        h = empty((steps + 1, batch, size), dtype)
        h[0] = states[0]
        carry = empty((steps + 1 if keep else 1, batch, cell.carries * hidden), dtype)
        carry[0] = 0
        for i, value in enumerate(states[1:]):
            carry[0, :, i * hidden : i * hidden + size] = value
        tape = empty((steps if keep else chunk, batch, row), dtype)
        packed, packed_h, bias = self._pack(layer, tokens, meet > 1, vectors)
        arguments = (cell, cell.tail, chunk, int(keep), x, packed, packed_h, bias, h, carry, tape)
        if meet > 1:
            together(recurrence.forward_slice, meet, *arguments)
        else:
            run(recurrence.forward_slice, parts, NOBODY, *arguments)
        # A view, since backward relies on the shape.
        return _Saved(x, h, carry, tape, None if vectors is None else vectors.view(), 0)

    def _pack(
        self, layer: int, tokens: bool, apart: bool, vectors: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """W_x, W_h and the bias of a layer as its kernels take them."""
        key = layer, tokens, apart
        kept = self._packed if vectors is None else None
        if kept is not None and key in kept:
            return kept[key]
        cell = self.cell
        w_x, w_h = self.params[f"weight_ih_l{layer}"], self.params[f"weight_hh_l{layer}"]
        b_x, b_h = self.params.get(f"bias_ih_l{layer}"), self.params.get(f"bias_hh_l{layer}")
        bias = pack_bias(cell, self.hidden_size, self.dtype, b_x, b_h)
        if vectors is None:
            packed = pack_transposed(w_x, cell.order_x, rows=tokens, apart=apart and not tokens)
        else:
            packed = pack_vectors(w_x, cell.order_x, bias, vectors)
        found = packed, pack_transposed(w_h, cell.order_h, apart=apart), bias
        if kept is not None:
            kept[key] = found
        return found

    def training_bytes(self, steps: int, batch: int) -> int:
        """Bytes that `forward` and `backward` take at most, for features of (steps, batch, I).

        To a few per cent where there are many steps: arrays of the size of a state are not counted.

        Beside x, d_output and `params`: what the layers save (see `Saved.nbytes`) and the dropped
        out copies between them; the gradients of all parameters; and, kept from step to step, the
        packed weights, d_x and the gradient from the layer above, of one layer at a time, and some
        pieces for each thread.
        """
        steps, batch = as_size("steps", steps), as_size("batch", batch)
        cell, size, layers = self.cell, self.hidden_size, self.num_layers
        hidden = padded(size, self.dtype)
        rows, count = cell.gates * hidden, steps * batch
        saved = batch * (steps * cell.tape * hidden + (steps + 1) * (size + cell.carries * hidden))
        dropped = count * size * (layers - 1) if self.dropout else 0
        # Of arrays of one size as many as are in use at the same time.
        kept: Counter[int] = Counter()
        pieces = 0
        for layer in range(layers):
            inputs = self.input_size if layer == 0 else size
            kept |= Counter([rows * inputs, rows * size])
            packed = [rows * padded(n, self.dtype) for n in (inputs, size)]
            above = [count * size] if layer < layers - 1 else []
            kept |= Counter([*packed, count * inputs, *above])
            pieces = max(pieces, gemm.scratch_size(inputs, size, self.dtype))
        params = sum(value.size for value in self.params.values())
        numbers = (
            layers * saved
            + dropped
            + params
            + sum(n * times for n, times in kept.items())
            + get_num_threads() * pieces
        )
        return self.dtype.itemsize * numbers

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
        steps, batch = saved.shape[0] - 1, saved.shape[1]
        d_states = self._initial(d_state, batch, saved.unbatched, name="d_state")
        if d_output is None:
            d_y = np.zeros((1, 1, self.hidden_size), self.dtype)
        else:
            d_y = self._gradient_in(d_output, steps, batch, saved.unbatched)
        layers = saved.take(retain)
        d_initial = [np.empty_like(s) for s in d_states]
        for layer in reversed(range(self.num_layers)):
            s = layers[layer]
            want = need_d_x or layer > 0
            found = self._run_backward(layer, s, d_y, [d[layer] for d in d_states], grads, want)
            d_y, last = found
            for total, value in zip(d_initial, last, strict=True):
                total[layer] = value
            if layer and self.dropout:
                dropout(d_y, self.dropout, s.seed, d_y)
        d_x = None
        if need_d_x and layers[0].vectors is not None:
            d_x = d_y
        elif need_d_x and not saved.token_input:
            d_x = self._outward(d_y, saved.unbatched)
        return d_x, self._state_out(d_initial, saved.unbatched), grads

    def _run_backward(
        self, layer: int, s: _Saved, d_y: np.ndarray, d_last: list, grads: Params, want_d_x: bool
    ) -> tuple[np.ndarray, list]:
        cell, size, dtype = self.cell, self.hidden_size, self.dtype
        steps, batch = s.x.shape[:2]
        hidden = padded(size, dtype)
        tokens = s.x.dtype == np.int32
        weight_x, weight_h = self.params[f"weight_ih_l{layer}"], self.params[f"weight_hh_l{layer}"]
        inputs = weight_x.shape[1]
        d_h = np.zeros((batch, hidden), dtype)
        d_h[:, :size] = d_last[0]
        d_carry = np.zeros((batch, cell.carries * hidden), dtype)
        for i, value in enumerate(d_last[1:]):
            d_carry[:, i * hidden : i * hidden + size] = value
        work = steps * batch * cell.gates * hidden * size
        packed = pack(weight_h, cell.order_h, hidden)
        arguments = (cell, cell.tail, d_y, packed, s.h, s.carry, s.tape, d_h, d_carry)
        meet = parts_of_units(cell, steps, batch, size, dtype)
        if meet > 1:
            together(recurrence.backward_slice, meet, *arguments)
        else:
            parts = parts_for(work, batch)
            run(recurrence.backward_slice, parts, NOBODY, *arguments)
        d_w_x = grads[f"weight_ih_l{layer}"]
        unused = np.zeros(len(weight_x), dtype)
        d_b_x = grads.get(f"bias_ih_l{layer}", unused)
        d_b_h = grads.get(f"bias_hh_l{layer}", unused if tokens else unused.copy())
        gates = (cell.gates, size)
        order = list(cell.order_x)
        if tokens:
            count = inputs if s.vectors is None else len(s.vectors)
            rows = zeros((count, cell.gates, hidden), dtype)
            if s.vectors is None:
                rows[:, :, :size] = d_w_x.reshape(*gates, inputs)[order].transpose(2, 0, 1)
            sums = np.zeros((cell.gates, hidden), dtype)
            sums[:, :size] = d_b_x.reshape(gates)[order]
            d_x = np.empty((0, inputs), dtype)
            x_arguments = (rows.reshape(count, -1), sums.reshape(-1))
        else:
            d_x = empty((steps * batch if want_d_x else 0, inputs), dtype)
            x_arguments = (d_w_x, d_b_x)
        packed = pack(weight_x, cell.order_x, hidden) if want_d_x and not tokens else d_h[0]
        run(
            recurrence.gradients,
            parts_for(work, cell.gates * hidden // lanes(dtype)),
            cell.tail,
            s.x,
            s.h,
            s.tape,
            indices(cell.order_x),
            indices(cell.order_h),
            packed,
            np.zeros(inputs, dtype),
            d_x,
            x_arguments[0],
            grads[f"weight_hh_l{layer}"],
            x_arguments[1],
            d_b_h,
        )
        if tokens:
            if s.vectors is None:
                d_w_x.reshape(*gates, inputs)[order] = rows[:, :, :size].transpose(1, 2, 0)
            else:
                d_x = self._gradient_of_vectors(
                    s.vectors, x_arguments[0], weight_x, d_w_x, want_d_x
                )
            d_b_x.reshape(gates)[order] = sums[:, :size]
        first = [d_h[:, :size]]
        first += [d_carry[:, i * hidden : i * hidden + size] for i in range(cell.carries)]
        return d_x.reshape(steps, batch, inputs) if want_d_x and not tokens else d_x, first

    def _gradient_of_vectors(
        self,
        vectors: np.ndarray,
        d_table: np.ndarray,
        weight_x: np.ndarray,
        d_w_x: np.ndarray,
        want: bool,
    ) -> np.ndarray:
        """The gradient of vectors, from that of their products with W_x; adds to that of W_x."""
        cell, dtype = self.cell, self.dtype
        (count, n), inputs = d_table.shape, vectors.shape[1]
        hidden = n // cell.gates
        d_vectors = empty((count if want else 0, inputs), dtype)
        same_order = d_w_x.shape[0] == n and cell.order_x == tuple(range(cell.gates))
        d_w = d_w_x if same_order else zeros((n, inputs), dtype)
        run(
            gemm.affine_gradients,
            parts_for(count * n * inputs, n // lanes(dtype)),
            vectors[None],
            d_table[None],
            pack(weight_x, cell.order_x, hidden) if want else np.zeros(inputs, dtype),
            np.zeros(inputs, dtype),
            d_vectors,
            d_w,
            np.zeros(n, dtype),
        )
        if not same_order:
            found = d_w.reshape(cell.gates, hidden, inputs)[:, : self.hidden_size]
            d_w_x.reshape(cell.gates, self.hidden_size, inputs)[list(cell.order_x)] += found
        return d_vectors

    def stepper(self, batch: int | None = None, *, tokens: bool = False) -> Stepper:
        """The layers one step at a time, with the state kept: `y = stepper(x)`; see `Stepper`.

        batch   how many sequences; None: one, without the B axis
        tokens  inputs are integer tokens instead of features
        """
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
        shape: tuple = (steps, batch, self.hidden_size)
        names = "(T, B, H)"
        if unbatched:
            shape, names = (steps, self.hidden_size), "(T, H)"
        elif self.batch_first:
            shape, names = (batch, steps, self.hidden_size), "(B, T, H)"
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
        shape = (self.num_layers, batch, self.hidden_size)
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
                wanted = (self.num_layers, self.hidden_size)
                array = as_floats(label, value, self.dtype, wanted, "(layers, H)")[:, None]
            else:
                array = as_floats(label, value, self.dtype, shape, "(layers, B, H)")
            found.append(array)
        return found

    def _state_out(self, parts: list[np.ndarray], unbatched: bool) -> State:
        if unbatched:
            parts = [part[:, 0] for part in parts]
        return parts[0] if len(parts) == 1 else tuple(parts)


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
    """Gated recurrent unit, Cho et al. (2014, arXiv:1406.1078v1), reset after the product.

    Arguments, shapes, gate order r, z, n and parameter keys are those of `torch.nn.GRU`. dtype is
    float32 or float64; `seed` draws the initial weights, U(-1/sqrt(H), 1/sqrt(H)).
    """

    cell = CELLS["gru"]


class LSTM(_Recurrent):
    """Long short-term memory, Hochreiter and Schmidhuber (1997) with Gers' forget gate (2000).

    Arguments, shapes, gate order i, f, g, o and parameter keys are those of `torch.nn.LSTM`. dtype
    is float32 or float64; `seed` draws the initial weights, U(-1/sqrt(H), 1/sqrt(H)).
    """

    cell = CELLS["lstm"]
    state_names = ("h", "c")
