"""Older x86 CPUs: registers of 32 and 16 bytes, without fused multiply-add; against the reference.

`NUMBA_CPU_NAME` chooses the CPU; with empty `NUMBA_CPU_FEATURES` no other instructions are used.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import pytest

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.simd import machine

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="CPUs of the x86 family"
)

LIMIT = 600

# Bytes of a register, registers, fused multiply-add.
MACHINES = {"haswell": (32, 16, True), "x86-64": (16, 16, False)}

CHECK = """
import itertools, sys
import numpy as np
import fastrnn
from fastrnn import parallel
from helpers import new_layer, reference_of

def check(cell, dtype, T, B, I, H, tokens):
    rng = np.random.default_rng([T, B, I, H])
    reference, options = reference_of(cell)
    layer = new_layer(cell, I, H, dtype=dtype, seed=1)
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)
    x = rng.integers(I, size=(T, B)) if tokens else draw(T, B, I)
    state, d_state = ([draw(1, B, n) for n in layer.state_sizes] for _ in range(2))
    d_output = draw(T, B, layer.output_size)

    def computed(threads):
        fastrnn.set_num_threads(threads)
        def pack(parts):
            return tuple(parts) if len(parts) > 1 else parts[0]
        def flat(parts):
            return list(parts) if isinstance(parts, tuple) else [parts]
        output, final, saved = layer.forward(x, pack(state))
        d_x, d_first, grads = layer.backward(saved, d_output, pack(d_state))
        arrays = [output.copy(), *flat(final), *flat(d_first), *grads.values()]
        return arrays if tokens else [*arrays, d_x]

    def wide(array):
        return array if array.dtype.kind == "i" else array.astype(np.float64)
    params = {key.removesuffix("_l0"): wide(value) for key, value in layer.params.items()}
    first, last = (tuple(wide(s[0]) for s in states) for states in (state, d_state))
    output, final, saved = reference.forward(params, wide(x), first, **options)
    d_x, d_first, grads = reference.backward(params, saved, wide(d_output), last)
    want = [output, *(s[None] for s in (*final, *d_first)),
            *(grads[key.removesuffix("_l0")] for key in layer.params)]
    want = want if tokens else [*want, d_x]

    bound = 1e-12 if dtype == "float64" else 8 * np.finfo(dtype).eps * np.sqrt(T * (B + I + 5 * H))
    got = computed(1)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape, (cell, i)
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= bound * size, f"{cell} {dtype} {(T, B, I, H)} array {i}: {error} of {size}"
    for a, b in zip(got, computed(2), strict=True):
        assert a.tobytes() == b.tobytes(), f"{cell} {dtype}: other bits with two threads"

parallel._SMALL = 0
shapes = [(5, 3, 7, 19), (3, 7, 5, 33), (4, 1, 1, 1), (2, 13, 17, 8)]
count = 0
for cell_and_dtype, shape in itertools.product(sys.argv[1:], shapes):
    if "norm" in cell_and_dtype and shape[3] == 1:
        # What is normalised over three numbers cancels out.
        shape = (4, 1, 5, 6)
    check(*cell_and_dtype.split(), *shape, tokens=False)
    count += 1
check(*sys.argv[1].split(), 6, 5, 11, 21, tokens=True)
print(count)
"""


def run(code, cpu, features, *arguments):
    for name in MACHINES[cpu][2] * ("avx2", "fma"):
        if not llvmlite.binding.get_host_cpu_features().get(name):
            pytest.skip(f"this CPU has no {name}")
    root = str(Path(fastrnn.__file__).parents[1])
    path = os.pathsep.join([root, str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NUMBA_CPU_NAME": cpu}
    environment.pop("NUMBA_CPU_FEATURES", None)
    if features is not None:
        environment["NUMBA_CPU_FEATURES"] = features
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


each_cpu = pytest.mark.parametrize("cpu", MACHINES)
each_features = pytest.mark.parametrize("features", ["", None], ids=["alone", "with ours"])


@each_cpu
@each_features
def test_machine(cpu, features):
    code = """
from fastrnn import gemm, simd
import numpy as np
m = simd.machine()
print(m.cpu, m.width, m.registers, m.fma, m.x86)
print(simd.lanes(np.float32), simd.lanes(np.float64), simd.padded(1, np.float32))
"""
    width, registers, fma = MACHINES[cpu]
    want = [cpu, width, registers, fma, True, width // 4, width // 8, width // 4]
    assert run(code, cpu, features) == [str(value) for value in want]


@each_cpu
def test_cells(cpu):
    own = machine()
    if own.x86 and (own.width, own.registers, own.fma) == MACHINES[cpu]:
        pytest.skip("this CPU has the same registers: all other tests run on them")
    cases = [f"{cell} float32" for cell in sorted(CELLS)] + ["lstm float64"]
    assert run(CHECK, cpu, "", *cases) == [str(4 * len(cases))]


@pytest.mark.slow
@each_cpu
@each_features
def test_cells_in_both_types(cpu, features):
    cases = [f"{cell} {dtype}" for cell in sorted(CELLS) for dtype in ("float64", "float32")]
    assert run(CHECK, cpu, features, *cases) == [str(4 * len(cases))]
