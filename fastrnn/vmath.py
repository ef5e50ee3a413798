"""exp, sigmoid and tanh on `Vec`.

All three rest on one reduction: x = n ln 2 + r with |r| <= ln(2)/2, and q(r) = e**r - 1 as the
Taylor polynomial of degree 7 (float32) or 13 (float64), whose remainder is below half an ulp. Its
terms are taken two at a time: half as many operations wait for one another.

Largest error over all arguments, in units in the last place of the result (tested): exp 2,
sigmoid 4, tanh 4. exp is zero below and inf above the range stated in `_RANGE`, sigmoid loses its
relative accuracy below the lower end (its value is then under 1e-37); NaN gives NaN.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

from fastrnn.jit import overload
from fastrnn.simd import Vec, fma, power_of_two, select_greater

_LOG2_E = 1 / math.log(2)
_LN_2 = Decimal(2).ln(Context(prec=40))
_TAYLOR = tuple(1 / math.factorial(k) for k in range(14))

# By bits of the float: ln 2 in a part that n multiplies exactly and the rest; the number whose
# addition rounds to an integer and leaves it in the lowest bits; the arguments of exp whose result
# is a normal number; where tanh has reached 1.
_HIGH = {32: float(round(_LN_2 * 2**12)) / 2**12, 64: float(round(_LN_2 * 2**32)) / 2**32}
_LOW = {bits: float(_LN_2 - Decimal(high)) for bits, high in _HIGH.items()}
_SHIFT = {32: 1.5 * 2.0**23, 64: 1.5 * 2.0**52}
_RANGE = {32: (-87.33, 88.37), 64: (-708.39, 709.43)}
_FLAT = {32: 9.1, 64: 19.1}


def exp(x):
    """e**x."""


def sigmoid(x):
    """e**x / (1 + e**x)."""


def tanh(x):
    """(e**2x - 1) / (e**2x + 1)."""


def _parts(x):
    """(2**n, q) with e**x = 2**n (1 + q), for x inside `_RANGE`."""


@overload(_parts)
def _parts_overload(x):
    if not isinstance(x, Vec):
        return None
    bits = x.dtype.bitwidth
    shift, high, low, c = _SHIFT[bits], _HIGH[bits], _LOW[bits], _TAYLOR

    def single(x):
        shifted = fma(x, _LOG2_E, shift)
        n = shifted - shift
        r = fma(n, -low, fma(n, -high, x))
        square = r * r
        p = fma(fma(c[7], r, c[6]), square, fma(c[5], r, c[4]))
        p = fma(p, square, fma(c[3], r, c[2]))
        return power_of_two(shifted), fma(p, square, r)

    def double(x):
        shifted = fma(x, _LOG2_E, shift)
        n = shifted - shift
        r = fma(n, -low, fma(n, -high, x))
        square = r * r
        p = fma(fma(c[13], r, c[12]), square, fma(c[11], r, c[10]))
        p = fma(fma(p, square, fma(c[9], r, c[8])), square, fma(c[7], r, c[6]))
        p = fma(fma(p, square, fma(c[5], r, c[4])), square, fma(c[3], r, c[2]))
        return power_of_two(shifted), fma(p, square, r)

    return single if bits == 32 else double


@overload(exp)
def _exp_overload(x):
    if not isinstance(x, Vec):
        return None
    lowest, highest = _RANGE[x.dtype.bitwidth]
    infinity = math.inf

    def impl(x):
        raised = select_greater(lowest, x, lowest, x)
        power, q = _parts(select_greater(raised, highest, highest, raised))
        y = fma(power, q, power)
        return select_greater(x, highest, infinity, select_greater(lowest, x, 0.0, y))

    return impl


@overload(sigmoid)
def _sigmoid_overload(x):
    if not isinstance(x, Vec):
        return None
    lowest, highest = _RANGE[x.dtype.bitwidth]

    def impl(x):
        raised = select_greater(lowest, x, lowest, x)
        power, q = _parts(select_greater(raised, highest, highest, raised))
        y = fma(power, q, power)
        return y / (1.0 + y)

    return impl


@overload(tanh)
def _tanh_overload(x):
    if not isinstance(x, Vec):
        return None
    flat = _FLAT[x.dtype.bitwidth]

    def impl(x):
        raised = select_greater(-flat, x, -flat, x)
        inside = select_greater(raised, flat, flat, raised)
        power, q = _parts(inside + inside)
        # e**2x - 1 without the cancellation near zero.
        y = fma(power, q, power - 1.0)
        return y / (y + 2.0)

    return impl
