"""The machine: `Vec`, one SIMD register of floats as a Numba type, and how many the CPU has.

Everything above works in `Vec`s of `lanes(dtype)` numbers. Loads and stores take an array (or a
pointer, see `at`) and an offset in elements and are never bounds-checked; the `_n` forms touch the
first `n` lanes only (the other lanes read as zero and are not written).
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.core.imputils import lower_builtin
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from fastrnn.jit import intrinsic

_PROBE = """
target triple = "{triple}"
define void @f(ptr %a, ptr %b) {{
  %x = load <16 x float>, ptr %a
  %y = load <16 x float>, ptr %b
  %z = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %y, <16 x float> %y)
  store <16 x float> %z, ptr %a
  ret void
}}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
"""


class Machine(NamedTuple):
    """What the code generator will use on this CPU."""

    cpu: str
    width: int  # bytes of a SIMD register
    registers: int
    fma: bool
    x86: bool


@functools.cache
def machine() -> Machine:
    """The CPU that Numba compiles for, found by asking LLVM.

    `NUMBA_CPU_NAME` alone leaves Numba with the features of the host; here it means that CPU. With
    `NUMBA_CPU_FEATURES=` (empty) beside it, LLVM keeps to that CPU's instructions as well.
    """
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    if config.CPU_NAME and config.CPU_FEATURES is None:
        features = ""
    target = llvm.Target.from_triple(triple)
    target_machine = target.create_target_machine(cpu=cpu, features=features, opt=2)
    code = target_machine.emit_assembly(llvm.parse_assembly(_PROBE.format(triple=triple)))
    x86 = "86" in triple.split("-")[0]
    if not x86:
        return Machine(cpu, 16, 32, "fmla" in code, False)
    width = 64 if "zmm" in code else 32 if "ymm" in code else 16
    return Machine(cpu, width, 32 if width == 64 else 16, "vfmadd" in code, True)


@functools.cache
def lanes(dtype: Any) -> int:
    """How many numbers of `dtype` a register holds."""
    return machine().width // np.dtype(dtype).itemsize


def padded(size: int, dtype: Any) -> int:
    """`size` rounded up to whole registers."""
    return -(-size // lanes(dtype)) * lanes(dtype)


class Vec(types.Type):
    """A SIMD register of `lanes` numbers of `dtype`."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = machine().width * 8 // dtype.bitwidth
        super().__init__(name=f"Vec({dtype} x {self.lanes})")

    @property
    def element(self) -> ir.Type:
        return ir.FloatType() if self.dtype.bitwidth == 32 else ir.DoubleType()

    @property
    def integer(self) -> ir.VectorType:
        return ir.VectorType(ir.IntType(self.dtype.bitwidth), self.lanes)

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(self.element, self.lanes)

    @property
    def suffix(self) -> str:
        return f"v{self.lanes}f{self.dtype.bitwidth}"


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vec: Vec) -> None:
        super().__init__(manager, vec, vec.llvm)


# ---- pieces of LLVM code, shared with the product kernel


def address(context: Any, builder: ir.IRBuilder, array: Any, value: Any, offset: Any) -> Any:
    """Pointer to element `offset` of an array, or past a pointer."""
    if isinstance(array, types.CPointer):
        return builder.gep(value, [offset])
    return builder.gep(context.make_array(array)(context, builder, value).data, [offset])


def splat(builder: ir.IRBuilder, vec: Vec, scalar: Any) -> Any:
    """`scalar` in every lane."""
    undefined = ir.Constant(vec.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vec.lanes), [0] * vec.lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def read(builder: ir.IRBuilder, vec: Vec, pointer: Any) -> Any:
    """Load a register from memory aligned to one number."""
    return builder.load(
        builder.bitcast(pointer, vec.llvm.as_pointer()), align=vec.dtype.bitwidth // 8
    )


def write(builder: ir.IRBuilder, vec: Vec, value: Any, pointer: Any) -> None:
    """Store a register to memory aligned to one number."""
    builder.store(
        value, builder.bitcast(pointer, vec.llvm.as_pointer()), align=vec.dtype.bitwidth // 8
    )


def first_lanes(builder: ir.IRBuilder, vec: Vec, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    i32 = ir.IntType(32)
    numbers = ir.VectorType(i32, vec.lanes)
    wanted = builder.insert_element(
        ir.Constant(numbers, ir.Undefined), builder.trunc(count, i32), ir.Constant(i32, 0)
    )
    zeros = ir.Constant(numbers, [0] * vec.lanes)
    wanted = builder.shuffle_vector(wanted, ir.Constant(numbers, ir.Undefined), zeros)
    return builder.icmp_signed("<", ir.Constant(numbers, list(range(vec.lanes))), wanted)


def _masked(builder: ir.IRBuilder, vec: Vec, name: str, result: Any, arguments: list) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.masked.{name}.{vec.suffix}.p0"
    )
    return builder.call(function, arguments)


def read_masked(builder: ir.IRBuilder, vec: Vec, pointer: Any, mask: Any) -> Any:
    """Load the lanes of `mask`; the others are zero and their memory is not touched."""
    align = ir.Constant(ir.IntType(32), vec.dtype.bitwidth // 8)
    pointer = builder.bitcast(pointer, vec.llvm.as_pointer())
    zero = ir.Constant(vec.llvm, None)
    return _masked(builder, vec, "load", vec.llvm, [pointer, align, mask, zero])


def write_masked(builder: ir.IRBuilder, vec: Vec, value: Any, pointer: Any, mask: Any) -> None:
    """Store the lanes of `mask`; the memory of the others is not touched."""
    align = ir.Constant(ir.IntType(32), vec.dtype.bitwidth // 8)
    pointer = builder.bitcast(pointer, vec.llvm.as_pointer())
    _masked(builder, vec, "store", ir.VoidType(), [value, pointer, align, mask])


def multiply_add(builder: ir.IRBuilder, vec: Vec, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`: fused where the CPU can; there LLVM would otherwise call libm for each lane."""
    if not machine().fma:
        return builder.fadd(builder.fmul(a, b), c)
    kind = ir.FunctionType(vec.llvm, [vec.llvm] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.{vec.suffix}")
    return builder.call(function, [a, b, c])


def prefetch(builder: ir.IRBuilder, pointer: Any) -> None:
    """Have the line at `pointer` brought to the second-level cache; any address will do."""
    i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    options = [ir.Constant(i32, option) for option in (0, 2, 1)]
    builder.call(function, [builder.bitcast(pointer, byte), *options])


# ---- arithmetic on Vec, with numbers allowed on either side


class _Arithmetic(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        vec = next((a for a in args if isinstance(a, Vec)), None)
        if vec is None or kws or len(args) != 2:
            return None
        return signature(vec, *(a if isinstance(a, Vec) else vec.dtype for a in args))


def _as_vec(builder: ir.IRBuilder, vec: Vec, kind: Any, value: Any) -> Any:
    return value if isinstance(kind, Vec) else splat(builder, vec, value)


def _arithmetic(operation: Any, name: str) -> None:
    infer_global(operation)(type(f"_{name}", (_Arithmetic,), {}))

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        a, b = (
            _as_vec(builder, sig.return_type, kind, value)
            for kind, value in zip(sig.args, args, strict=True)
        )
        return getattr(builder, name)(a, b)

    for left, right in ((Vec, Vec), (Vec, types.Float), (types.Float, Vec)):
        lower_builtin(operation, left, right)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@infer_global(operator.neg)
class _Negation(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0]) if isinstance(args[0], Vec) else None


@lower_builtin(operator.neg, Vec)
def _negate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0])


def _vec_of(*args: Any) -> Vec:
    return next(a for a in args if isinstance(a, Vec))


@intrinsic
def fma(typingctx, a, b, c):
    """`a * b + c` lane by lane, rounded once where the CPU can fuse it."""
    vec = _vec_of(a, b, c)
    sig = vec(*(x if isinstance(x, Vec) else vec.dtype for x in (a, b, c)))

    def codegen(context, builder, sig, args):
        values = (_as_vec(builder, vec, k, v) for k, v in zip(sig.args, args, strict=True))
        return multiply_add(builder, vec, *values)

    return sig, codegen


@intrinsic
def at(typingctx, array, offset):
    """Pointer to element `offset` of an array, or past a pointer."""

    def codegen(context, builder, sig, args):
        return address(context, builder, sig.args[0], *args)

    return types.CPointer(array.dtype)(array, types.intp), codegen


@intrinsic
def pointer_to(typingctx, like, address):
    """Pointer to numbers as `like` has them, from where they are in memory."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(sig.return_type))

    return types.CPointer(like.dtype)(like, types.intp), codegen


@intrinsic
def keep_alive(typingctx, array):
    """Use `array`, so that the memory behind a pointer to it lasts until here.

    Numba frees an array after its last use, and does not see that `at` has let a pointer out.
    """

    def codegen(context, builder, sig, args):
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def load(typingctx, array, offset):
    """A register from `array[offset:]`."""
    vec = Vec(array.dtype)

    def codegen(context, builder, sig, args):
        return read(builder, vec, address(context, builder, sig.args[0], *args))

    return vec(array, types.intp), codegen


@intrinsic
def store(typingctx, array, offset, value):
    """A register to `array[offset:]`."""

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args[:2])
        write(builder, value, args[2], pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def load_n(typingctx, array, offset, n):
    """The first `n` lanes from `array[offset:]`, zeros in the others."""
    vec = Vec(array.dtype)

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args[:2])
        full = builder.icmp_signed(">=", args[2], ir.Constant(args[2].type, vec.lanes))
        with builder.if_else(full) as (whole, part):
            with whole:
                value = read(builder, vec, pointer)
                from_whole = builder.block
            with part:
                mask = first_lanes(builder, vec, args[2])
                some = read_masked(builder, vec, pointer, mask)
                from_part = builder.block
        result = builder.phi(vec.llvm)
        result.add_incoming(value, from_whole)
        result.add_incoming(some, from_part)
        return result

    return vec(array, types.intp, types.intp), codegen


@intrinsic
def store_n(typingctx, array, offset, value, n):
    """The first `n` lanes to `array[offset:]`."""

    def codegen(context, builder, sig, args):
        pointer = address(context, builder, sig.args[0], *args[:2])
        full = builder.icmp_signed(">=", args[3], ir.Constant(args[3].type, value.lanes))
        with builder.if_else(full) as (whole, part):
            with whole:
                write(builder, value, args[2], pointer)
            with part:
                mask = first_lanes(builder, value, args[3])
                write_masked(builder, value, args[2], pointer, mask)
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp), codegen


@intrinsic
def broadcast(typingctx, array, value):
    """`value` in every lane of a register that fits the numbers of `array`."""
    vec = Vec(array.dtype)

    def codegen(context, builder, sig, args):
        return splat(builder, vec, args[1])

    return vec(array, vec.dtype), codegen


@intrinsic
def zero(typingctx, like):
    """A register of zeros."""
    return like(like), lambda context, builder, sig, args: ir.Constant(like.llvm, None)


@intrinsic
def sqrt(typingctx, x):
    """The square root, lane by lane, correctly rounded."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(x.llvm, [x.llvm])
        name = f"llvm.sqrt.{x.suffix}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return x(x), codegen


@intrinsic
def select_greater(typingctx, a, b, x, y):
    """`x` where `a > b`, else `y` (also where a or b is NaN)."""
    vec = _vec_of(a, b, x, y)
    sig = vec(*(v if isinstance(v, Vec) else vec.dtype for v in (a, b, x, y)))

    def codegen(context, builder, sig, args):
        a, b, x, y = (_as_vec(builder, vec, k, v) for k, v in zip(sig.args, args, strict=True))
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)

    return sig, codegen


@intrinsic
def sum_of(typingctx, x):
    """The sum of all lanes: of the halves, of their halves, and so on."""

    def codegen(context, builder, sig, args):
        (value,), count = args, x.lanes
        while count > 1:
            count //= 2
            order = [(i + count) % x.lanes for i in range(x.lanes)]
            places = ir.Constant(ir.VectorType(ir.IntType(32), x.lanes), order)
            value = builder.fadd(value, builder.shuffle_vector(value, value, places))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen


@intrinsic
def power_of_two(typingctx, shifted):
    """`2**n` for a float that holds the integer n in its lowest bits (see vmath)."""
    mantissa = {32: 23, 64: 52}[shifted.dtype.bitwidth]
    bias = {32: 127, 64: 1023}[shifted.dtype.bitwidth]

    def codegen(context, builder, sig, args):
        kind = shifted.integer
        bits = builder.bitcast(args[0], kind)
        bits = builder.add(bits, ir.Constant(kind, [bias] * shifted.lanes))
        bits = builder.shl(bits, ir.Constant(kind, [mantissa] * shifted.lanes))
        return builder.bitcast(bits, shifted.llvm)

    return shifted(shifted), codegen


@intrinsic
def width_of(typingctx, array):
    """How many numbers of `array` a register holds."""
    count = Vec(array.dtype).lanes

    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(types.intp.bitwidth), count)

    return types.intp(array), codegen


@intrinsic
def transpose(typingctx, source, start, row, target, into, step):
    """A square block, `width x width`: `target[into + j*step + i] = source[start + i*row + j]`."""
    vec = Vec(source.dtype)

    def codegen(context, builder, sig, args):
        source_value, start, row, target_value, into, step = args
        values = []
        for i in range(vec.lanes):
            offset = builder.add(start, builder.mul(row, ir.Constant(row.type, i)))
            pointer = address(context, builder, source, source_value, offset)
            values.append(read(builder, vec, pointer))
        half = vec.lanes // 2
        # Perfect shuffles: log2(width) rounds of interleaving rows i and i + width/2.
        low = [x // 2 + (x % 2) * vec.lanes for x in range(vec.lanes)]
        high = [x + half for x in low]
        i32 = ir.VectorType(ir.IntType(32), vec.lanes)
        for _ in range(vec.lanes.bit_length() - 1):
            pairs = [(values[i], values[i + half]) for i in range(half)]
            values = [
                builder.shuffle_vector(a, b, ir.Constant(i32, order))
                for a, b in pairs
                for order in (low, high)
            ]
        for j, value in enumerate(values):
            offset = builder.add(into, builder.mul(step, ir.Constant(step.type, j)))
            write(builder, vec, value, address(context, builder, target, target_value, offset))
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, i, target, i, i), codegen


@intrinsic
def flush_denormals(typingctx):
    """Treat denormals as zero on this thread; returns the mode to give to `restore_denormals`.

    They cost up to fifty times a normal number on some CPUs and mean nothing to a network.
    """
    i32 = ir.IntType(32)

    def codegen(context, builder, sig, args):
        if not machine().x86:
            return ir.Constant(i32, 0)
        slot = cgutils.alloca_once(builder, i32)
        _mxcsr(builder, "stmxcsr", slot)
        old = builder.load(slot)
        builder.store(builder.or_(old, ir.Constant(i32, 0x8040)), slot)
        _mxcsr(builder, "ldmxcsr", slot)
        return old

    return types.int32(), codegen


@intrinsic
def restore_denormals(typingctx, mode):
    """Undo `flush_denormals`."""

    def codegen(context, builder, sig, args):
        if machine().x86:
            slot = cgutils.alloca_once(builder, ir.IntType(32))
            builder.store(args[0], slot)
            _mxcsr(builder, "ldmxcsr", slot)
        return context.get_dummy_value()

    return types.void(types.int32), codegen


def _mxcsr(builder: ir.IRBuilder, name: str, slot: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
    builder.call(function, [builder.bitcast(slot, pointer)])
