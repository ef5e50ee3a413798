"""Memory is on a boundary, used again once nobody refers to it, and never before."""

from __future__ import annotations

import gc
import pickle
import threading

import numpy as np
import pytest
from helpers import each_dtype

from fastrnn import memory

LARGE = 1 << 15


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Nothing idle at the start; the fixture that poisons memory must not hold any either."""
    gc.collect()
    monkeypatch.setattr(memory, "_idle", {})
    monkeypatch.setattr(memory, "_idle_bytes", 0)


def address(array):
    return array.__array_interface__["data"][0]


@each_dtype
@pytest.mark.parametrize("shape", [1, (3, 5), (64, 256), LARGE, (7, 1 << 13)])
def test_on_a_boundary_and_writable(dtype, shape):
    array = memory.empty(shape, dtype)
    assert array.shape == ((shape,) if isinstance(shape, int) else shape)
    assert array.dtype == dtype
    assert type(array) is np.ndarray
    assert array.flags.carray
    assert address(array) % memory.ALIGNMENT == 0
    array.fill(1)
    assert array.sum() == array.size


def test_used_again_when_the_array_is_gone():
    first = memory.empty(LARGE, np.float32)
    place = address(first)
    del first
    assert memory._idle_bytes > LARGE * 4
    again = memory.empty(LARGE, np.float32)
    assert address(again) == place
    assert memory._idle_bytes == 0


def test_used_again_for_what_is_somewhat_smaller():
    size = 8 * LARGE
    first = memory.empty(size, np.float32)
    place = address(first)
    del first
    for _ in range(2):
        some = memory.empty(size * 5 // 6, np.float32)
        assert address(some) == place
        # There is no other.
        own = memory.empty(size * 5 // 6, np.float32)
        assert address(own) != place
        del some, own
        gc.collect()
        memory._idle.pop(size * 5 // 6 * 4 + memory.ALIGNMENT)
    held = [memory.empty(other, np.float32) for other in (size + 1, size * 3 // 4)]
    assert place not in [address(array) for array in held]
    exact = memory.empty(size * 5 // 6, np.float32)
    assert address(exact) == place


def test_the_closest_is_used_again_first():
    size = 8 * LARGE
    arrays = [memory.empty(size + more, np.float32) for more in (200, 0, 100)]
    places = [address(array) for array in arrays]
    del arrays
    assert address(memory.empty(size, np.float32)) == places[1]
    assert address(memory.empty(size + 50, np.float32)) == places[2]


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[5:],
        lambda a: a[5:].reshape(-1, 5)[::2].T,
        lambda a: a.view(np.uint8)[3:],
        lambda a: np.asarray(memoryview(a)),
        lambda a: np.lib.stride_tricks.as_strided(a, (4,), (8,)),
        lambda a: np.frombuffer(a, np.int32),
    ],
)
def test_not_used_again_while_a_view_of_it_lives(view):
    array = memory.empty(LARGE + 2, np.float32)
    array.fill(7)
    kept = view(array)
    before = kept.copy()
    place = address(array)
    del array
    gc.collect()
    others = [memory.empty(LARGE + 2, np.float32) for _ in range(3)]
    assert place not in [address(other) for other in others]
    for other in others:
        other.fill(-1)
    np.testing.assert_array_equal(kept, before)
    del kept, before
    gc.collect()
    assert address(memory.empty(LARGE + 2, np.float32)) == place


def test_copies_are_free_of_it():
    array = memory.empty(LARGE, np.float32)
    array.fill(3)
    copies = [array.copy(), pickle.loads(pickle.dumps(array))]
    del array
    memory.empty(LARGE, np.float32).fill(0)
    for copy in copies:
        np.testing.assert_array_equal(copy, 3)


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(memory, "_KEPT", 3 * LARGE * 4)
    arrays = [memory.empty(LARGE + 16 * i, np.float32) for i in range(6)]
    del arrays
    assert 0 < memory._idle_bytes <= 3 * LARGE * 4
    assert memory._idle_bytes == sum(size * len(held) for size, held in memory._idle.items())
    assert all(memory._idle.values())
    memory.empty(4 * LARGE, np.float32).fill(0)
    assert memory._idle_bytes <= 3 * LARGE * 4


def test_many_threads_never_share():
    wrong = []

    def work(number):
        for turn in range(300):
            a = memory.empty(LARGE, np.float32)
            a.fill(number)
            b = memory.empty(LARGE, np.float32)
            b.fill(-number)
            if (a != number).any() or (b != -number).any():
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_views_of_a_block_are_no_blocks(capfd):
    base = memory.empty(LARGE, np.float32).base
    views = [base[5:], base.copy(), base.view()]
    del views, base
    gc.collect()
    assert capfd.readouterr().err == ""
    assert memory._idle_bytes > 0


def test_idle_memory_is_given_up_before_an_array_is_refused(monkeypatch):
    memory.empty(LARGE, np.float32).fill(0)
    assert memory._idle
    failures = [MemoryError]

    def scarce(*arguments):
        if failures:
            raise failures.pop()
        assert not memory._idle
        return original(*arguments)

    original = memory._Memory
    monkeypatch.setattr(memory, "_Memory", scarce)
    assert memory.empty(2 * LARGE, np.float32).size == 2 * LARGE
    assert not failures
