"""A frozen layer is the layer, to the bit, as it was."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
from helpers import each_kind

import fastrnn
from fastrnn import pack, units


def parts(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def same(found, wanted):
    for a, b in zip(parts(found), parts(wanted), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@each_kind
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_way_of_running(kind, dtype, count, rng, threads, monkeypatch):
    threads(count)
    # One sequence shares its units, however small; many are shared out.
    monkeypatch.setattr(units, "_SHARED", 0)
    layer = kind(70, 130, 2, dtype=dtype, seed=0, bias=count == 1)
    run = layer.freeze()
    for shape in ((33, 3, 70), (40, 1, 70), (5, 70)):
        x = rng.standard_normal(shape).astype(dtype)
        tokens = rng.integers(70, size=shape[:-1])
        vectors = rng.standard_normal((70, 70)).astype(dtype)
        for _ in range(2):
            same(run(x), layer(x))
            same(run(tokens), layer(tokens))
            same(run(tokens, vectors=vectors), layer(tokens, vectors=vectors))
            vectors *= 2
        state = layer(x)[1]
        same(run(x, state), layer(x, state))
    sides = [side for layer_sides in run._copy._fixed.values() for side in layer_sides]
    found = {apart for side in sides for _, apart in side.packed}
    shares = count > 1 and not (layer.cell.projected or layer.cell.normed)
    assert found == ({False, True} if shares else {False})


@each_kind
def test_batch_first_and_dropout(kind, rng):
    layer = kind(3, 5, 3, batch_first=True, dropout=0.5, seed=0)
    x = rng.standard_normal((4, 2, 3)).astype("f4")
    same(layer.freeze()(x), layer(x))


@each_kind
def test_weights_stay_until_refresh(kind, rng):
    layer = kind(3, 5, seed=0)
    x = rng.standard_normal((4, 2, 3)).astype("f4")
    before = layer(x)
    run = layer.freeze()
    for value in layer.params.values():
        value *= 2
    # Also for a way of running that did not occur before.
    same(run(x), before)
    run.refresh()
    after = run(x)
    same(after, layer(x))
    assert (layer(x)[0] != before[0]).any()
    layer.params["weight_hh_l0"] = np.zeros(3)
    with pytest.raises(ValueError, match="weight_hh_l0"):
        run.refresh()
    same(run(x), after)


def test_weights_are_packed_once(rng, monkeypatch):
    calls = []
    real = pack.pack_transposed
    monkeypatch.setattr(pack, "pack_transposed", lambda *a, **k: calls.append(a) or real(*a, **k))
    run = fastrnn.GRU(3, 5, 2, seed=0).freeze()
    x = rng.standard_normal((4, 2, 3)).astype("f4")
    first = run(x)
    assert len(calls) == 4
    same(run(x), first)
    assert len(calls) == 4


def through_a_file(run):
    other = pickle.loads(pickle.dumps(run))
    # Another machine may pack in another way.
    assert run._copy._fixed
    assert other._copy._fixed == {}
    return other


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_a_file])
def test_copies(copied, rng):
    layer = fastrnn.LSTM(3, 5, seed=0)
    x = rng.standard_normal((4, 2, 3)).astype("f4")
    run = layer.freeze()
    wanted = run(x)
    same(copied(run)(x), wanted)
    assert repr(run) == "Frozen(LSTM(3, 5, num_layers=1, dtype=float32))"


def test_bad_input_is_named():
    run = fastrnn.LSTM(3, 5, seed=0).freeze()
    with pytest.raises(ValueError, match=r"x: expected .*\(T, B, I\)"):
        run(np.zeros((4, 2, 4), "f4"))


def test_threads_share_it(rng):
    layer = fastrnn.GRU(30, 50, 2, seed=0)
    x = rng.standard_normal((20, 2, 30)).astype("f4")
    wanted = layer(x)
    for _ in range(20):
        run = layer.freeze()
        together = threading.Barrier(4)
        found = []

        def work(run=run, together=together, found=found):
            together.wait()
            found.append(run(x))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 4
        for result in (*found, run(x)):
            assert np.isfinite(result[0]).all()
            same(result, wanted)
