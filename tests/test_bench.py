"""The bench says what is so: its gate catches wrong numbers, its report adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
pytest.importorskip("bench", reason="not a checkout")

from bench import report  # noqa: E402
from bench.cases import CASES, find  # noqa: E402
from bench.problem import GATES, Answer, error, problem, solve  # noqa: E402
from bench.runner import GATE, Process  # noqa: E402


def test_a_case_is_named_or_spelled_out():
    assert find("large") == CASES["large"]
    assert find("T7B2I3H5")[1:] == (7, 2, 3, 5)
    with pytest.raises(ValueError, match="T64B32I64H64"):
        find("enormous")


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("spoil", [np.nan, 1e-3])
def test_the_gate_sees_every_array(cell, spoil):
    case = find("T3B2I4H5")
    wanted = solve(problem(case, cell, "float64"), cell)
    found = solve(problem(case, cell, "float32"), cell)
    assert error(found, wanted) <= GATE["float32"]
    for array in (found.y, found.d_x, *found.grads.values()):
        kept = array.copy()
        array.reshape(-1)[0] += spoil * np.linalg.norm(array)
        assert not error(found, wanted) <= GATE["float32"]
        array[...] = kept


def test_the_gate_asks_for_gradients():
    case = find("T3B2I4H5")
    wanted = solve(problem(case, "gru", "float64"), "gru")
    assert np.isnan(error(Answer(wanted.y), wanted))
    assert error(Answer(wanted.y), Answer(wanted.y)) == 0


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
    work = find("small").operations("lstm")
    one = entry([1e-3, 2e-3, 9e-3], [4e-3, 4e-3, 5e-3], gflops=work / 2e-3 / 1e9)
    assert report.best_peer(one) == ("torch", 4e-3)
    assert report.ratio(one) == 2
    assert report.share(one) == pytest.approx(1)
    other = entry([2e-3], [16e-3])
    assert report.geometric_means([one, other]) == {"training": pytest.approx(4)}
    alone = entry([1e-3], [])
    assert report.ratio(alone) is None
    text = report.markdown({"about": {"cpu": "x"}, "results": [one, alone]}, ["plot.svg"])
    assert "| small | lstm | 2.00 | 1.00 |" in text
    assert "- onnx: inference only" in text


def test_a_run_writes_what_it_found(tmp_path):
    options = ["--cases", "T3B2I4H5", "--cells", "gru", "--contestants", "fastrnn,numpy,onnx"]
    options += ["--rounds", "2", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]
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
        assert report.ratio(one) > 0
        assert one["limits"]["gflops"] > 0
        assert one["limits"]["gbytes"] > 0
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
