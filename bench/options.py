"""What each option of a layer costs: the time of a step, over that of the plain layer.

    python -m bench.options [--cases speech,medium] [--cells lstm,gru] [--rounds 7]
                            [--mode inference] [--dtype float64] [--scaling] [--only zoneout,resets]
    python -m bench.options --lengths          # T200 B64 I64 H128, lengths uniform in 10 to 200
    python -m bench.options --memory 256       # T = 100,000, one sequence, H = 128, within 256 MB

A step is one of training, or with `--mode inference` a call. `--scaling` times each on one thread,
too. Each runs in a process of its own, next to what it is compared with; medians of these ratios.
What is computed is the tests' affair, all options of a layer against the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastrnn
from bench.cases import Case, find
from bench.resident import most_from_now, resident
from bench.runner import Clock, Process
from fastrnn.cells import CELLS

PLAIN, DEEP = "plain", "two_layers"


class Option(NamedTuple):
    """One that is timed.

    cells     that have it
    arguments of the layer
    allowed   how much of the time of `beside`
    given     what of `_given` forward gets
    trained   whether it acts in training only
    """

    cells: str
    arguments: dict[str, Any]
    allowed: float
    given: str = ""
    beside: str = PLAIN
    trained: bool = False


# A name and a number of threads; what is timed, and what beside.
Key = tuple[str, int]
Pair = tuple[Key, Key]

ALL = "rnn,lstm,gru"
GATED = "lstm,gru"
OPTIONS = {
    PLAIN: Option(ALL, {}, 1),
    DEEP: Option(ALL, {"num_layers": 2}, 1, beside=DEEP),
    "relu": Option("rnn", {"nonlinearity": "relu"}, 1.25),
    "reset_before": Option("gru", {"reset_after": False}, 1.4),
    "no_reset_gate": Option("gru", {"reset_gate": False}, 1.25),
    "peephole": Option("lstm", {"peephole": True}, 1.25),
    "coupled": Option("lstm", {"coupled": True}, 1.25),
    "cell_clip": Option("lstm", {"cell_clip": 3.0}, 1.25),
    "proj_size": Option("lstm", {"proj_size": None}, 1.25),
    "layer_norm": Option(GATED, {"layer_norm": True}, 1.5),
    "own_cell": Option(ALL, {"cell": None}, 1.25),
    "dropout": Option(ALL, {"num_layers": 2, "dropout": 0.3}, 1.25, "", DEEP, True),
    "input_dropout": Option(ALL, {"input_dropout": 0.3}, 1.25, trained=True),
    "locked_dropout": Option(
        ALL, {"input_dropout": 0.3, "locked_dropout": True}, 1.25, trained=True
    ),
    "recurrent_dropout": Option(ALL, {"recurrent_dropout": 0.3}, 1.25, trained=True),
    "weight_dropout": Option(ALL, {"weight_dropout": 0.3}, 1.25, trained=True),
    "zoneout": Option(ALL, {"zoneout": 0.1}, 1.25),
    "learned_state": Option(ALL, {"learned_state": True}, 1.25),
    "bidirectional": Option(ALL, {"bidirectional": True}, 2.1),
    "sum_of_both": Option(ALL, {"bidirectional": True, "merge": "sum"}, 2.1),
    "vectors": Option(ALL, {}, 1.25, "vectors"),
    "resets": Option(ALL, {}, 1.25, "resets"),
    "return_gates": Option(GATED, {}, 1.25, "return_gates"),
    "flow": Option(ALL, {}, 1.25, "flow", trained=True),
    "four_pieces": Option(ALL, {}, 1.4, "four_pieces", trained=True),
    "root_pieces": Option(ALL, {}, 1.4, "root_pieces", trained=True),
    "lengths": Option("", {}, 1, "lengths"),
}


def _given(name: str, case: Case, dtype: str) -> dict[str, Any]:
    """More arguments of forward."""
    random = np.random.default_rng(1)
    T, B = case.T, case.B
    # Made when they are wanted.
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "vectors": lambda: {"vectors": random.standard_normal((1000, case.I)).astype(dtype)},
        "resets": lambda: {"resets": random.random((T, B)) < 0.02},
        "return_gates": lambda: {"return_gates": True},
        "four_pieces": lambda: {"checkpoint_every": -(-T // 4)},
        "root_pieces": lambda: {"checkpoint_every": round(T**0.5)},
        "lengths": lambda: {"lengths": lengths_of(case)},
    }
    return ways[name]() if name in ways else {}


def lengths_of(case: Case) -> np.ndarray:
    """Uniform, from a twentieth of all steps."""
    return np.random.default_rng(0).integers(case.T // 20, case.T + 1, size=case.B)


def _layer(case: Case, cell: str, arguments: dict[str, Any], dtype: str) -> Any:
    arguments = arguments | {"dtype": dtype, "seed": 0}
    if "proj_size" in arguments:
        # Of the case's size.
        arguments["proj_size"] = case.H // 2
    if "cell" not in arguments:
        return getattr(fastrnn, cell.upper())(case.I, case.H, **arguments)
    # Known to the library no more than any other.
    own = CELLS["rnn_tanh" if cell == "rnn" else cell]
    arguments["cell"] = dataclasses.replace(own, name="own")
    return fastrnn.Recurrent(input_size=case.I, hidden_size=case.H, **arguments)


def _step(case: Case, cell: str, name: str, dtype: str, mode: str) -> Callable[[], Any]:
    """A training step, or a call."""
    random = np.random.default_rng(0)
    option = OPTIONS[name]
    layer = _layer(case, cell, option.arguments, dtype)
    given = _given(option.given, case, dtype)
    shape = case.T, case.B
    if "vectors" in given:
        x = random.integers(len(given["vectors"]), size=shape)
    else:
        x = random.standard_normal((*shape, case.I)).astype(dtype)
    d_y = random.standard_normal((*shape, layer.output_size)).astype(dtype)
    flow = {"return_flow": True} if option.given == "flow" else {}
    if mode == "inference":
        frozen = layer.freeze()
        return lambda: frozen(x, **given)

    def step() -> Any:
        _, _, saved, *_ = layer.forward(x, **given)
        return layer.backward(saved, d_y, **flow)

    return step


def _packed(case: Case, cell: str) -> Callable[[], Any]:
    """PyTorch's packed sequences."""
    import torch

    random = np.random.default_rng(0)
    rows = random.standard_normal((case.T, case.B, case.I), dtype=np.float32)
    d_y = random.standard_normal((case.T, case.B, case.H), dtype=np.float32)
    lengths = torch.tensor(lengths_of(case))
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
    name, cell, place, dtype, mode = what.split(":")
    case = find(place)
    if name == "packed":
        import torch

        torch.set_num_threads(threads)
        step = _packed(case, cell)
    else:
        fastrnn.set_num_threads(threads)
        step = _step(case, cell, name, dtype, mode)
    for line in sys.stdin:
        end = time.perf_counter() + json.loads(line)["seconds"]
        times: list[float] = []
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(json.dumps({"times": times}), flush=True)


def race(pairs: list[Pair], cell: str, case: str, options: argparse.Namespace) -> dict[Pair, float]:
    """How many times as long the first of each pair takes as the second.

    The machine may be half as fast a minute later: in each round both are timed one after the
    other, and what counts is the median of these ratios.
    """
    racing: dict[Key, Process] = {}
    ratios: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    with contextlib.ExitStack() as ends:
        for name, count in dict.fromkeys(key for pair in pairs for key in pair):
            what = f"{name}:{cell}:{case}:{options.dtype}:{options.mode}"
            process = racing[name, count] = Process(what, sys.executable, count, "bench.options")
            ends.callback(process.end)
            # Compiled, and a step more.
            for _ in range(2):
                process.ask(do="time", seconds=0)

        clock = Clock(options.threads)
        ends.callback(clock.end)

        def timed(key: Key) -> float:
            answer = clock.time(racing[key], options.seconds, options.dtype)
            if "failed" in answer:
                raise RuntimeError(f"{key[0]}: {answer['failed']}")
            return statistics.median(answer["times"])

        for turn in range(options.rounds):
            for pair in pairs:
                # In turns, so that neither is always the first.
                both = {key: timed(key) for key in (pair if turn % 2 else pair[::-1])}
                ratios[pair].append(both[pair[0]] / both[pair[1]])
    return {pair: statistics.median(found) for pair, found in ratios.items()}


def _compare(options: argparse.Namespace) -> None:
    threads = options.threads
    for case in options.cases.split(","):
        for cell in options.cells.split(","):
            names = [
                name
                for name, option in OPTIONS.items()
                if cell in option.cells.split(",")
                and option.beside != name
                and not (option.trained and options.mode == "inference")
                and (options.only is None or name in options.only.split(","))
            ]
            pairs: list[Pair] = [
                ((name, threads), (OPTIONS[name].beside, threads)) for name in names
            ]
            if options.scaling:
                alone: list[Pair] = [((name, 1), (name, threads)) for name in (PLAIN, *names)]
            else:
                alone = []
            found = race(pairs + alone, cell, case, options)
            print(f"{case} {cell}")
            for (name, _), (beside, _) in pairs:
                told = f"  {name:18} {found[(name, threads), (beside, threads)]:.2f}"
                print(f"{told} of {beside} (wanted {OPTIONS[name].allowed})", flush=True)
            for (name, _), _ in alone:
                ratio = found[(name, 1), (name, threads)]
                print(f"  {name:18} {ratio:.2f} times as long on one thread", flush=True)


def _compare_lengths(options: argparse.Namespace) -> None:
    place = "T200B64I64H128"
    case = find(place)
    share = lengths_of(case).sum() / (case.T * case.B)
    plain, lengths, packed = ((name, options.threads) for name in (PLAIN, "lengths", "packed"))
    for cell in options.cells.split(","):
        found = race([(lengths, plain), (packed, lengths)], cell, place, options)
        ratio = found[lengths, plain]
        print(
            f"{cell}: {share:.3f} of the steps take {ratio:.3f} of the padded time, "
            f"{ratio / share:.2f} times their share (wanted 1.15); PyTorch's packed sequences "
            f"{found[packed, lengths]:.1f} times as long (wanted 5)",
            flush=True,
        )


def _measure_memory(megabytes: float, cell: str, dtype: str) -> None:
    """The most memory that this process takes for a step, beyond x, d_y and what it had."""
    steps = 100_000
    layer = getattr(fastrnn, cell.upper())(128, 128, seed=0, dtype=dtype)
    tiny = np.zeros((4, 1, 128), dtype)
    y, _, saved = layer.forward(tiny, checkpoint_every=2)
    layer.backward(saved, y)
    x, d_y = (
        np.random.default_rng(seed).standard_normal((steps, 1, 128)).astype(dtype)
        for seed in range(2)
    )
    before = most_from_now()
    _, _, saved = layer.forward(x, budget_mb=megabytes)
    every = saved.pieces[0].steps
    layer.backward(saved, d_y)
    most = (resident("VmHWM") - before) / 1e6
    said = layer.training_bytes(steps, 1, checkpoint_every=every) / 1e6
    whole = layer.training_bytes(steps, 1) / 1e6
    print(
        f"{cell}: {most:.0f} MB for T = {steps}, pieces of {every} steps, beside x and d_output of "
        f"{x.nbytes / 1e6:.0f} each; training_bytes says {said:.0f}, without pieces {whole:.0f}"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.options",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", default="speech,medium")
    parser.add_argument("--cells", default="lstm,gru")
    parser.add_argument("--mode", default="training", choices=("training", "inference"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--only", metavar="OPTIONS")
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--memory", type=float, metavar="MB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15)
    options = parser.parse_args()
    unknown = set((options.only or PLAIN).split(",")) - set(OPTIONS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(OPTIONS)}, got {', '.join(unknown)}")
    if options.memory is not None:
        for cell in options.cells.split(","):
            # What one has had, the next would find.
            arguments = options.memory, cell, options.dtype
            process = multiprocessing.get_context("spawn").Process(
                target=_measure_memory, args=arguments
            )
            process.start()
            process.join()
            if process.exitcode:
                return 1
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
