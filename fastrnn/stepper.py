"""One step at a time, with the state kept: for streams, control loops and sampling.

All layers of a stack take a step inside one call. What a call needs is bound beforehand: weights
packed, memory laid out, the compiled function looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import carray

from fastrnn.axes import Axes
from fastrnn.cells.cell import (
    Cell,
    into_of,
    late_of,
    normed_carry_of,
    normed_of,
    of_h,
    of_x,
    operand_of,
    projected_of,
    tail_of,
    tape_of,
)
from fastrnn.checks import as_array, as_floats, as_tokens, check_in_place, check_shape
from fastrnn.crew import divided
from fastrnn.gemm import scratch
from fastrnn.jit import helper, kernel
from fastrnn.meeting import NOBODY, arrive, wait
from fastrnn.memory import empty
from fastrnn.noise import expected, mixed
from fastrnn.norm import normalise, normalise_carry
from fastrnn.pack import Packed, pack_layer
from fastrnn.parallel import parts_for, run
from fastrnn.row import fill_tail, first_half, gather_input, project, second_half
from fastrnn.simd import (
    at,
    broadcast,
    flush_denormals,
    lanes,
    load_n,
    padded,
    pointer_to,
    restore_denormals,
    store_n,
    width_of,
)
from fastrnn.units import multiply_units


def bind(
    cell: Cell,
    layers: list[Sequence[np.ndarray | None]],
    tokens: bool,
    *,
    table: np.ndarray | None = None,
    apart: bool = False,
) -> Packed:
    """What `advance` takes, from the arrays of each layer that `pack_layer` takes.

    tokens  the first layer takes tokens; with `table` (V, I), they stand for its rows
    apart   for slices of the units
    Returns all values one after the other, and the places of each layer: (layers, 8).
    """
    packed = []
    for layer, weights in enumerate(layers):
        first = {"tokens": tokens, "table": table} if layer == 0 else {"tokens": False}
        packed.append(pack_layer(cell, *weights, apart=apart, **first))  # type: ignore[arg-type]
    # All begin on a register boundary: they are whole registers.
    values = empty(sum(p.values.size for p in packed), packed[0].values.dtype)
    np.concatenate([p.values for p in packed], out=values)
    places = np.array([p.places for p in packed], np.int64)
    ends = np.cumsum([p.values.size for p in packed])
    places[1:, 1:] += ends[:-1, None]
    return Packed(values, places)


@helper
def advance(
    cell, size, fresh, values, places, x, tokens, h, h_new, carry, s, columns, first, rows,
    low, high, meeting, part, parts, done,
):  # fmt: skip
    """Take units [low, high) of sequences [first, first + rows) through all layers.

    fresh    how much of a new h counts, if zoneout is expected; or None
    x        at (rows, I), what the first layer takes unless places has tokens for it
    tokens   (B,)
    h, h_new (layers, B, H), before and after; the same array if the part has all units; with a
             projection (layers, B, P), and H is `size`
    carry    (layers, B, carries*Hp), before and after
    s        at (rows, columns), scratch; columns is tape*Hp
    done     how often the parts have met; returns how often after
    """
    layers, batch, breadth = h.shape
    w = width_of(h)
    run = (size + w - 1) // w * w
    end = min(high, size)
    was = h[0, 0] if fresh is None else scratch(h, rows * breadth)
    apart = meeting.size > 0
    together = apart and parts > 1
    for layer in range(layers):
        here = (layer * batch + first) * breadth
        width = places[layer, 0]
        w_x, w_h = at(values, places[layer, 1]), at(values, places[layer, 2])
        bias, v = at(values, places[layer, 4]), at(values, places[layer, 5])
        for r in range(rows):
            fill_tail(cell, low, high, run, bias, at(s, r * columns))
        if width == 0:
            for r in range(rows):
                token = tokens[first + r]
                gather_input(cell, low, high, run, w_x, token, bias, at(s, r * columns))
        else:
            below = x if layer == 0 else at(h_new, here - batch * breadth)
            multiply_units(
                apart, of_x(cell), run, low, high, 1, rows, width,
                below, width, 0, w_x, bias, 0, s, columns, 0,
            )  # fmt: skip
        if normed_of(cell) == 1:
            for r in range(rows):
                normalise(at(s, r * columns), of_x(cell), size, run)
        into = at(s, tail_of(cell) * run)
        multiply_units(
            apart, of_h(cell), run, low, high, 1, rows, breadth,
            at(h, here), breadth, 0, w_h, into, columns, into, columns, 0,
        )  # fmt: skip
        if fresh is not None:
            # The new h may overwrite the old one.
            for u in range(0, was.size, w):
                store_n(was, u, load_n(h, here + u, was.size - u), was.size - u)
        for r in range(rows):
            unit = here + r * breadth
            carried = (layer * batch + first + r) * carry.shape[2]
            row = at(s, r * columns)
            if normed_of(cell) == 1:
                normalise(at(row, tail_of(cell) * run), of_h(cell), size, run)
            first_half(cell, low, end, size, run, h, unit, v, row, carry, carried, carried)
            if normed_carry_of(cell) == 1:
                normalise_carry(cell, row, size, run, carry, carried)
            if late_of(cell) == 0:
                second_half(cell, low, end, size, run, h, unit, h_new, unit, v, row, carry, carried)
        if late_of(cell) == 1:
            if together:
                done += 1
                arrive(meeting, part, done)
                wait(meeting, parts, done)
            m, into = at(s, operand_of(cell) * run), at(s, into_of(cell) * run)
            multiply_units(
                apart, 1, run, low, high, 1, rows, size,
                m, columns, 0, at(values, places[layer, 3]), into, columns, into, columns, 0,
            )  # fmt: skip
            for r in range(rows):
                unit = here + r * breadth
                carried = (layer * batch + first + r) * carry.shape[2]
                row = at(s, r * columns)
                second_half(cell, low, end, size, run, h, unit, h_new, unit, v, row, carry, carried)
        if projected_of(cell) == 1:
            project(cell, rows, size, columns, s, values, places[layer], h_new, here)
        if fresh is not None:
            last = min(high, breadth)
            for r in range(rows):
                for u in range(low, last, w):
                    unit = here + r * breadth + u
                    old = load_n(was, r * breadth + u, last - u)
                    new = load_n(h_new, unit, last - u)
                    store_n(h_new, unit, mixed(broadcast(h, fresh), new, old), last - u)
        if together:
            done += 1
            arrive(meeting, part, done)
            wait(meeting, parts, done)
    return done


# What `where` of `_step` has: addresses of the arrays of `advance`, and sizes.
_VALUES, _PLACES, _H, _CARRY, _S, _COUNT, _LAYERS, _BATCH, _WIDTH, _CARRIED, _SIZE = range(11)


@kernel
def _step(part, parts, cell, fresh, where, x, tokens, out):
    """One step of a slice of the sequences; out (B*H) receives the last layer's h.

    Few arguments, since each array costs as much as a small product.
    """
    if divided(part, parts):
        return
    mode = flush_denormals()
    layers, batch, width, size = where[_LAYERS], where[_BATCH], where[_WIDTH], where[_SIZE]
    values = carray(pointer_to(out, where[_VALUES]), where[_COUNT])
    places = carray(pointer_to(where, where[_PLACES]), (layers, 8))
    h = carray(pointer_to(out, where[_H]), (layers, batch, width))
    carry = carray(pointer_to(out, where[_CARRY]), (layers, batch, where[_CARRIED]))
    w = width_of(out)
    run = (size + w - 1) // w * w
    columns = tape_of(cell) * run
    first = batch * part // parts
    rows = batch * (part + 1) // parts - first
    s = at(pointer_to(out, where[_S]), first * columns)
    inputs = x.size // batch
    advance(
        cell, size, fresh, values, places, at(x, first * inputs), tokens, h, h, carry, s, columns,
        first, rows, 0, run, NOBODY, part, parts, 0,
    )  # fmt: skip
    top, count = ((layers - 1) * batch + first) * width, rows * width
    for u in range(0, count, w):
        store_n(out, first * width + u, load_n(h, top + u, count - u), count - u)
    restore_denormals(mode)


class Stepper:
    """Takes a stack of layers one step at a time; made by `LSTM.stepper` and its like.

    `stepper(x)` is one step: x (B, input_size), or (input_size,) if it was made without a batch;
    with `tokens`, integers (B,) or one. The result is the last layer's output, (B, H) or (H,): a
    new array, or `out`, which is then all that is written beside the state. Outputs and state have
    the same bits as those of the layer. `reset` begins anew, also for some sequences only.

    Weights are those of the moment it was made; `refresh` takes over later ones. A stepper must not
    be used by two threads at once; make one for each.
    """

    def __init__(self, layer: Any, batch: int | None, tokens: bool) -> None:
        self._layer = layer
        self._unbatched = batch is None
        self._tokens = tokens
        self.dtype = layer.dtype
        cell, size, width = layer.cell, layer.hidden_size, layer.state_sizes[0]
        count = 1 if batch is None else batch
        self._count = count
        self._run = padded(size, self.dtype)
        self._h = np.zeros((layer.num_layers, count, width), self.dtype)
        self._carry = np.zeros((layer.num_layers, count, cell.carries * self._run), self.dtype)
        self._s = empty(count * cell.tape * self._run, self.dtype)
        self._x_shape: tuple[int, ...] = () if tokens else (layer.input_size,)
        self._out_shape: tuple[int, ...] = (width,)
        if batch is not None:
            self._x_shape, self._out_shape = (batch, *self._x_shape), (batch, width)
        # Tokens are always looked at closely.
        self._x_dtype = None if tokens else self.dtype
        self._cell = cell
        self._no_tokens = np.zeros(count, np.int32)
        self._no_x = np.zeros(count, self.dtype)
        self.refresh()
        self.state = None

    def refresh(self) -> None:
        """Take over the weights that the layer has now; the state stays."""
        layer, cell = self._layer, self._layer.cell
        layer.check_params()
        layers = [layer._weights(i, layer.params)[0][:6] for i in range(layer.num_layers)]
        # What a state begins with belongs to the weights.
        self._first = layer._initial(None, Axes(1, self._count, False, False))
        fresh = expected(layer.zoneout, self.dtype)
        self._use(bind(cell, layers, self._tokens), fresh)

    def _use(self, bound: Packed, fresh: np.floating | None) -> None:
        arrays = (*bound, self._h, self._carry, self._s)
        sizes = (bound.values.size, *self._h.shape, self._carry.shape[2], self._layer.hidden_size)
        where = np.array([*(array.ctypes.data for array in arrays), *sizes], np.int64)
        inputs = (self._no_x, self._no_tokens, self._no_x)
        example = (0, 1, self._layer.cell, fresh, where, *inputs)
        # The compiled function itself: nothing is looked up in a call.
        compiled = _step.compile(tuple(numba.typeof(argument) for argument in example))
        # Of a table of tokens a sequence reads one row.
        table = self._layer.params["weight_ih_l0"].size if self._tokens else 0
        work = self._count * (bound.values.size - table)
        # At once, since an interrupt must not part addresses from the arrays that they are of.
        self._ready = (compiled, where, work, bound, fresh)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has arrays of its own, and so other addresses.
        return {**vars(self), "_ready": self._ready[3:], "_lanes": lanes(self.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        here = lanes(state["dtype"])
        if state.pop("_lanes") != here:
            raise ValueError(
                f"stepper: expected one from a CPU with {here} {state['dtype']} in a register, as "
                "here, got one from another; make it again with layer.stepper()"
            )
        vars(self).update(state)
        self._use(*state["_ready"])

    def __call__(self, x: Any, out: np.ndarray | None = None) -> np.ndarray:
        """One step; see the class."""
        # The usual array is known at a glance; any other is looked at closely.
        if not (
            type(x) is np.ndarray
            and x.dtype is self._x_dtype
            and x.shape == self._x_shape
            and x.flags.carray
        ):
            x = self._checked(x)
        if out is None:
            out = np.empty(self._out_shape, self.dtype)
        elif not (
            type(out) is np.ndarray
            and out.dtype is self.dtype
            and out.shape == self._out_shape
            and out.flags.carray
        ):
            check_in_place("out", out, self.dtype, self._out_shape)
        tokens = self._no_tokens
        if self._tokens:
            x, tokens = self._no_x, x
        elif x.ndim > 1:
            x = x.reshape(-1)
        flat = out if self._unbatched else out.reshape(-1)
        compiled, where, work, _, fresh = self._ready
        parts = 1 if self._count == 1 else parts_for(work, self._count)
        if parts == 1:
            compiled(0, 1, self._cell, fresh, where, x, tokens, flat)
        else:
            run(_step, parts, self._cell, fresh, where, x, tokens, flat)
        return out

    def _checked(self, x: Any) -> np.ndarray:
        array = as_array("x", x)
        if self._tokens:
            names = "()" if self._unbatched else "(B,)"
            return np.atleast_1d(
                as_tokens("x", array, self._layer.input_size, self._x_shape, names)
            )
        names = "(I,)" if self._unbatched else "(B, I)"
        return as_floats("x", array, self.dtype, self._x_shape, names)

    @property
    def state(self) -> Any:
        """A copy of the state, as the layer takes and returns it; assign one, or None to begin."""
        size, run = self._layer.hidden_size, self._run
        parts = [self._h.copy()]
        for i in range(self._layer.cell.carries):
            parts.append(self._carry[:, :, i * run : i * run + size].copy())
        return self._layer._state_out(parts, self._unbatched)

    @state.setter
    def state(self, state: Any) -> None:
        axes = Axes(1, self._count, False, self._unbatched)
        self._put(self._first if state is None else self._layer._initial(state, axes))

    def reset(self, mask: Any = None) -> None:
        """Begin anew where the mask is True, as `state = None` does for all.

        mask   (B,) booleans, without a batch one; None: all
        That is with the learned state if there is one; `resets` of the layer go on from zeros.
        """
        if mask is None:
            self._put(self._first)
            return
        array = as_array("mask", mask)
        if array.dtype != bool:
            raise TypeError(f"mask: expected booleans, got {array.dtype}; write .astype(bool)")
        shape, names = ((), "()") if self._unbatched else ((self._count,), "(B,)")
        check_shape("mask", array, shape, names)
        self._put(self._first, array.reshape(-1))

    def _put(self, parts: list[np.ndarray], chosen: Any = slice(None)) -> None:
        """The state of the chosen sequences, from that of all."""
        size, run = self._layer.hidden_size, self._run
        self._h[:, chosen] = parts[0][:, chosen]
        for i, value in enumerate(parts[1:]):
            self._carry[:, chosen, i * run : i * run + size] = value[:, chosen]
