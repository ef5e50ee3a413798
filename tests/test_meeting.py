"""Threads that share a step: the same bits, whoever comes, and no hang whatever happens."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from helpers import (
    computed,
    each_cell,
    each_dtype,
    make_problem,
    same_results,
    threads,
)
from test_processes import EIGHT, LIMIT, PRELUDE, Program, posix

from fastrnn import crew, layers, meeting, parallel, single, units
from fastrnn import generate as generate_module
from fastrnn.generate import generate
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.tile import COLS


@pytest.fixture
def shared(monkeypatch):
    """Every step is shared, however small."""
    monkeypatch.setattr(units, "_SHARED", 0)
    monkeypatch.setattr(units, "_LARGE", -1)


@pytest.fixture
def met(monkeypatch):
    """What kernels were run together, and by how many."""
    found = []

    def spied(function, parts, *arguments):
        found.append((function.py_func.__name__, parts))
        meeting_together(function, parts, *arguments)

    meeting_together = meeting.together
    monkeypatch.setattr(single, "together", spied)
    return found


each_input = pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])


@each_cell
@each_dtype
@each_input
@pytest.mark.parametrize("past", [-1, 0, 1, 5], ids=lambda past: f"panels{past:+d}")
@pytest.mark.parametrize("batch", [1, 7])
def test_same_bits(cell, dtype, tokens, past, batch, shared, met):
    lanes = single.lanes(dtype)
    hidden = 2 * COLS * lanes + past
    problem = make_problem(cell, 5, batch, 9, hidden, layers=2, tokens=tokens, dtype=dtype)
    with threads(1):
        want = computed(problem)
    assert not met
    for count in (2, 3):
        parts = min(count, -(-hidden // (COLS * lanes)))
        with threads(count):
            same_results(computed(problem), want)
        # With more threads than slices of units, and as many sequences, those are shared out.
        cell_of = problem.rnn.cell
        if cell_of.projected or cell_of.normed:
            assert not met
        elif parts >= min(count, batch):
            assert ("forward_slice", parts) in met
            assert ("backward_slice", parts) in met
        met.clear()


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_before"])
@each_dtype
@pytest.mark.parametrize("batch", [1, 7])
def test_same_bits_with_all_that_is_drawn(cell, dtype, batch, shared, met):
    noise = {"recurrent_dropout": 0.3, "zoneout": 0.3, "weight_dropout": 0.2, "dropout": 0.3}
    hidden = 2 * COLS * single.lanes(dtype) + 3
    problem = make_problem(cell, 5, batch, 9, hidden, layers=2, dtype=dtype, **noise)
    rnn = problem.rnn

    def run():
        y, _, saved = rnn.forward(problem.x, seed=4)
        d_x, _, grads, flow = rnn.backward(saved, problem.d_output, return_flow=True)
        found = {"y": y.copy(), "inference": rnn(problem.x)[0], "d x": d_x, "flow": flow}
        return found | grads

    with threads(1):
        want = run()
    for count in (2, 3):
        with threads(count):
            same_results(run(), want)
        assert met
        met.clear()


@pytest.mark.parametrize("name", CELL_NAMES)
@each_dtype
@pytest.mark.parametrize("embedding", [0, 7])
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"top_k": 3, "eos": 1}], ids=str)
def test_sampling(name, dtype, embedding, options, shared, monkeypatch):
    hidden = 2 * COLS * single.lanes(dtype) + 3
    model = LanguageModel(
        11, hidden, cell=name, num_layers=2, embedding_size=embedding, dtype=dtype, seed=3
    )
    prompt = np.array([[4, 2], [1, 9]], np.int32)
    counts = []

    def spied(function, parts, *arguments):
        counts.append(parts)
        meeting.together(function, parts, *arguments)

    monkeypatch.setattr(generate_module, "together", spied)
    # Fewer steps than tokens, and more: the vectors are taken as they are, and in a table.
    for length, batch in ((4, 2), (30, 1)):
        texts = []
        for count in (1, 2, 3):
            with threads(count):
                text = generate(model, prompt[:, :batch], length, seed=5, **options)
                texts.append([sequence.tolist() for sequence in text])
        assert all(text == texts[0] for text in texts)
    assert counts.count(2) >= 2


def test_sampling_stops_on_bad_weights(shared):
    model = LanguageModel(5, 2 * COLS * 16, seed=0)
    model.params["head.bias"][2] = np.nan
    with threads(2), pytest.raises(ValueError, match="finite"):
        generate(model, [1], 50, seed=0)


def test_shared_where_it_helps(met):
    # One sequence of 256 units; few sequences of many units; else slices of the batch.
    lstm = layers.LSTM(4, 256, seed=0)
    wide = layers.LSTM(4, 520, seed=0)
    with threads(2):
        lstm(np.zeros((2, 1, 4), np.float32))
        wide(np.zeros((2, 20, 4), np.float32))
        assert met == [("forward_slice", 2)] * 2
        lstm(np.zeros((2, 2, 4), np.float32))
        wide(np.zeros((2, 64, 4), np.float32))
        layers.LSTM(4, 64, seed=0)(np.zeros((2, 1, 4), np.float32))
        assert len(met) == 2


def lstm_and_input():
    layer = layers.LSTM(3, 2 * COLS * 16, seed=0)
    return layer, np.random.default_rng(0).standard_normal((6, 1, 3)).astype(np.float32)


def test_nobody_comes(shared, monkeypatch):
    layer, x = lstm_and_input()
    with threads(1):
        want = layer(x)[0]
    asleep = []

    def take(taken, limit):
        taken.append(parallel._Thread())
        asleep.append(taken[-1])
        return True

    monkeypatch.setattr(parallel._pool, "take", take)
    monkeypatch.setattr(parallel._pool, "give_back", lambda threads: None)
    with threads(2):
        output = layer(x)[0]
    assert output.tobytes() == want.tobytes()
    # Who comes after all finds that it is over, and touches nothing.
    assert asleep
    output.fill(7)
    for thread in asleep:
        crew.serve(thread.slot)
    assert (output == 7).all()


def test_nobody_is_free(shared, monkeypatch):
    layer, x = lstm_and_input()
    with threads(1):
        want = layer(x)[0]
    monkeypatch.setattr(parallel._pool, "take", lambda taken, limit: False)
    with threads(2):
        assert layer(x)[0].tobytes() == want.tobytes()


def test_one_comes_late(shared, monkeypatch):
    layer, x = lstm_and_input()
    with threads(1):
        want = layer(x)[0]

    def late(slot):
        time.sleep(0.2)
        serve(slot)

    serve = crew.serve
    monkeypatch.setattr(parallel, "_pool", parallel._Pool())
    monkeypatch.setattr(crew, "serve", late)
    with threads(2):
        assert layer(x)[0].tobytes() == want.tobytes()
        assert parallel._pool._started == 1


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_one_fails_before_it_begins(who, error, shared):
    # The others must not wait for it.
    place = []

    def failing(part, parts, meeting_place, left):
        place.append(meeting_place)
        if part == who:
            raise error
        left.append(gather(meeting_place, part, parts))

    left = []
    with threads(2), pytest.raises(error):
        meeting.together(failing, 2, left)
    # The caller goes on alone; a thread leaves, if it ever came.
    assert left in ([[1]] if who else [[], [0]])


def gather(place, part, parts):
    from fastrnn.jit import kernel

    global _gather
    if _gather is None:

        @kernel
        def compiled(place, part, parts):
            return meeting.gather(place, part, parts)

        _gather = compiled
    return _gather(place, part, parts)


_gather = None


def test_a_thread_that_is_slow_to_see_it_is_waited_for():
    # Its part of a short sequence must be done although the caller has ended already.
    for _ in range(300):
        came = []

        def function(part, parts, place, came):
            came.append((part, gather(place, part, parts)))

        with threads(2):
            meeting.together(function, 2, came)
        assert sorted(came) in ([(0, 2), (1, 2)], [(0, 1)], [(0, 1), (1, 0)])


# ---- in processes of their own

SHARED = (
    PRELUDE.replace("(5, 19,", "(5, 150,").replace("7, 6, 19", "7, 6, 150")
    + """
from fastrnn import units
units._SHARED, units._LARGE = 0, -1
"""
)


@pytest.fixture
def run(tmp_path):
    def run(body, **options):
        return Program(tmp_path, body, prelude=SHARED, **options).lines()

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    body = 'fastrnn.set_num_threads(1)\nreport(train("GRU"), train("LSTM"))\n'
    gru, lstm = Program(tmp_path_factory.mktemp("plain"), body, prelude=SHARED).lines()
    return {"gru": gru, "lstm": lstm}


@posix
def test_forks_while_another_thread_trains(run, plain):
    body = """
use_pool()
report(train("GRU"))
stop, results = threading.Event(), []

def work():
    while not stop.is_set():
        results.append(train("LSTM"))

thread = threading.Thread(target=work)
thread.start()
for pid in [in_child(lambda: report(train("GRU"), train("LSTM"))) for _ in range(4)]:
    wait(pid)
stop.set()
thread.join()
report(*sorted(set(results)))
"""
    lines = run(body)
    assert sorted(lines[1:9]) == sorted([plain["gru"]] * 4 + [plain["lstm"]] * 4)
    assert [lines[0], *lines[9:]] == [plain["gru"], plain["lstm"]]


@pytest.mark.parametrize("count", [2, 5])
def test_eight_threads_at_once(run, plain, count):
    body = f"use_pool(); fastrnn.set_num_threads({count})\n"
    lines = run(body + EIGHT.format(task='[train(c) for c in ("GRU", "LSTM")]'))
    assert lines == [str([plain["gru"], plain["lstm"]])] * 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the affinity")
def test_two_threads_on_one_processor(run, plain):
    body = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nuse_pool()\n"
    start = time.monotonic()
    assert run(body + 'report(train("GRU"))') == [plain["gru"]]
    assert time.monotonic() - start < LIMIT


@posix
def test_interrupts(run, plain):
    # Whenever Ctrl-C comes, nobody is left waiting, and the next run has the same bits.
    body = """
import random
use_pool()
layer = fastrnn.GRU(5, 150, seed=1)
x = np.zeros((400, 3, 5), np.float32)
want = layer(x)[0].tobytes()
caught = 0
for turn in range(40):
    soon = random.Random(turn).uniform(0, 0.03)
    timer = threading.Timer(soon, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while timer.is_alive():
            layer(x)
        time.sleep(0.001)
    except KeyboardInterrupt:
        caught += 1
    timer.join()
    assert layer(x)[0].tobytes() == want
assert caught > 20, caught
report(train("GRU"))
"""
    assert run(body) == [plain["gru"]]
