"""What each option of a layer costs: the time of a training step, over that of the plain layer.

    python -m bench.options [--cases speech,medium] [--cells lstm,gru] [--rounds 7]
    python -m bench.options --lengths          # T200 B64 I64 H128, lengths uniform in 10 to 200
    python -m bench.options --memory 256       # T = 100,000, one sequence, H = 128, within 256 MB

Each option runs in a process of its own, they take turns; ratios of medians. What is computed is
the tests' affair, all options of a layer against the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fastrnn
from bench.cases import Case, find
from bench.runner import Process, calm

# Arguments of the layer, then of forward; a number is how much of the plain time is allowed.
LAYERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "reset_before": ("gru", {"reset_after": False}, 1.4),
    "no_reset_gate": ("gru", {"reset_gate": False}, 1.25),
    "peephole": ("lstm", {"peephole": True}, 1.25),
    "coupled": ("lstm", {"coupled": True}, 1.25),
    "cell_clip": ("lstm", {"cell_clip": 3.0}, 1.25),
    "proj_size": ("lstm", {"proj_size": None}, 1.25),
    "layer_norm": ("both", {"layer_norm": True}, 1.5),
    "input_dropout": ("both", {"input_dropout": 0.3}, 1.25),
    "recurrent_dropout": ("both", {"recurrent_dropout": 0.3}, 1.25),
    "weight_dropout": ("both", {"weight_dropout": 0.3}, 1.25),
    "zoneout": ("both", {"zoneout": 0.1}, 1.25),
    "learned_state": ("both", {"learned_state": True}, 1.25),
    "bidirectional": ("both", {"bidirectional": True}, 2.1),
}
CALLS: dict[str, float] = {"resets": 1.25, "four_pieces": 1.4, "root_pieces": 1.4, "flow": 1.25}
PLAIN = "plain"


def _cost(name: str) -> float:
    return LAYERS[name][2] if name in LAYERS else CALLS.get(name, 1.0)


def _step(case: Case, cell: str, name: str) -> Callable[[], Any]:
    """A training step."""
    random = np.random.default_rng(0)
    T, B = case.T, case.B
    options = dict(LAYERS[name][1]) if name in LAYERS else {}
    if "proj_size" in options:
        # Of the case's size.
        options["proj_size"] = case.H // 2
    layer = getattr(fastrnn, cell.upper())(case.I, case.H, seed=0, **options)
    x = random.standard_normal((T, B, case.I), dtype=np.float32)
    d_y = random.standard_normal((T, B, layer.output_size), dtype=np.float32)
    lengths = random.integers(T // 20, T + 1, size=B)
    given: dict[str, dict[str, Any]] = {
        "resets": {"resets": random.random((T, B)) < 0.02},
        "four_pieces": {"checkpoint_every": -(-T // 4)},
        "root_pieces": {"checkpoint_every": round(T**0.5)},
        "lengths": {"lengths": lengths},
    }
    flow = {"return_flow": True} if name == "flow" else {}

    def step() -> Any:
        _, _, saved = layer.forward(x, **given.get(name, {}))
        return layer.backward(saved, d_y, **flow)

    return step


def _packed(case: Case, cell: str) -> Callable[[], Any]:
    """PyTorch's packed sequences."""
    import torch

    random = np.random.default_rng(0)
    rows = random.standard_normal((case.T, case.B, case.I), dtype=np.float32)
    d_y = random.standard_normal((case.T, case.B, case.H), dtype=np.float32)
    lengths = torch.tensor(random.integers(case.T // 20, case.T + 1, size=case.B))
    layer = getattr(torch.nn, cell.upper())(case.I, case.H)
    x, gradient = torch.tensor(rows, requires_grad=True), torch.tensor(d_y)
    pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence

    def step() -> Any:
        layer.zero_grad()
        x.grad = None
        y, _ = layer(pack(x, lengths, enforce_sorted=False))
        unpack(y, total_length=case.T)[0].backward(gradient)

    return step


def worker(what: str, threads: int) -> None:
    """One option, in this process: answers {"do": "time", seconds} by times of steps."""
    name, cell, place = what.split(":")
    case = find(place)
    if name == "packed":
        import torch

        torch.set_num_threads(threads)
        step = _packed(case, cell)
    else:
        fastrnn.set_num_threads(threads)
        step = _step(case, cell, name)
    for line in sys.stdin:
        end = time.perf_counter() + json.loads(line)["seconds"]
        times: list[float] = []
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(json.dumps({"times": times}), flush=True)


def race(
    names: list[str], cell: str, case: str, threads: int, rounds: int, seconds: float
) -> dict[str, float]:
    """The median time of each."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as ends:
        racing = {}
        for name in names:
            what = f"{name}:{cell}:{case}"
            racing[name] = Process(what, sys.executable, threads, "bench.options")
            ends.callback(racing[name].end)
            # Compiled, and a step more.
            for _ in range(2):
                racing[name].ask(do="time", seconds=0)
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                answer = calm(racing[name], seconds)
                if "failed" in answer:
                    raise RuntimeError(f"{name}: {answer['failed']}")
                times[name] += answer["times"]
    return {name: statistics.median(found) for name, found in times.items()}


def _compare(options: argparse.Namespace) -> None:
    for case in options.cases.split(","):
        for cell in options.cells.split(","):
            names = [n for n, (of, _, _) in LAYERS.items() if of in (cell, "both")]
            found = race([PLAIN, *names, *CALLS], cell, case, *_clock(options))
            print(f"{case} {cell}: plain {1e3 * found[PLAIN]:.2f} ms")
            for name in (*names, *CALLS):
                ratio = found[name] / found[PLAIN]
                print(f"  {name:18} {ratio:.2f} (wanted {_cost(name)})", flush=True)


def _clock(options: argparse.Namespace) -> tuple[int, int, float]:
    return options.threads, options.rounds, options.seconds


def _compare_lengths(options: argparse.Namespace) -> None:
    case = find("T200B64I64H128")
    lengths = np.random.default_rng(0)
    lengths.standard_normal((case.T, case.B, case.I), dtype=np.float32)
    lengths.standard_normal((case.T, case.B, case.H), dtype=np.float32)
    counts = lengths.integers(case.T // 20, case.T + 1, size=case.B)
    share = counts.sum() / (case.T * case.B)
    for cell in options.cells.split(","):
        names = [PLAIN, "lengths", "packed"]
        found = race(names, cell, "T200B64I64H128", *_clock(options))
        ratio = found["lengths"] / found[PLAIN]
        print(
            f"{cell}: {share:.3f} of the steps take {ratio:.3f} of the padded time, "
            f"{ratio / share:.2f} times their share (wanted 1.15); PyTorch's packed sequences "
            f"{found['packed'] / found['lengths']:.1f} times as long (wanted 5)",
            flush=True,
        )


def _measure_memory(megabytes: float, cell: str) -> None:
    """The most memory that this process takes for a step, beyond x, d_y and what it had."""
    steps = 100_000
    layer = getattr(fastrnn, cell.upper())(128, 128, seed=0)
    tiny = np.zeros((4, 1, 128), np.float32)
    y, _, saved = layer.forward(tiny, checkpoint_every=2)
    layer.backward(saved, y)
    x = np.random.default_rng(0).standard_normal((steps, 1, 128), dtype=np.float32)
    d_y = np.random.default_rng(1).standard_normal((steps, 1, 128), dtype=np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, _, saved = layer.forward(x, budget_mb=megabytes)
    every = saved.pieces[0].steps
    layer.backward(saved, d_y)
    most = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 * 1024
    said = layer.training_bytes(steps, 1, checkpoint_every=every) / 1e6
    whole = layer.training_bytes(steps, 1) / 1e6
    print(
        f"{cell}: {most:.0f} MB for T = {steps}, pieces of {every} steps; training_bytes says "
        f"{said:.0f}, without pieces {whole:.0f}"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--cases", default="speech,medium")
    parser.add_argument("--cells", default="lstm,gru")
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--memory", type=float, metavar="MB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15)
    options = parser.parse_args()
    if options.memory is not None:
        _measure_memory(options.memory, options.cells.split(",")[0])
    elif options.lengths:
        _compare_lengths(options)
    else:
        _compare(options)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and ":" in sys.argv[1]:
        worker(sys.argv[1], int(sys.argv[2]))
    else:
        sys.exit(main())
