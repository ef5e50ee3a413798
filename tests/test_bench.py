"""The bench says what is so: its gate catches wrong numbers, its report adds up."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
pytest.importorskip("bench", reason="not a checkout")

from bench import report, runner  # noqa: E402
from bench.cases import CASES, CELLS, MODES, Case, find  # noqa: E402
from bench.language import Model  # noqa: E402
from bench.peers import contestant  # noqa: E402
from bench.problem import error, solve  # noqa: E402
from bench.runner import GATE, Process  # noqa: E402


def test_a_case_is_named_or_spelled_out():
    assert find("large") == CASES["large"]
    assert find("T7B2I3H5")[1:] == (7, 2, 3, 5, 1)
    assert find("T7B2I3H5L2").layers == 2
    with pytest.raises(ValueError, match="T64B32I64H64"):
        find("enormous")


TINY = Case("tiny", 3, 2, 4, 5, 2)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("spoil", [np.nan, 1e-3])
@pytest.mark.parametrize("mode", ["training", "inference", "language", "projection"])
def test_the_gate_sees_every_array(mode, cell, spoil):
    wanted = solve(mode, TINY, cell, "float64")
    found = solve(mode, TINY, cell, "float32")
    assert error(found, wanted) <= GATE["float32"]
    for key, array in found.items():
        spoilt = array.astype("f8")
        spoilt.reshape(-1)[0] += spoil * np.linalg.norm(array)
        assert not error(found | {key: spoilt}, wanted) <= GATE["float32"]
        assert np.isnan(error({k: v for k, v in found.items() if k != key}, wanted))


def test_the_gate_of_a_language_model_sees_the_optimiser():
    model = Model(TINY, "gru", "float64")
    steps = []
    for step in model.learn():
        steps.append(step)
        if len(steps) == 3:
            break
        model.params["head.bias"] = model.params["head.bias"] * 1.01
    assert error({"steps": steps}, solve("language", TINY, "gru", "float64")) > GATE["float32"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fastrnn", "torch", "numpy"])
def test_contestants_pass_the_gate(name, mode):
    if name == "torch":
        pytest.importorskip("torch")
    module = importlib.import_module(f"bench.peers.{name}")
    if not hasattr(module, mode):
        pytest.skip(f"{name} has no {mode}")
    for batch, layers in ((1, 1), (2, 2 if mode in ("language", "sampling") else 1)):
        case = Case("tiny", 3, batch, 4, 5, layers)
        for cell, dtype in itertools.product(CELLS, GATE):
            step, read = getattr(module, mode)(case, cell, dtype, 1)
            assert error(read(step()), solve(mode, case, cell, "float64")) <= GATE[dtype]


def test_a_contestant_may_have_an_option():
    assert contestant("torch") == ("torch", "")
    assert contestant("fastrnn:1").threads == 1
    assert contestant("fastrnn:float64").dtype == "float64"
    assert contestant("fastrnn:haswell").environment["NUMBA_CPU_NAME"] == "haswell"
    assert contestant("torch:busy").busy
    for text in ("torch", "fastrnn:1", "fastrnn:float64", "torch:busy"):
        assert contestant(text).environment == {}
        assert str(contestant(text)) == text
    for text in ("torsh:1", "torch:haswell", "fastrnn:0", "fastrnn:flaot64"):
        with pytest.raises(ValueError, match=text.split(":")[text[:5] != "torsh"]):
            contestant(text)


def test_a_process_that_is_dead_says_so_and_can_be_ended():
    process = Process("bench.machine", "/bin/false", 1)
    for _ in range(2):
        assert "ended" in process.ask(do="limits", seconds=0.1, dtype="float32")["failed"]
    process.end()


def entry(ours, theirs, mode="training", gflops=100.0):
    contestants = {"fastrnn": {"rounds": ours}, "torch": {"rounds": theirs}}
    contestants["onnx"] = {"missing": "inference only"}
    return {
        "mode": mode,
        "case": "small",
        "cell": "lstm",
        "contestants": contestants,
        "limits": {"gflops": gflops},
    }


def test_ratios_and_shares():
    work = find("small").operations("lstm", "training")
    one = entry([1e-3, 2e-3, 9e-3], [4e-3, 4e-3, 5e-3], gflops=work / 2e-3 / 1e9)
    assert report.best_peer(one) == ("torch", 4e-3)
    assert report.ratio(one) == 2
    assert report.share(one) == pytest.approx(1)
    other = entry([2e-3], [16e-3])
    assert report.geometric_means([one, other]) == {"training": pytest.approx(4)}
    other["contestants"]["fastrnn:1"] = {"rounds": [3e-3]}
    assert report.best_peer(other) == ("torch", 16e-3)
    assert report.variants(other) == {"fastrnn:1": pytest.approx(1.5)}
    alone = entry([1e-3], [])
    assert report.ratio(alone) is None
    text = report.markdown({"about": {"cpu": "x"}, "results": [one, alone]}, ["plot.svg"])
    assert "| small | lstm | 2.00 | 1.00 |" in text
    assert "- onnx: inference only (training small lstm, training small lstm)" in text


STAT = """cpu  99 99 99 99 99 99 99 99 99 99
cpu0 1 2 3 40 50 6 7 8 9 10
cpu1 10 20 30 400 500 60 70 80 90 100
cpu2 5 5 5 5 5 5 5 5 5 5
intr 1 2 3
"""


def test_what_is_stolen_is_read():
    assert runner.ticks(STAT, {0, 1}) == (88, 209)
    assert runner.ticks(STAT, {1}) == (80, 190)
    with pytest.raises(ValueError, match="unpack"):
        runner.ticks("cpu0 1 2 3\n", {0})


class Timed:
    """A process that tells how often it was asked."""

    def __init__(self):
        self.asked = []

    def ask(self, **request):
        self.asked.append(request)
        return {"times": [len(self.asked)]}


def lose(monkeypatch, *rounds):
    """Of each round, (stolen, used) ticks."""
    reads = []
    total = (0, 0)
    for one in rounds:
        reads.append(total)
        total = (total[0] + one[0], total[1] + one[1])
        reads.append(total)
    reads = iter(reads)
    monkeypatch.setattr(runner, "_ticks", lambda: next(reads))


def test_a_round_that_others_disturb_is_timed_again(monkeypatch):
    process = Timed()
    lose(monkeypatch, (50, 50), (20, 80), (2, 198), (0, 100))
    answer = runner.calm(process, 0.5)
    assert answer == {"times": [3], "stolen": 0.01}
    assert process.asked == [{"do": "time", "seconds": 0.5}] * 3
    # A tick or two of few are nothing.
    lose(monkeypatch, (2, 8), (0, 10))
    assert runner.calm(process, 0.5) == {"times": [4], "stolen": 0.2}
    # None is calm: the calmest counts.
    lose(monkeypatch, (30, 70), (10, 90), (20, 80), (40, 60))
    assert runner.calm(process, 0.5) == {"times": [6], "stolen": 0.1}
    assert len(process.asked) == 8


def test_where_nobody_knows_a_round_is_timed_once(monkeypatch):
    monkeypatch.setattr(runner, "_ticks", lambda: None)
    process = Timed()
    assert runner.calm(process, 0.5) == {"times": [1], "stolen": None}


def test_a_round_begins_when_the_others_are_quiet(monkeypatch):
    slept = []
    monkeypatch.setattr(runner.time, "sleep", slept.append)
    lose(monkeypatch, (0, 6), (3, 2), (5, 1), (0, 9))
    runner.settle()
    assert slept == [runner._QUIET] * 3
    # Somebody never is, or nobody knows.
    for reads in ([(0, 2)] * 20, None):
        slept.clear()
        lose(monkeypatch, *(reads or ()))
        if reads is None:
            monkeypatch.setattr(runner, "_ticks", lambda: None)
        runner.settle()
        assert slept == [runner._QUIET] * runner._LOOKS


class Machine:
    """A process that comes to these speeds, one after the other."""

    def __init__(self, speeds):
        self.speeds = iter(speeds)

    def ask(self, **request):
        return {"gflops": next(self.speeds), "gbytes": 1.0}


def new_clock(monkeypatch, *speeds):
    monkeypatch.setattr(runner, "Process", lambda *arguments: Machine(speeds))
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(runner, "_ticks", lambda: None)
    return runner.Clock(2)


def test_a_round_on_half_of_the_machine_is_timed_again(monkeypatch):
    calm, before, behind = (195, 200), (100,), (200, 100)
    clock, process = new_clock(monkeypatch, *calm, *before, *behind, *calm, *before * 4), Timed()
    assert clock.time(process, 0.5, "float32") == {"times": [1], "stolen": None, "whole": True}
    # The first that is whole counts.
    assert clock.time(process, 0.5, "float32") == {"times": [4], "stolen": None, "whole": True}
    # None is: the first counts, and says so.
    assert clock.time(process, 0.5, "float32") == {"times": [5], "stolen": None, "whole": False}
    assert len(process.asked) == 8
    clock = new_clock(monkeypatch, 200, 110, 120, 190)
    assert [clock.limits("float32")["gflops"] for _ in range(2)] == [200, 190]


def test_who_is_disturbed_is_told():
    calm, lost = entry([1e-3], [2e-3]), entry([1e-3], [2e-3])
    calm["contestants"]["torch"]["stolen"] = [0.0, 0.01, 0.9]
    calm["contestants"]["fastrnn"]["stolen"] = [None]
    # That of somebody who does not count does not count.
    calm["contestants"]["fastrnn:1"] = {"rounds": [1.0], "stolen": [0.5]}
    assert report.disturbed(calm) == ""
    lost["contestants"]["torch"]["stolen"] = [0.0, 0.3, 0.4]
    assert report.disturbed(lost) == "torch 30%"
    half = entry([1e-3], [2e-3])
    half["contestants"]["fastrnn"]["whole"] = [True, False, False]
    half["contestants"]["torch"]["whole"] = [True, False]
    assert report.disturbed(half) == "fastrnn had half of the machine"
    text = report.markdown({"about": {}, "results": [calm, lost]}, [])
    assert text.count("lost much all the same") == 1
    assert "training small lstm: torch 30%" in text
    assert report.markdown({"about": {}, "results": []}, [])


def test_a_run_writes_what_it_found(tmp_path):
    options = ["--cases", "T3B2I4H5", "--cells", "gru", "--contestants", "fastrnn,numpy,onnx"]
    options[-1] += ",fastrnn:2,fastrnn:float64,fastrnn:call,numpy:busy"
    options += ["--rounds", "2", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]
    options += ["--memory", "--start"]
    run = subprocess.run(
        [sys.executable, "-m", "bench", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    training, inference = record["results"]
    assert (training["mode"], inference["mode"]) == ("training", "inference")
    for one in (training, inference):
        assert len(one["contestants"]["fastrnn"]["rounds"]) == 2
        assert len(one["contestants"]["fastrnn"]["stolen"]) == 2
        assert report.ratio(one) > 0
        assert one["limits"]["gflops"] > 0
        assert one["limits"]["gbytes"] > 0
        options = {"fastrnn:2", "fastrnn:float64", "fastrnn:call", "numpy:busy"}
        assert set(report.variants(one)) == options
    for one in record["memory"]:
        assert one["found"]["fastrnn"]["most"] > one["found"]["fastrnn"]["before"] > 0
    assert record["start"]["fastrnn (cold)"]["first"] > 0
    # An interpreter without ONNX Runtime names it; one with it cannot train.
    assert "missing" in training["contestants"]["onnx"]
    assert path.with_suffix(".md").exists()


def test_a_name_it_does_not_know_is_an_error():
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--contestants", "torsh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "torsh" in run.stderr


def race(folder, *options):
    """What `bench.loss` does with a short text."""
    (folder / "text").write_text("To be, or not to be: that is the question. " * 60)
    command = [sys.executable, "-m", "bench.loss", str(folder / "text"), "--case", "T5B2I3H8L2"]
    command += ["--steps", "4", "--every", "2", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("target", "code"), [("9", 0), ("0", 1)])
def test_a_race_to_a_loss(tmp_path, target, code):
    pytest.importorskip("torch")
    done = race(tmp_path, "--target", target)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    ends = [line.split(":")[0] for line in lines if " after " in line]
    assert ends == (["fastrnn", "torch"] if code == 0 else [])
    turns = [line.split()[0] for line in lines if " steps " in line]
    assert turns == ["fastrnn", "torch", "torch", "fastrnn"][: 2 if code == 0 else 4]


def test_a_race_names_who_cannot_run(tmp_path):
    done = race(tmp_path, "--target", "9", "--contestants", "fastrnn,numpy")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("numpy: Missing: no race to a loss")
    assert "fastrnn: 9.0 after" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--case", "T2000B2I3H8"], "TEXT: expected more than 4002 characters"),
        (["--case", "enormous"], "case: expected one of"),
        (["--every", "0"], "expected a number from 1"),
        (["--contestants", "torch:busy"], "expected some of"),
    ],
)
def test_a_race_that_cannot_be_run(tmp_path, options, words):
    done = race(tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr


def options(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bench.options", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_option_is_timed():
    how = ["--rounds", "2", "--seconds", "0.001", "--scaling"]
    how += ["--only", "relu,own_cell,resets,flow"]
    told = options("--cases", "T3B2I4H6", "--cells", "rnn", "--mode", "inference", *how)
    found = dict(re.findall(r"^  (\w+) +([\d.]+) of plain \(wanted", told, re.M))
    alone = dict(re.findall(r"^  (\w+) +([\d.]+) times as long on one thread", told, re.M))
    # The flow is seen in training only.
    assert set(found) == {"relu", "own_cell", "resets"}
    assert set(alone) == {"plain", *found}
    assert all(float(ratio) > 0 for ratio in [*found.values(), *alone.values()])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what it takes")
def test_a_long_sequence_within_a_budget():
    told = options("--memory", "120", "--cells", "rnn")
    taken, said = map(int, re.search(r"rnn: (\d+) MB .* says (\d+)", told).groups())
    # Shared memory of libraries that are used for the first time is counted, too.
    assert 0.8 * said < taken < 120 * 1.1
