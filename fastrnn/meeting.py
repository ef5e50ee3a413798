"""Where threads that work on one step of a sequence wait for each other, inside a kernel.

A meeting is an array of int64, a line of the cache for each part and one more. A part's number is 0
before it has come, 1 when it has, GONE if it must not come any more; from when all have come on it
is 2 and the steps that the part has done. The last number is 1 when there is nothing to wait for:
the first part does it all, or one has failed. A kernel that is given an empty array meets nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from fastrnn.jit import helper, intrinsic
from fastrnn.parallel import launch
from fastrnn.simd import machine

_APART = 8
GONE = -1
# Looks at another's number before the processor is offered to others between two looks, some tens
# of microseconds; and looks after which a part that has not come is not waited for, milliseconds.
_EAGER = 1000
_PATIENT = 5000
# What offers the processor to others.
_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"

NOBODY = np.empty(0, np.int64)


def together(function: Callable, parts: int, *arguments: Any) -> None:
    """Call the kernel `function(part, parts, meeting, *arguments)` for all parts at the same time.

    It has to `gather` first, since there may be fewer parts; then all of them are there.
    """
    place = np.zeros((parts + 1) * _APART, np.int64)

    def dismiss() -> None:
        place[-_APART] = 1

    launch(function, parts, (place, *arguments), dismiss)


def _pointer(builder: Any, context: Any, sig: Any, args: Any) -> Any:
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _look(typingctx, place, index):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(_pointer(builder, context, sig, args), "acquire", 8)

    return types.int64(place, types.intp), codegen


@intrinsic
def _say(typingctx, place, index, number):
    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, context, sig, args)
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(place, types.intp, types.int64), codegen


@intrinsic
def _claim(typingctx, place, index, number):
    """Put a number where 0 is; whether it was."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, context, sig, args)
        zero = ir.Constant(args[2].type, 0)
        done = builder.cmpxchg(pointer, zero, args[2], "acq_rel", "acquire")
        return builder.extract_value(done, 1)

    return types.boolean(place, types.intp, types.int64), codegen


@intrinsic
def _rest(typingctx, looks):
    """Between two looks: a moment, or, after many looks, others' turn."""

    def codegen(context, builder, sig, args):
        eager = builder.icmp_signed("<", args[0], ir.Constant(args[0].type, _EAGER))
        with builder.if_else(eager) as (soon, later):
            with soon:
                if machine().x86:
                    kind = ir.FunctionType(ir.VoidType(), [])
                    name = "llvm.x86.sse2.pause"
                    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
            with later:
                kind = ir.FunctionType(ir.IntType(32), [])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@helper
def gather(place, part, parts):
    """Come together: how many parts there are, 1 if the first is to do it all, 0 for who leaves."""
    if not _claim(place, part * _APART, 1):
        return 0
    last = place.size - _APART
    if part > 0:
        looks = 0
        # The first decides.
        while _look(place, 0) < 2:
            if _look(place, last):
                return 0
            _rest(looks)
            looks += 1
        _say(place, part * _APART, 2)
        return parts
    looks = 0
    for other in range(1, parts):
        while _look(place, other * _APART) == 0:
            if looks == _PATIENT and _claim(place, other * _APART, GONE):
                _say(place, last, 1)
                return 1
            _rest(looks)
            looks += looks < _PATIENT
    _say(place, 0, 2)
    return parts


@helper
def arrive(place, part, steps):
    """Say that this part has done so many steps."""
    _say(place, part * _APART, steps + 2)


@helper
def wait(place, parts, steps):
    """Wait until all have done so many steps, or one has failed."""
    last = place.size - _APART
    for other in range(parts):
        looks = 0
        while _look(place, other * _APART) < steps + 2 and not _look(place, last):
            _rest(looks)
            looks += 1
